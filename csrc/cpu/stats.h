// stats on one tile: Σx and M2 = Σ(x - mean)² of each channel.

#pragma once

#include "merge.h"
#include "runs.h"

namespace fusedskip::cpu::FUSEDSKIP_ISA {

// M2 of a block, of which are known Σ(x - K) and Σ(x - K)² about a pivot K near its mean.
inline double about_mean(double d1, double d2, double per_element) {
  const double m2 = d2 - d1 * d1 * per_element;  // rounded, it may be below 0
  return m2 < 0 ? 0 : m2;
}

// The pivot of a block of n elements is the mean of k of them. It is then no further from the mean
// of all than sqrt(M2/k), so that taking n·(mean - K)² off Σ(x - K)² costs at most log2(1 + n/k)
// bits, whatever the data: 4 or 5 in the blocks below. One pass over the block is saved by it.
// About an infinite pivot the mean of ±Inf would be NaN.
template <typename P>
inline P finite_or_zero(P a) {
  return keep(a, lanes_of<P>(~bits_of(exceeds(a - a, P::broadcast(0)))));  // Inf - Inf is NaN
}

template <typename T>
void stats_planes(const StatsTile& tile) {
  using S = StatisticsOf<T>;
  using P = PackOf<T>;
  const T* tile_x = static_cast<const T*>(tile.x);
  // body(k, pack, n...): a pack of x for accumulator k.
  const auto for_each = [&](auto body) {
    for (int64_t run = 0; run < tile.runs.count; ++run) {
      const T* x = tile_x + run * tile.runs.stride;
      for_each_pack_in_turn<P::kLanes, kAtOnce<P>>(tile.runs.length,
                                                   [&](int k, int64_t i, auto... n) {
                                                     prefetch(x + tile.runs.prefetch + i);
                                                     body(k, load(x + i, n...), n...);
                                                   });
    }
  };
  constexpr int64_t kSample = 512;
  const int64_t length = tile.runs.length < kSample ? tile.runs.length : kSample;
  P sampled = {};
  int64_t sample = 0;
  for (int64_t run = 0; sample < kSample && 16 * run < tile.runs.count; ++run, sample += length)
    for_each_pack<P::kLanes>(length, [&](int64_t i, auto... n) {
      sampled = sampled + load(tile_x + run * tile.runs.stride + i, n...);
    });
  const P pivots = finite_or_zero(P::broadcast(sum(sampled) / S(sample)));
  P d1[kAtOnce<P>] = {}, d2[kAtOnce<P>] = {};
  for_each([&](int k, P x, auto... n) {
    P d = x - pivots;
    ((d = keep(d, lanes_of<P>((1u << n) - 1))), ...);
    d1[k] = d1[k] + d;
    d2[k] = fma(d, d, d2[k]);
  });
  const double n = double(tile.runs.count) * double(tile.runs.length), d = fold(d1);
  *tile.sum = pivots.v[0][0] * n + d;
  *tile.m2 = about_mean(d, fold(d2), 1 / n);
}

template <typename T>
using StatsSlice = Slice<PackOf<T>, 3, 0>;

template <typename T>
void stats_rows(const StatsTile& tile, int64_t first, int64_t n_channels) {
  using S = StatisticsOf<T>;
  using P = PackOf<T>;
  const int64_t block = rows_a_block(tile.runs), stride = tile.runs.stride;
  double *sum = tile.sum + first, *m2 = tile.m2 + first;
  for (int64_t c = 0; c < n_channels; ++c) sum[c] = m2[c] = 0;
  StatsSlice<T> slice;
  auto& [pivots, d1, d2] = slice.numbers;
  for (int64_t row = 0; row < tile.runs.count; row += block) {
    const int64_t rows = row + block < tile.runs.count ? block : tile.runs.count - row;
    const int64_t sample = rows < 64 ? (rows + 7) / 8 : 8;
    const T* x = static_cast<const T*>(tile.x) + row * stride + first;
    for_each_pack<P::kLanes>(n_channels, [&](int64_t c, auto... n) {
      P pivot = {};
      for (int64_t r = 0; r < sample; ++r) pivot = pivot + load(x + r * stride + c, n...);
      store_lanes(pivots + c, finite_or_zero(pivot * P::broadcast(S(1) / S(sample))));
      store_lanes(d1 + c, P{});
      store_lanes(d2 + c, P{});
    });
    for_each_pack_of_rows<P, sizeof(T) == 2 ? 8 : 1>(
        rows, n_channels, stride,
        [&](int64_t first_row, auto rows_at_once, int64_t c, auto packs, auto... n)
            __attribute__((always_inline)) {
              constexpr int kPacks = packs;
              P pivot[kPacks], sum1[kPacks], sum2[kPacks];
              for (int k = 0; k < kPacks; ++k) {
                pivot[k] = load_lanes<P>(pivots + c + k * P::kLanes);
                sum1[k] = load_lanes<P>(d1 + c + k * P::kLanes);
                sum2[k] = load_lanes<P>(d2 + c + k * P::kLanes);
              }
              for (int64_t next = 0; next < rows_at_once; ++next)
                for (int k = 0; k < kPacks; ++k) {
                  const T* p = x + (first_row + next) * stride + c + k * P::kLanes;
                  prefetch_ahead<P::kLanes>(p);
                  const P d = load(p, n...) - pivot[k];
                  sum1[k] = sum1[k] + d;
                  sum2[k] = fma(d, d, sum2[k]);
                }
              for (int k = 0; k < kPacks; ++k) {
                store_lanes(d1 + c + k * P::kLanes, sum1[k]);
                store_lanes(d2 + c + k * P::kLanes, sum2[k]);
              }
            });
    const Merge merge{double(row), double(rows)};
    for (int64_t c = 0; c < n_channels; ++c)
      merge(sum[c], m2[c], pivots[c] * merge.count + d1[c],
            about_mean(d1[c], d2[c], merge.per_element));
  }
}

template <typename T>
void stats(const StatsTile& tile) {
  if (!tile.runs.per_lane) return stats_planes<T>(tile);
  for_each_slice<StatsSlice<T>::kMost>(
      tile.runs.length, [&](int64_t first, int64_t n) { stats_rows<T>(tile, first, n); });
}

}  // namespace fusedskip::cpu::FUSEDSKIP_ISA

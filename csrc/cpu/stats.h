// stats on one tile: Σx and M2 = Σ(x - mean)² of each channel.

#pragma once

#include "merge.h"
#include "runs.h"

namespace fusedskip::cpu::FUSEDSKIP_ISA {

// The same for a block of which are known a pivot K near its mean, Σ(x - K) and Σ(x - K)².
inline void merge_block(const Merge& merge, double& sum, double& m2, double pivot, double d1,
                        double d2) {
  const double about_mean = d2 - d1 * d1 * merge.per_element;  // rounded, it may be below 0
  merge(sum, m2, pivot * merge.count + d1, about_mean < 0 ? 0 : about_mean);
}

// The pivot of a block of n elements is the mean of k of them. It is then no further from the mean
// of all than sqrt(M2/k), so that taking n·(mean - K)² off Σ(x - K)² costs at most log2(1 + n/k)
// bits, whatever the data: 5 or 6 in the blocks below. One pass over the block is saved by it.
// About an infinite pivot the mean of ±Inf would be NaN.
template <typename S>
inline Pack<S> finite_or_zero(Pack<S> a) {
  return keep(a, ~exceeds(a - a, Pack<S>::broadcast(0)));  // Inf - Inf is NaN
}

template <typename T>
void stats_planes(const StatsTile& tile) {
  using S = StatisticsOf<T>;
  using P = Pack<S>;
  const T* tile_x = static_cast<const T*>(tile.x);
  // body(k, pack, n...): a pack of x for accumulator k.
  const auto for_each = [&](auto body) {
    for (int64_t run = 0; run < tile.runs.count; ++run) {
      const T* x = tile_x + run * tile.runs.stride;
      for_each_pack_in_turn<P::kLanes, kColumn>(tile.runs.length, [&](int k, int64_t i, auto... n) {
        prefetch(x + tile.runs.prefetch + i);
        body(k, load(x + i, n...), n...);
      });
    }
  };
  const auto fold = [](const P(&a)[kColumn]) { return double(sum((a[0] + a[1]) + (a[2] + a[3]))); };

  constexpr int64_t kSample = 64 * P::kLanes;
  const int64_t length = tile.runs.length < kSample ? tile.runs.length : kSample;
  P sampled = {};
  int64_t sample = 0;
  for (int64_t run = 0; sample < kSample && 16 * run < tile.runs.count; ++run, sample += length)
    for_each_pack<P::kLanes>(length, [&](int64_t i, auto... n) {
      sampled = sampled + load(tile_x + run * tile.runs.stride + i, n...);
    });
  const P pivots = finite_or_zero(P::broadcast(sum(sampled) / S(sample)));
  P d1[kColumn] = {}, d2[kColumn] = {};
  for_each([&](int k, P x, auto... n) {
    P d = x - pivots;
    ((d = keep(d, (1u << n) - 1)), ...);
    d1[k] = d1[k] + d;
    d2[k] = fma(d, d, d2[k]);
  });
  *tile.sum = *tile.m2 = 0;
  const Merge merge(0, double(tile.runs.count) * double(tile.runs.length));
  merge_block(merge, *tile.sum, *tile.m2, pivots.v[0][0], fold(d1), fold(d2));
}

template <typename T>
void stats_rows(const StatsTile& tile) {
  using S = StatisticsOf<T>;
  using P = Pack<S>;
  const int64_t n_channels = tile.runs.length, block = rows_a_block(tile.runs);
  for (int64_t c = 0; c < n_channels; ++c) tile.sum[c] = tile.m2[c] = 0;
  for (int64_t row = 0; row < tile.runs.count; row += block) {
    const int64_t rows = row + block < tile.runs.count ? block : tile.runs.count - row;
    const int64_t sample = rows < 64 ? (rows + 7) / 8 : 8;
    const T* x = static_cast<const T*>(tile.x) + row * n_channels;
    const Merge merge{double(row), double(rows)};
    for_each_column<P::kLanes>(n_channels, [&](int64_t c, auto packs, auto... n) {
      constexpr int kPacks = packs;
      constexpr int kLanes = kPacks * P::kLanes;
      P pivot[kPacks] = {}, d1[kPacks] = {}, d2[kPacks] = {};
      for (int64_t r = 0; r < sample; ++r)
        for (int k = 0; k < kPacks; ++k)
          pivot[k] = pivot[k] + load(x + r * n_channels + c + k * P::kLanes, n...);
      for (int k = 0; k < kPacks; ++k)
        pivot[k] = finite_or_zero(pivot[k] * P::broadcast(S(1) / S(sample)));
      for (int64_t r = 0; r < rows; ++r) {
        prefetch_column<kLanes>(x + (r + block) * n_channels + c);
        for (int k = 0; k < kPacks; ++k) {
          const P d = load(x + r * n_channels + c + k * P::kLanes, n...) - pivot[k];
          d1[k] = d1[k] + d;
          d2[k] = fma(d, d, d2[k]);
        }
      }
      S lanes[3][kLanes];
      std::memcpy(lanes[0], pivot, sizeof(pivot));
      std::memcpy(lanes[1], d1, sizeof(d1));
      std::memcpy(lanes[2], d2, sizeof(d2));
      int valid = kLanes;
      ((valid = n), ...);
      for (int l = 0; l < valid; ++l)
        merge_block(merge, tile.sum[c + l], tile.m2[c + l], lanes[0][l], lanes[1][l], lanes[2][l]);
    });
  }
}

template <typename T>
void stats(const StatsTile& tile) {
  tile.runs.per_lane ? stats_rows<T>(tile) : stats_planes<T>(tile);
}

}  // namespace fusedskip::cpu::FUSEDSKIP_ISA

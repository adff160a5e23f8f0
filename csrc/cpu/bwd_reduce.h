// bwd_reduce on one tile: Σg and Σg·(x - mean) of each channel, and with two norms the residual's.

#pragma once

#include "gate.h"

namespace fusedskip::cpu::FUSEDSKIP_ISA {

template <typename T, Gate kGate, bool kDual>
void bwd_reduce_planes(const BwdReduceTile& tile) {
  using P = PackOf<T>;
  const Gated<T, kGate, false> gated(tile.affine);
  const Coefficient<P, false> residual_mean(tile.residual_affine.mean);
  // Several vectors in a pack hide the latency by themselves.
  constexpr int kSums = kDual ? 3 : 2, kAccumulators = P::kVectors == 1 ? 2 : 1;
  P sums[kSums][kAccumulators] = {};
  for (int64_t run = 0; run < tile.runs.count; ++run) {
    const T* dout = static_cast<const T*>(tile.dout) + run * tile.runs.stride;
    const T* x = static_cast<const T*>(tile.x) + run * tile.runs.stride;
    const T* residual = static_cast<const T*>(tile.residual) + (kDual ? run * tile.runs.stride : 0);
    const uint8_t* mask = kGate == Gate::kMask ? tile.mask + run * tile.runs.mask_stride : nullptr;
    for_each_pack_in_turn<P::kLanes, kAccumulators>(
        tile.runs.length, [&](int k, int64_t i, auto... n) {
          prefetch(dout + tile.runs.prefetch + i);
          prefetch(x + tile.runs.prefetch + i);
          if constexpr (kDual) prefetch(residual + tile.runs.prefetch + i);
          const P centred = load(x + i, n...) - gated.mean.all;
          // Lanes past the run's end load dout = 0 and add nothing.
          const P g = gated(dout, centred, mask, i, n...);
          if constexpr (kGate == Gate::kMask) mask += P::kMaskBytes;  // i / 8 is 3 instructions
          sums[0][k] = sums[0][k] + g;
          sums[1][k] = fma(g, centred, sums[1][k]);
          if constexpr (kDual)
            sums[2][k] = fma(g, load(residual + i, n...) - residual_mean.all, sums[2][k]);
        });
  }
  *tile.sums[0] = fold(sums[0]);
  *tile.sums[1] = fold(sums[1]);
  if constexpr (kDual) *tile.sums[2] = fold(sums[2]);
}

constexpr int coefficients_of(Gate gate, bool dual) {
  return dual ? 2 : gate == Gate::kRecompute ? 3 : 1;
}

template <typename T, Gate kGate, bool kDual>
using ReduceSlice = Slice<PackOf<T>, kDual ? 3 : 2, coefficients_of(kGate, kDual)>;

template <typename T, Gate kGate, bool kDual>
void bwd_reduce_rows(const BwdReduceTile& tile, int64_t first, int64_t n_channels) {
  using P = PackOf<T>;
  const Gated<T, kGate, true> gated(tile.affine);
  const Coefficient<P, true> residual_mean(tile.residual_affine.mean);
  constexpr int kSums = kDual ? 3 : 2;
  const int64_t block = rows_a_block(tile.runs), stride = tile.runs.stride;
  for (int s = 0; s < kSums; ++s)
    for (int64_t c = first; c < first + n_channels; ++c) tile.sums[s][c] = 0;
  constexpr int kRows = sizeof(T) == 2 && kGate == Gate::kRecompute ? 8 : 1;
  ReduceSlice<T, kGate, kDual> slice;
  for (int64_t row = 0; row < tile.runs.count; row += block) {
    const int64_t rows = row + block < tile.runs.count ? block : tile.runs.count - row;
    slice.clear(n_channels);
    const T* dout = static_cast<const T*>(tile.dout) + row * stride;
    const T* x = static_cast<const T*>(tile.x) + row * stride;
    const T* residual = static_cast<const T*>(tile.residual) + (kDual ? row * stride : 0);
    const uint8_t* mask = kGate == Gate::kMask ? tile.mask + row * tile.runs.mask_stride : nullptr;
    for_each_pack_of_rows<P, kRows>(
        rows, n_channels, stride,
        [&](int64_t first_row, auto rows_at_once, int64_t c, auto packs,
            auto... n) __attribute__((always_inline)) {
          constexpr int kPacks = packs;
          P total[kSums][kPacks];
          for (int s = 0; s < kSums; ++s)
            for (int k = 0; k < kPacks; ++k)
              total[s][k] = load_lanes<P>(slice.numbers[s] + c + k * P::kLanes);
          for (int64_t next = 0; next < rows_at_once; ++next) {
            const int64_t r = first_row + next, start = r * stride;
            for (int k = 0; k < kPacks; ++k) {
              const int64_t i = first + c + k * P::kLanes;
              prefetch_ahead<P::kLanes>(dout + start + i);
              prefetch_ahead<P::kLanes>(x + start + i);
              if constexpr (kDual) prefetch_ahead<P::kLanes>(residual + start + i);
              const P centred = load(x + start + i, n...) - gated.mean.at(i, n...);
              const uint8_t* bits =
                  kGate == Gate::kMask ? mask + r * tile.runs.mask_stride + i / 8 : nullptr;
              const P g = gated(dout + start, centred, bits, i, n...);
              total[0][k] = total[0][k] + g;
              total[1][k] = fma(g, centred, total[1][k]);
              if constexpr (kDual)
                total[2][k] = fma(g, load(residual + start + i, n...) - residual_mean.at(i, n...),
                                  total[2][k]);
            }
          }
          for (int s = 0; s < kSums; ++s)
            for (int k = 0; k < kPacks; ++k)
              store_lanes(slice.numbers[s] + c + k * P::kLanes, total[s][k]);
        });
    for (int s = 0; s < kSums; ++s)
      for (int64_t c = 0; c < n_channels; ++c) tile.sums[s][first + c] += slice.numbers[s][c];
  }
}

template <typename T>
void bwd_reduce(const BwdReduceTile& tile) {
  with_gate(tile, [&](auto gate, auto dual) {
    if (!tile.runs.per_lane) return bwd_reduce_planes<T, gate, dual>(tile);
    for_each_slice<ReduceSlice<T, gate, dual>::kMost>(
        tile.runs.length,
        [&](int64_t first, int64_t n) { bwd_reduce_rows<T, gate, dual>(tile, first, n); });
  });
}

}  // namespace fusedskip::cpu::FUSEDSKIP_ISA

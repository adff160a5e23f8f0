// bwd_reduce on one tile: Σg and Σg·(x - mean) of each channel, and with two norms the residual's.

#pragma once

#include "gate.h"

namespace fusedskip::cpu::FUSEDSKIP_ISA {

template <typename T, Gate kGate, bool kDual>
void bwd_reduce_planes(const BwdReduceTile& tile) {
  using S = StatisticsOf<T>;
  using P = Pack<S>;
  const Gated<T, kGate, false> gated(tile.affine);
  const Coefficient<S, false> residual_mean(tile.residual_affine.mean);
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
          const P g = gated(load(dout + i, n...), centred, mask, i, n...);
          sums[0][k] = sums[0][k] + g;
          sums[1][k] = fma(g, centred, sums[1][k]);
          if constexpr (kDual)
            sums[2][k] = fma(g, load(residual + i, n...) - residual_mean.all, sums[2][k]);
        });
  }
  for (int s = 0; s < kSums; ++s) {
    P total = sums[s][0];
    for (int k = 1; k < kAccumulators; ++k) total = total + sums[s][k];
    *tile.sums[s] = double(sum(total));
  }
}

template <typename T, Gate kGate, bool kDual>
void bwd_reduce_rows(const BwdReduceTile& tile) {
  using S = StatisticsOf<T>;
  using P = Pack<S>;
  const Gated<T, kGate, true> gated(tile.affine);
  const Coefficient<S, true> residual_mean(tile.residual_affine.mean);
  constexpr int kSums = kDual ? 3 : 2;
  const int64_t n_channels = tile.runs.length, block = rows_a_block(tile.runs);
  for (int s = 0; s < kSums; ++s)
    for (int64_t c = 0; c < n_channels; ++c) tile.sums[s][c] = 0;
  for (int64_t row = 0; row < tile.runs.count; row += block) {
    const int64_t rows = row + block < tile.runs.count ? block : tile.runs.count - row;
    const T* dout = static_cast<const T*>(tile.dout) + row * n_channels;
    const T* x = static_cast<const T*>(tile.x) + row * n_channels;
    const T* residual = static_cast<const T*>(tile.residual) + (kDual ? row * n_channels : 0);
    const uint8_t* mask = kGate == Gate::kMask ? tile.mask + row * tile.runs.mask_stride : nullptr;
    for_each_column<P::kLanes>(n_channels, [&](int64_t c, auto packs, auto... n) {
      constexpr int kPacks = packs;
      constexpr int kLanes = kPacks * P::kLanes;
      P sums[kSums][kPacks] = {};
      for (int64_t r = 0; r < rows; ++r) {
        prefetch_column<kLanes>(dout + (r + block) * n_channels + c);
        prefetch_column<kLanes>(x + (r + block) * n_channels + c);
        if constexpr (kDual) prefetch_column<kLanes>(residual + (r + block) * n_channels + c);
        for (int k = 0; k < kPacks; ++k) {
          const int64_t i = c + k * P::kLanes;
          const P centred = load(x + r * n_channels + i, n...) - gated.mean.at(i, n...);
          const P g = gated(load(dout + r * n_channels + i, n...), centred,
                            mask + r * tile.runs.mask_stride, i, n...);
          sums[0][k] = sums[0][k] + g;
          sums[1][k] = fma(g, centred, sums[1][k]);
          if constexpr (kDual)
            sums[2][k] =
                fma(g, load(residual + r * n_channels + i, n...) - residual_mean.at(i, n...),
                    sums[2][k]);
        }
      }
      S lanes[kSums][kLanes];
      std::memcpy(lanes, sums, sizeof(sums));
      int valid = kLanes;
      ((valid = n), ...);
      for (int s = 0; s < kSums; ++s)
        for (int l = 0; l < valid; ++l) tile.sums[s][c + l] += lanes[s][l];
    });
  }
}

template <typename T>
void bwd_reduce(const BwdReduceTile& tile) {
  with_gate(tile, [&](auto gate, auto dual) {
    tile.runs.per_lane ? bwd_reduce_rows<T, gate, dual>(tile)
                       : bwd_reduce_planes<T, gate, dual>(tile);
  });
}

}  // namespace fusedskip::cpu::FUSEDSKIP_ISA

// bwd_apply on one tile: dx and dresidual.

#pragma once

#include "gate.h"

namespace fusedskip::cpu::FUSEDSKIP_ISA {

// The gradient in front of a norm, of g behind it.
template <typename P, bool kPerLane, bool kTraining>
struct NormGradient {
  Coefficient<P, kPerLane> mean, scale, k2, k3;

  NormGradient(const Affine& affine, int64_t channel)
      : mean(affine.mean, channel),
        scale(affine.scale, channel),
        k2(affine.k2, channel),
        k3(affine.k3, channel) {}

  template <typename... N>
  P operator()(P g, P centred, int64_t i, N... n) const {
    if constexpr (!kTraining) return g * scale.at(i, n...);
    return fma(g, scale.at(i, n...), fma(centred, k2.at(i, n...), k3.at(i, n...)));
  }
};

template <typename T, bool kPerLane, Gate kGate, bool kDual, bool kTraining>
void bwd_apply_runs(const BwdApplyTile& tile) {
  const Runs runs = tile.runs;  // in registers: a store might change any memory
  using P = PackOf<T>;
  constexpr bool kReadsX = kTraining || kGate == Gate::kRecompute;
  for (int64_t run = 0; run < runs.count; ++run) {
    const int64_t offset = run * runs.stride, channel = run * runs.channel_stride;
    const Gated<T, kGate, kPerLane> gated(tile.affine, channel);
    const NormGradient<P, kPerLane, kTraining> gradient(tile.affine, channel),
        residual_gradient(tile.residual_affine, channel);
    const T* dout = static_cast<const T*>(tile.dout) + offset;
    const T* x = static_cast<const T*>(tile.x) + (kReadsX ? offset : 0);
    const T* residual = static_cast<const T*>(tile.residual) + (kDual ? offset : 0);
    const uint8_t* mask = kGate == Gate::kMask ? tile.mask + run * runs.mask_stride : nullptr;
    T* dx = tile.dx ? static_cast<T*>(tile.dx) + offset : nullptr;
    T* dresidual = tile.dresidual ? static_cast<T*>(tile.dresidual) + offset : nullptr;
    for_each_pack<P::kLanes>(runs.length, [&](int64_t i, auto... n) {
      if (!kPerLane && runs.prefetch && !runs.streams) {
        if (dx) prefetch<1>(dx + runs.prefetch + i);
        if (dresidual) prefetch<1>(dresidual + runs.prefetch + i);
      }
      P centred = P::broadcast(0);
      if constexpr (kReadsX) {
        if (kGate == Gate::kRecompute || dx) centred = load(x + i, n...) - gated.mean.at(i, n...);
      }
      // Without a norm of its own dresidual is g, stored as it was loaded: bwd_apply of bf16 out of
      // L1 takes 0.85 of the time without the conversion.
      P g;
      Stored<T> d;
      if constexpr (kGate == Gate::kRecompute) {
        g = gated(dout, centred, mask, i, n...);
        d = narrow<T>(g);
      } else {
        d = gated.stored(dout, mask, i, n...);
        if constexpr (kGate == Gate::kMask) mask += P::kMaskBytes;
        g = widen(d);
      }
      if (dresidual) {
        if constexpr (kDual) {
          P residual_centred = P::broadcast(0);
          if constexpr (kTraining)
            residual_centred = load(residual + i, n...) - residual_gradient.mean.at(i, n...);
          d = narrow<T>(residual_gradient(g, residual_centred, i, n...));
        }
        store_result(runs.streams, dresidual + i, d, n...);
      }
      if (dx) store_result(runs.streams, dx + i, narrow<T>(gradient(g, centred, i, n...)), n...);
    });
  }
  if (runs.streams) order_streams();
}

template <typename T>
void bwd_apply(const BwdApplyTile& tile) {
  with_flag(tile.runs.per_lane, [&](auto per_lane) {
    with_flag(tile.affine.k2 != nullptr, [&](auto training) {
      with_gate(tile, [&](auto gate, auto dual) {
        bwd_apply_runs<T, per_lane, gate, dual, training>(tile);
      });
    });
  });
}

}  // namespace fusedskip::cpu::FUSEDSKIP_ISA

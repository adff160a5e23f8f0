// apply on one tile: the sum of a tensor and a residual, either perhaps normalised, its ReLU, and
// the mask of that.

#pragma once

#include "runs.h"

namespace fusedskip::cpu::FUSEDSKIP_ISA {

// What is added up: nothing, a tensor as it is, or a tensor normalised.
enum class Term { kAbsent, kPlain, kNormalised };

template <typename T, Term kTerm, bool kPerLane>
struct TermOf {
  using P = PackOf<T>;
  Coefficient<P, kPerLane> mean, scale, bias;

  TermOf(const Affine& affine, int64_t channel)
      : mean(affine.mean, channel), scale(affine.scale, channel), bias(affine.bias, channel) {}

  template <typename... N>
  P operator()(const T* run, int64_t i, N... n) const {
    const P x = load(run + i, n...);
    if constexpr (kTerm == Term::kNormalised)
      return fma(x - mean.at(i, n...), scale.at(i, n...), bias.at(i, n...));
    return x;
  }
};

template <typename T, bool kPerLane, Term kX, Term kResidual, Relu kRelu>
void apply_runs(const ApplyTile& tile) {
  const Runs runs = tile.runs;  // in registers: a store might change any memory
  using P = PackOf<T>;
  constexpr bool kHasResidual = kResidual != Term::kAbsent;
  const P threshold = P::broadcast(kLargestStoredAsZero<T>);
  for (int64_t run = 0; run < runs.count; ++run) {
    const int64_t offset = run * runs.stride, channel = run * runs.channel_stride;
    const TermOf<T, kX, kPerLane> x_term(tile.affine, channel);
    const TermOf<T, kResidual, kPerLane> residual_term(tile.residual_affine, channel);
    const T* x = static_cast<const T*>(tile.x) + offset;
    const T* residual = static_cast<const T*>(tile.residual) + (kHasResidual ? offset : 0);
    T* out = static_cast<T*>(tile.out) + run * tile.out_stride;
    uint8_t* mask = tile.mask ? tile.mask + run * runs.mask_stride : nullptr;
    for_each_pack<P::kLanes>(runs.length, [&](int64_t i, auto... n) {
      const auto relu = [&](P a) {
        const Lanes<P> passed = exceeds(a, threshold);
        if (mask) store_mask<P::kMaskBytes>(mask, i, bits_of(passed), n...);
        return keep(a, passed);
      };
      if (!kPerLane && runs.prefetch) {
        if constexpr (kHasResidual) prefetch(residual + runs.prefetch + i);
        if (!runs.streams) prefetch<1>(out + runs.prefetch + i);
      }
      P y = x_term(x, i, n...);
      if constexpr (kRelu == Relu::kFirst) y = relu(y);
      if constexpr (kHasResidual) y = y + residual_term(residual, i, n...);
      if constexpr (kRelu == Relu::kLast) y = relu(y);
      store_result(runs.streams, out + i, narrow<T>(y), n...);
    });
  }
  if (runs.streams) order_streams();
}

template <typename T>
void apply(const ApplyTile& tile) {
  using enum Term;
  if (!tile.affine.mean)  // add_relu: a ReLU and a residual, and the layout does not matter
    return tile.relu == Relu::kFirst ? apply_runs<T, false, kPlain, kPlain, Relu::kFirst>(tile)
                                     : apply_runs<T, false, kPlain, kPlain, Relu::kLast>(tile);
  with_flag(tile.runs.per_lane, [&](auto per_lane) {
    if (tile.residual_affine.mean)
      return apply_runs<T, per_lane, kNormalised, kNormalised, Relu::kLast>(tile);
    with_flag(tile.residual != nullptr, [&](auto residual) {
      with_flag(tile.relu == Relu::kLast, [&](auto relu) {
        apply_runs<T, per_lane, kNormalised, residual ? kPlain : kAbsent,
                   relu ? Relu::kLast : Relu::kNone>(tile);
      });
    });
  });
}

}  // namespace fusedskip::cpu::FUSEDSKIP_ISA

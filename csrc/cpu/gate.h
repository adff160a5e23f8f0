// What the two backward stages share: how the gradient passes the ReLU.

#pragma once

#include "runs.h"

namespace fusedskip::cpu::FUSEDSKIP_ISA {

// The gradient behind the ReLU.
template <typename T, Gate kGate, bool kPerLane>
struct Gated {
  using P = PackOf<T>;
  Coefficient<P, kPerLane> mean, scale, bias;
  P threshold = P::broadcast(kLargestStoredAsZero<T>);

  explicit Gated(const Affine& affine, int64_t channel = 0)
      : mean(affine.mean, channel), scale(affine.scale, channel), bias(affine.bias, channel) {}

  // Of the lanes from element i of the run `dout` on, whose mask is `mask`. Those past the run's
  // end are 0.
  template <typename... N>
  P operator()(const T* dout, P centred, const uint8_t* mask, int64_t i, N... n) const {
    if constexpr (kGate == Gate::kRecompute) {
      const P y = fma(centred, scale.at(i, n...), bias.at(i, n...));
      return keep(widen(in_register(load_stored(dout + i, n...))), exceeds(y, threshold));
    }
    // Where nothing is stored a load may be masked: bwd_reduce of planes takes 0.95 of the time by
    // it, and of rows, which stores its sums, 1.2 to 1.8.
    if constexpr (kGate == Gate::kMask && !kPerLane)
      return widen(keep(load_stored(dout + i, n...), load_mask<P::kMaskBytes>(mask, n...)));
    return widen(stored(dout, mask, i, n...));
  }

  // The same as it lies in memory, where nothing is recomputed.
  template <typename... N>
  Stored<T> stored(const T* dout, const uint8_t* mask, int64_t i, N... n) const {
    if constexpr (kGate == Gate::kMask)
      return keep(in_register(load_stored(dout + i, n...)), load_mask<P::kMaskBytes>(mask, n...));
    return load_stored(dout + i, n...);
  }
};

// Calls body(gate, dual) with both as constants. Two norms always come with a mask.
template <typename Tile, typename Body>
inline void with_gate(const Tile& tile, Body body) {
  if (tile.residual) return body(std::integral_constant<Gate, Gate::kMask>(), std::true_type());
  switch (tile.gate) {
    case Gate::kNone:
      return body(std::integral_constant<Gate, Gate::kNone>(), std::false_type());
    case Gate::kMask:
      return body(std::integral_constant<Gate, Gate::kMask>(), std::false_type());
    case Gate::kRecompute:
      return body(std::integral_constant<Gate, Gate::kRecompute>(), std::false_type());
  }
}

}  // namespace fusedskip::cpu::FUSEDSKIP_ISA

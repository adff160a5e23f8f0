// One launch or two: as the same kind of GPU has measured it at the nearest shape. Plain C++, which
// tests/cuda_index.cpp tries on the host.

#pragma once

#include <cmath>
#include <cstdlib>
#include <limits>
#include <span>

#include "../args.h"

namespace fusedskip::cuda {

// What is added to a norm: nothing, a tensor, or another norm.
enum class Tail { kNothing, kTensor, kNorm };

// Passes that differ in more than their shape.
struct Pass {
  int architecture;  // 90 of sm_90
  bool backward;
  Tail tail;
  bool channels_last;
  int itemsize;

  bool operator==(const Pass&) const = default;
};

struct Measured {
  Pass pass;
  int64_t n_channels, n_positions;  // elements of a channel
  double speed;                     // of one launch, relative to two
};

constexpr Pass pass_of(const BatchNormForward& args, int architecture) {
  const Tail tail = args.residual_norm.present() ? Tail::kNorm
                    : args.residual              ? Tail::kTensor
                                                 : Tail::kNothing;
  return {architecture, false, tail, args.view.n_inner == 1, int(bytes(args.dtype))};
}

// Where nothing was added, the mask was not kept either.
constexpr Pass pass_of(const BatchNormBackward& args, int architecture) {
  const Tail tail = args.residual_norm.present() ? Tail::kNorm
                    : args.relu && !args.mask    ? Tail::kNothing
                                                 : Tail::kTensor;
  return {architecture, true, tail, args.view.n_inner == 1, int(bytes(args.dtype))};
}

// Near is by how many octaves channels and positions are apart. Two launches, where nobody has
// measured such a pass.
inline bool one_launch_is_faster(std::span<const Measured> measured, const Pass& pass,
                                 const View& view) {
  const auto octaves = [](int64_t a, int64_t b) { return std::abs(std::log2(double(a) / b)); };
  double nearest = std::numeric_limits<double>::infinity(), speed = 0;
  for (const Measured& m : measured) {
    if (m.pass != pass) continue;
    const double distance = octaves(m.n_channels, view.n_channels) +
                            octaves(m.n_positions, view.n_outer * view.n_inner);
    if (distance < nearest) nearest = distance, speed = m.speed;
  }
  return speed > 1;
}

}  // namespace fusedskip::cuda

// How an operation of two stages runs as one launch: the tensor is cut into blocks that the GPU
// holds all at once, and these keep in shared memory what fits of it. Forward then moves 3N + m
// instead of 4N + m, and backward 4N + m instead of 6N + 2m; of what does not fit, L2 may still
// have something.
//
// Three blocks an SM, as of the other kernels, have 69 KB each on an H100, beside what they
// declare. In 16 bits that is 17 rounds of one tensor, 26.7 MB in all: the whole of x at (64, 64,
// 56, 56), and a quarter at (64, 256, 56, 56).

#pragma once

#include "cooperative.cuh"
#include "dispatch.cuh"
#include "stages.h"

namespace fusedskip::cuda {

// Kernels of one launch exist where rows are whole octets, and for fp32 channels-first, as planes
// of 14x14 are, where they are accessed 16 bytes at a time.
template <typename Instance>
inline constexpr bool kHasOnChip =
    sizeof(typename Instance::T) < sizeof(double) &&
    (Instance::kWidth == kOctet ||
     (!Instance::kChannelsLast && Instance::kWidth * sizeof(typename Instance::T) == 16));

template <typename Kept, auto kKernel, int kBlocksAnSM>
std::optional<OnChip> plan_on_chip(const View& view) {
  const Room room = room_for<kKernel, kBlocksAnSM>();
  if (room.blocks == 0) return std::nullopt;
  const Tiling tiling(view, std::min<int64_t>(room.blocks, 128 * kBlocksAnSM));
  if (tiling.programs > 1 && tiling.programs * tiling.channel_blocks > room.blocks)
    return std::nullopt;
  return OnChip{tiling, std::min(room.shared_bytes / Kept::kBytesARound, tiling.rounds(0))};
}

}  // namespace fusedskip::cuda

// How an operation of two stages runs as one launch: its blocks wait for each other, and keep in
// shared memory and registers what fits of the tensor. Forward then moves 3N + m instead of 4N + m,
// and backward 4N + m instead of 6N + 2m; of what does not fit, L2 may still have something.
//
// Three blocks an SM, as of the other kernels, have 69 KB each on an H100, beside what they
// declare. In 16 bits that is 17 rounds of one tensor; four more are in registers as stats ends,
// and stay there: three blocks an SM leave 80 a thread, of which 78 were in use at other times. As
// one grid, all of it on the GPU at once, they keep 33 MB: the whole of x at (64, 64, 56, 56), and
// a third at (64, 256, 56, 56). A cluster of 16 keeps 690 000 elements of its channels, however
// many clusters there are: a channel of 200 704 channels-first at (64, 256, 56, 56), 32 channels of
// 12 544 channels-last at (64, 1024, 14, 14).

#pragma once

#include "cooperative.cuh"
#include "dispatch.cuh"
#include "kept.cuh"
#include "room.cuh"
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
  const int blocks = room.clusters[1];
  if (blocks == 0) return std::nullopt;
  const int in_shared = room.shared_bytes / Kept::kBytesARound;
  const auto beyond_registers = [](const Tiling& tiling) {
    return std::max(0, tiling.rounds(0) - Kept::kHeld);
  };
  if (const auto tiling = cluster_tiling(view, room.clusters, in_shared + Kept::kHeld))
    return OnChip{*tiling, beyond_registers(*tiling), /*in_clusters=*/tiling->programs > 1};
  const Tiling tiling(view, std::min(blocks, 128 * kBlocksAnSM));
  if (tiling.programs > 1 && tiling.programs * tiling.channel_blocks > blocks) return std::nullopt;
  return OnChip{tiling, std::min(in_shared, beyond_registers(tiling)), /*in_clusters=*/false};
}

template <typename Kept, auto kKernel, typename... Args>
cudaError_t launch_kernel_on_chip(const OnChip& plan, cudaStream_t stream, const Args&... args) {
  const unsigned programs = plan.tiling.programs;
  launched = plan.in_clusters ? "one launch, in clusters" : "one launch";
  cudaLaunchAttribute together{};
  if (plan.in_clusters) {
    together.id = cudaLaunchAttributeClusterDimension;
    together.val.clusterDim = {1, programs, 1};
  } else {
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = programs > 1;
  }
  return launch_with(together, plan.rounds * Kept::kBytesARound, kKernel,
                     dim3(plan.tiling.channel_blocks, programs), stream, plan, args...);
}

}  // namespace fusedskip::cuda

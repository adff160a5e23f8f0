// In the place of csrc/cuda/cooperative.cuh: a GPU that holds few blocks at once, and of them little,
// so that most tensors are kept in part.

#pragma once

#include "kept.cuh"

namespace fusedskip::cuda {

// As on a GPU, but for shared memory that a kernel declares: it does not outlast the wait.
inline void wait_for_programs(const Tiling& tiling) {
  tiling.programs == 1 ? emulator::sync_threads() : emulator::sync_grid();
}

struct Room {
  int blocks, shared_bytes;
};

// Backward, two tensors of fp32 are 16.25 KB a round.
template <auto kKernel, int kBlocksAnSM>
Room room_for() {
  return {4 * kBlocksAnSM, 20 << 10};
}

template <auto kKernel, typename... Args>
cudaError_t launch_together(const Tiling& tiling, int shared_bytes, cudaStream_t,
                            const Args&... args) {
  const dim3 grid(tiling.channel_blocks, tiling.programs);
  emulator::launch_together(grid, kThreads, shared_bytes, [&] { kKernel(args...); });
  return cudaSuccess;
}

}  // namespace fusedskip::cuda

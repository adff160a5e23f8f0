// One launch in the place of two: its blocks wait for each other, so that the GPU must hold all of
// them at once.

#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <mutex>

#include "kept.cuh"

namespace fusedskip::cuda {

// All threads must call it. What a program has written is then there for the others of its
// channels; a program alone has only its own threads to wait for.
__device__ inline void wait_for_programs(const Tiling& tiling) {
  if (tiling.programs == 1) {
    __syncthreads();
  } else {
    cooperative_groups::this_grid().sync();
  }
}

// What the current device has for a kernel of which every SM is to hold kBlocksAnSM blocks at once:
// that many blocks in all, each with so many bytes of shared memory beside what the kernel
// declares.
struct Room {
  int blocks = 0, shared_bytes = 0;
};

template <auto kKernel, int kBlocksAnSM>
Room find_room(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    cudaDeviceGetAttribute(&value, which, device);
    return value;
  };
  cudaFuncAttributes kernel;
  if (!attribute(cudaDevAttrCooperativeLaunch) ||
      cudaFuncGetAttributes(&kernel, reinterpret_cast<const void*>(kKernel)) != cudaSuccess)
    return {};
  const int of_block = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / kBlocksAnSM -
                       attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  const int shared_bytes = std::min(of_block, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) -
                           int(kernel.sharedSizeBytes);
  int blocks_an_sm = 0;
  if (shared_bytes <= 0 ||
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes) !=
          cudaSuccess ||
      cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                           cudaSharedmemCarveoutMaxShared) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_an_sm, kKernel, kThreads,
                                                    shared_bytes) != cudaSuccess)
    return {};
  return {blocks_an_sm * attribute(cudaDevAttrMultiProcessorCount), shared_bytes};
}

// Found once for each device.
template <auto kKernel, int kBlocksAnSM>
Room room_for() {
  constexpr int kMaxDevices = 64;
  static std::once_flag found[kMaxDevices];
  static Room rooms[kMaxDevices];
  int device;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return {};
  std::call_once(found[device], [&] { rooms[device] = find_room<kKernel, kBlocksAnSM>(device); });
  return rooms[device];
}

template <auto kKernel, typename... Args>
cudaError_t launch_together(const Tiling& tiling, int shared_bytes, cudaStream_t stream,
                            const Args&... args) {
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = tiling.programs > 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(tiling.channel_blocks, tiling.programs);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kKernel, args...);
}

}  // namespace fusedskip::cuda

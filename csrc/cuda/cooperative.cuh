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
  constexpr int kUnit = 256;  // in which shared memory is handed out, or a multiple of that
  const int of_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
            of_block = of_sm / kBlocksAnSM / kUnit * kUnit -
                       attribute(cudaDevAttrReservedSharedMemoryPerBlock),
            most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const auto succeeds = [](cudaError_t error) { return error == cudaSuccess; };
  cudaFuncAttributes kernel;
  int shared_bytes = 0, blocks_an_sm = 0;
  const bool has_room =
      attribute(cudaDevAttrCooperativeLaunch) &&
      succeeds(cudaFuncGetAttributes(&kernel, reinterpret_cast<const void*>(kKernel))) &&
      (shared_bytes = std::min(of_block, most) - int(kernel.sharedSizeBytes)) > 0 &&
      succeeds(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    shared_bytes)) &&
      succeeds(cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared)) &&
      succeeds(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_an_sm, kKernel, kThreads,
                                                             shared_bytes));
  if (!has_room) {
    cudaGetLastError();  // or the next launch would report it
    return {};
  }
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

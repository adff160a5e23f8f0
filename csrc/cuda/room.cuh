// What the current device has room for, of a kernel whose blocks wait for each other.

#pragma once

#include <cuda_runtime.h>

#include "index.h"
#include "launch.cuh"

namespace fusedskip::cuda {

// Blocks in all that a device holds at once, every SM kBlocksAnSM of them; the bytes of shared
// memory for each, beside what the kernel declares; and how many may be a cluster, or 1.
struct Room {
  int blocks = 0, shared_bytes = 0, cluster = 1;
};

template <auto kKernel, int kBlocksAnSM>
Room find_room(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    cudaDeviceGetAttribute(&value, which, device);
    return value;
  };
  const auto succeeds = [](cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it
    return error == cudaSuccess;
  };
  constexpr int kUnit = 256;  // in which shared memory is handed out, or a multiple of that
  const int of_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
            of_block = of_sm / kBlocksAnSM / kUnit * kUnit -
                       attribute(cudaDevAttrReservedSharedMemoryPerBlock),
            most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
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
  if (!has_room) return {};

  // More than eight blocks, which any device with clusters takes, are asked for by name.
  constexpr int kMaxCluster = 16;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1, kMaxCluster);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = shared_bytes;
  int cluster = 1;
  const bool has_clusters =
      attribute(cudaDevAttrClusterLaunch) &&
      kernel.ptxVersion >= 90 &&  // compiled for less, it cannot wait for its cluster
      succeeds(cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) &&
      succeeds(cudaOccupancyMaxPotentialClusterSize(&cluster, kKernel, &config));
  return {blocks_an_sm * attribute(cudaDevAttrMultiProcessorCount), shared_bytes,
          has_clusters ? std::min(cluster, kMaxCluster) : 1};
}

template <auto kKernel, int kBlocksAnSM>
Room room_for() {
  return once_a_device([](int device) { return find_room<kKernel, kBlocksAnSM>(device); });
}

}  // namespace fusedskip::cuda

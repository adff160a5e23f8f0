// What the current device has room for, of a kernel whose blocks wait for each other.

#pragma once

#include <cuda_runtime.h>

#include "index.h"
#include "launch.cuh"

namespace fusedskip::cuda {

// Bytes of shared memory for a block, beside what the kernel declares, where every SM holds
// kBlocksAnSM of them; and how many blocks and clusters of blocks the device then holds at once.
struct Room {
  int shared_bytes = 0;
  ClustersAtOnce clusters = {};
};

// 0 too where the device refuses clusters of this size.
template <auto kKernel>
int clusters_at_once(int size, int shared_bytes) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {1, unsigned(size), 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1, size);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  return succeeds(cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config)) ? clusters : 0;
}

template <auto kKernel, int kBlocksAnSM>
std::optional<Room> find_room(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    succeeds(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  if (!attribute(cudaDevAttrCooperativeLaunch)) return Room();
  cudaFuncAttributes kernel;
  if (!succeeds(cudaFuncGetAttributes(&kernel, reinterpret_cast<const void*>(kKernel))))
    return std::nullopt;
  constexpr int kUnit = 256;  // in which shared memory is handed out, or a multiple of that
  const int of_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
            of_block = of_sm / kBlocksAnSM / kUnit * kUnit -
                       attribute(cudaDevAttrReservedSharedMemoryPerBlock),
            most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  Room room;
  room.shared_bytes = std::min(of_block, most) - int(kernel.sharedSizeBytes);
  if (room.shared_bytes <= 0) return Room();
  int blocks_an_sm = 0;
  const bool has_room =
      succeeds(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    room.shared_bytes)) &&
      succeeds(cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared)) &&
      succeeds(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_an_sm, kKernel, kThreads,
                                                             room.shared_bytes));
  if (!has_room) return std::nullopt;
  room.clusters[1] = blocks_an_sm * attribute(cudaDevAttrMultiProcessorCount);

  // Compiled for less than sm_90, a kernel cannot wait for its cluster. More than eight blocks,
  // which any device with clusters takes, are asked for by name.
  if (attribute(cudaDevAttrClusterLaunch) && kernel.ptxVersion >= 90 &&
      succeeds(cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)))
    for (int size = 2; size <= kMaxCluster; ++size)
      room.clusters[size] = clusters_at_once<kKernel>(size, room.shared_bytes);
  return room;
}

template <auto kKernel, int kBlocksAnSM>
Room room_for() {
  return once_a_device([](int device) { return find_room<kKernel, kBlocksAnSM>(device); });
}

}  // namespace fusedskip::cuda

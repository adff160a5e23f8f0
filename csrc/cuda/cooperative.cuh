// How the programs of one launch wait for each other, and come by each other's partial results:
// those of a channel block, where they are a cluster, in shared memory; or else all of the grid,
// and in memory.

#pragma once

#include <cooperative_groups.h>

#include "channels.cuh"

namespace fusedskip::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
using cooperative_groups::this_cluster;
#else
// Clusters begin with sm_90; code for less is not launched as clusters.
struct NoCluster {
  __device__ void sync() const { __trap(); }
  __device__ void barrier_arrive() const {}
  __device__ void barrier_wait() const {}
  template <typename T>
  __device__ T* map_shared_rank(T* own, int) const {
    return own;
  }
};
__device__ inline NoCluster this_cluster() { return {}; }
#endif

// Up to kRows numbers a channel and program.
template <typename S, bool kChannelsLast, int kRows>
class PartialsOnChip : Partials<S> {
 public:
  using typename Partials<S>::Number;
  using Partials<S>::for_each_program;

  __device__ PartialsOnChip(const Partials<S>& in_memory, bool in_clusters)
      : Partials<S>(in_memory), in_clusters_(in_clusters) {
    __shared__ Shared own;
    own_ = &own;
  }

  template <int kSize>
  __device__ Array<S, kSize>& row(int which, int program, const Tiling& tiling,
                                  const Channels& channels) const {
    if (!in_clusters_) return Partials<S>::template row<kSize>(which, program, tiling, channels);
    S* first = of(program)->rows[which].values + kSize * tiling.column(threadIdx.x);
    return *reinterpret_cast<Array<S, kSize>*>(first);
  }
  __device__ S& count(int program, const Tiling& tiling) const {
    return in_clusters_ ? of(program)->count : Partials<S>::count(program, tiling);
  }

  // All threads must call it. What any program has left is then there for those of its channels.
  __device__ void wait_for_programs() const {
    if (this->programs == 1) {
      __syncthreads();
    } else if (in_clusters_) {
      this_cluster().sync();
    } else {
      cooperative_groups::this_grid().sync();
    }
  }

  // Clusters read each other's shared memory: no block may end before all have read. All threads
  // call wait_for_readers last.
  __device__ void have_been_read() const {
    if (in_clusters_) this_cluster().barrier_arrive();
  }
  __device__ void wait_for_readers() const {
    if (in_clusters_) this_cluster().barrier_wait();
  }

 private:
  struct Shared {
    BlockArray<S, kChannelsLast> rows[kRows];
    S count;
  };

  // A block's number in its cluster is that of its program.
  __device__ Shared* of(int program) const { return this_cluster().map_shared_rank(own_, program); }

  bool in_clusters_;
  Shared* own_;
};

}  // namespace fusedskip::cuda

// In the place of CUDA's: the barrier of all blocks, that of a cluster's, and what these share.

#pragma once

namespace cooperative_groups {

struct grid_group {
  void sync() const { emulator::sync_grid(); }
};

inline grid_group this_grid() { return {}; }

struct cluster_group {
  void sync() const { barrier_arrive(), barrier_wait(); }
  void barrier_arrive() const { emulator::arrive_at_cluster(); }
  void barrier_wait() const { emulator::wait_for_cluster(); }
  template <typename T>
  T* map_shared_rank(T* p, int rank) const {
    return static_cast<T*>(emulator::shared_of(p, rank));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups

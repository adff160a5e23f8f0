// The stages: each checks nothing, launches one kernel and returns what the launch did. They are
// four, and moments, which is in the place of apply where a batch is spread over ranks.
// Workspace holds the partial results that pass from the first stage of a pair to the second.

#pragma once

#include <cuda_runtime_api.h>

#include <optional>

#include "index.h"

namespace fusedskip::cuda {

// The residual may have a norm of its own.
template <typename Args>
constexpr int norm_count(const Args& args) {
  return args.residual_norm.present() ? 2 : 1;
}

// residual is null where it has no norm.
cudaError_t stats(const View&, Dtype, const void* x, const void* residual, void* workspace,
                  cudaStream_t);
cudaError_t moments(const BatchNormStats&, void* workspace, cudaStream_t);
cudaError_t apply(const BatchNormForward&, void* workspace, cudaStream_t);
cudaError_t bwd_reduce(const BatchNormBackward&, void* workspace, cudaStream_t);
cudaError_t bwd_apply(const BatchNormBackward&, void* workspace, cudaStream_t);

// Both stages in one launch, in which blocks keep `rounds` of what the second needs again. The
// programs of a channel block wait for each other: as a cluster, or else with the whole grid.
struct OnChip {
  Tiling tiling;
  int rounds;
  bool in_clusters;

  // Clusters have theirs in shared memory.
  int64_t workspace_size(int norms) const { return in_clusters ? 0 : tiling.workspace_size(norms); }
};

// Nothing where the current device cannot hold at once all blocks that wait for each other.
std::optional<OnChip> plan_on_chip(const BatchNormForward&);
std::optional<OnChip> plan_on_chip(const BatchNormBackward&);
cudaError_t launch_on_chip(const BatchNormForward&, const OnChip&, void* workspace, cudaStream_t);
cudaError_t launch_on_chip(const BatchNormBackward&, const OnChip&, void* workspace, cudaStream_t);

}  // namespace fusedskip::cuda

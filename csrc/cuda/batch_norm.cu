// An operation is two launches at most: a stage that reduces, if anything is to be reduced, and one
// that finishes the sums channel by channel and goes through the elements again.

#include "batch_norm.h"
#include "stages.h"

namespace fusedskip::cuda {

int64_t workspace_size(const BatchNormForward& args) {
  const int norms = norm_count(args);
  return args.training ? stats_tiling(args.view, norms).workspace_size(norms) : 0;
}

int64_t workspace_size(const BatchNormBackward& args) {
  const int norms = norm_count(args);
  return args.reduces() ? stage_tiling(args.view, norms).workspace_size(norms) : 0;
}

cudaError_t batch_norm(const BatchNormForward& args, void* workspace, cudaStream_t stream) {
  if (args.training) {
    const cudaError_t error = stats(args, workspace, stream);
    if (error != cudaSuccess) return error;
  }
  return apply(args, workspace, stream);
}

cudaError_t batch_norm_backward(const BatchNormBackward& args, void* workspace,
                                cudaStream_t stream) {
  if (args.reduces()) {
    const cudaError_t error = bwd_reduce(args, workspace, stream);
    if (error != cudaSuccess) return error;
  }
  return args.reduces() || args.dx || args.dresidual ? bwd_apply(args, workspace, stream)
                                                     : cudaSuccess;
}

}  // namespace fusedskip::cuda

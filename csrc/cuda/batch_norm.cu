// An operation is two launches at most: a stage that reduces, if anything is to be reduced, and one
// that finishes the sums channel by channel and goes through the elements again.

#include "batch_norm.h"
#include "stages.h"

namespace fusedskip::cuda {

int64_t workspace_size(const View& view) { return Tiling(view).workspace_size(); }

cudaError_t batch_norm(const BatchNormForward& args, void* workspace, cudaStream_t stream) {
  const Tiling tiling(args.view);
  if (args.training) {
    const cudaError_t error = stats(args, tiling, workspace, stream);
    if (error != cudaSuccess) return error;
  }
  return apply(args, tiling, workspace, stream);
}

cudaError_t batch_norm_backward(const BatchNormBackward& args, void* workspace,
                                cudaStream_t stream) {
  const Tiling tiling(args.view);
  if (args.reduces()) {
    const cudaError_t error = bwd_reduce(args, tiling, workspace, stream);
    if (error != cudaSuccess) return error;
  }
  return args.reduces() || args.dx || args.dresidual ? bwd_apply(args, tiling, workspace, stream)
                                                     : cudaSuccess;
}

}  // namespace fusedskip::cuda

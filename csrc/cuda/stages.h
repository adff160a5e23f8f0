// The four stages: each checks nothing, launches one kernel and returns what the launch did.
// Workspace holds the partial results that pass from the first stage of a pair to the second.

#pragma once

#include <cuda_runtime_api.h>

#include "index.h"

namespace fusedskip::cuda {

// The residual may have a norm of its own.
template <typename Args>
constexpr int norm_count(const Args& args) {
  return args.residual_norm.present() ? 2 : 1;
}

cudaError_t stats(const BatchNormForward&, void* workspace, cudaStream_t);
cudaError_t apply(const BatchNormForward&, void* workspace, cudaStream_t);
cudaError_t bwd_reduce(const BatchNormBackward&, void* workspace, cudaStream_t);
cudaError_t bwd_apply(const BatchNormBackward&, void* workspace, cudaStream_t);

}  // namespace fusedskip::cuda

// The four stages: each checks nothing, launches one kernel and returns what the launch did.
// Workspace holds the partial results that pass from the first stage of a pair to the second.

#pragma once

#include <cuda_runtime_api.h>

#include "index.h"

namespace fusedskip::cuda {

cudaError_t stats(const BatchNormForward&, const Tiling&, void* workspace, cudaStream_t);
cudaError_t apply(const BatchNormForward&, const Tiling&, void* workspace, cudaStream_t);
cudaError_t bwd_reduce(const BatchNormBackward&, const Tiling&, void* workspace, cudaStream_t);
cudaError_t bwd_apply(const BatchNormBackward&, const Tiling&, void* workspace, cudaStream_t);

}  // namespace fusedskip::cuda

// The operations on whole tensors: what csrc/bindings calls. Checked arguments, allocated results.
// Every call launches on `stream` alone and waits for nothing.

#pragma once

#include <cuda_runtime_api.h>

#include "../args.h"

namespace fusedskip::cuda {

// Whether operations of two stages may be one launch where the device has room for that: not yet
// the default, because no GPU has measured it. Not to be changed while a call is going on. Returns
// what held before.
bool allow_on_chip(bool);

// The numbers, in statistics precision, that an operation needs for partial results; where it is 0,
// workspace may be null.
int64_t workspace_size(const BatchNormForward&);
int64_t workspace_size(const BatchNormBackward&);
int64_t workspace_size(const BatchNormStats&);

cudaError_t batch_norm(const BatchNormForward&, void* workspace, cudaStream_t stream);
cudaError_t batch_norm_backward(const BatchNormBackward&, void* workspace, cudaStream_t stream);
cudaError_t batch_norm_stats(const BatchNormStats&, void* workspace, cudaStream_t stream);
cudaError_t batch_norm_merge(const BatchNormMerge&, cudaStream_t stream);

// out = relu(x + residual), or relu(x) + residual, over `numel` elements in memory order, and the
// gradient of what ReLU was given.
cudaError_t add_relu(Dtype, int64_t numel, bool relu_first, const void* x, const void* residual,
                     void* out, uint8_t* mask, cudaStream_t stream);
cudaError_t add_relu_backward(Dtype, int64_t numel, const void* dout, const uint8_t* mask, void* dx,
                              cudaStream_t stream);

}  // namespace fusedskip::cuda

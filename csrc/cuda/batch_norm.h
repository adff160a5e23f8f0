// The operations on whole tensors: what csrc/bindings calls. Checked arguments, allocated results.
// Every call launches on `stream` alone and waits for nothing.

#pragma once

#include <cuda_runtime_api.h>

#include <functional>

#include "../args.h"

namespace fusedskip::cuda {

// Whether operations of two stages are two launches, or one where the device has room for that: the
// default is what has been measured to be faster (measured.h). Not to be changed while a call is
// going on. Returns what held before.
enum class Launches { kMeasured = 0, kOne = 1, kTwo = 2 };
Launches set_launches(Launches);

// What that came to in the last such operation, in words: for tests and benchmarks to see.
const char* last_launched();

// What keeps the current device from running the kernels: cudaErrorNoKernelImageForDevice, where
// they were compiled for others.
cudaError_t find_kernels();

// Gives an operation memory for partial results, of so many numbers in statistics precision, until
// what it has launched is done; or until the next call, if it asks again.
using Allocate = std::function<void*(int64_t numbers)>;

cudaError_t batch_norm(const BatchNormForward&, const Allocate&, cudaStream_t stream);
cudaError_t batch_norm_backward(const BatchNormBackward&, const Allocate&, cudaStream_t stream);
cudaError_t batch_norm_stats(const BatchNormStats&, const Allocate&, cudaStream_t stream);
cudaError_t batch_norm_merge(const BatchNormMerge&, cudaStream_t stream);

// out = relu(x + residual), or relu(x) + residual, over `numel` elements in memory order, and the
// gradient of what ReLU was given.
cudaError_t add_relu(Dtype, int64_t numel, bool relu_first, const void* x, const void* residual,
                     void* out, uint8_t* mask, cudaStream_t stream);
cudaError_t add_relu_backward(Dtype, int64_t numel, const void* dout, const uint8_t* mask, void* dx,
                              cudaStream_t stream);

}  // namespace fusedskip::cuda

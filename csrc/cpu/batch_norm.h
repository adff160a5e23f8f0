// The operations on whole tensors: what csrc/bindings calls. Checked arguments, allocated results.

#pragma once

#include <cstdint>

#include "../args.h"

namespace fusedskip::cpu {

void batch_norm(const BatchNormForward&);
void batch_norm_backward(const BatchNormBackward&);
void batch_norm_stats(const BatchNormStats&);
void batch_norm_merge(const BatchNormMerge&);

// out = relu(x + residual), or relu(x) + residual, over `numel` elements in memory order, and the
// gradient of what ReLU was given.
void add_relu(Dtype, int64_t numel, bool relu_first, const void* x, const void* residual, void* out,
              uint8_t* mask);
void add_relu_backward(Dtype, int64_t numel, const void* dout, const uint8_t* mask, void* dx);

// The instruction set that was chosen for this processor: "avx512", "avx2" or "baseline".
const char* instruction_set();

}  // namespace fusedskip::cpu

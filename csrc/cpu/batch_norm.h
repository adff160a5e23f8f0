// The operations on whole tensors: what csrc/bindings calls. Checked arguments, allocated results.

#pragma once

#include <cstdint>

#include "kernels.h"

namespace fusedskip::cpu {

// A dense tensor as its memory lies: (N, C, spatial), or (N * spatial, C, 1) channels-last.
struct View {
  int64_t n_outer, n_channels, n_inner;

  int64_t n_rows() const { return n_inner == 1 ? n_outer : n_outer * n_channels; }
  int64_t row_length() const { return n_inner == 1 ? n_channels : n_inner; }
  int64_t mask_row_bytes() const { return (row_length() + 7) / 8; }
};

// A vector of one number a channel, of its own dtype; absent when data is null.
struct ChannelVector {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;

  double get(int64_t c, double absent) const;
  void set(int64_t c, double value) const;
};

struct BatchNormForward {
  View view;
  Dtype dtype;
  const void *x, *residual;  // residual or null
  ChannelVector weight, bias, running_mean, running_var;
  bool training, relu;
  double momentum, eps;
  void* out;
  uint8_t* mask;             // or null
  ChannelVector mean, rstd;  // results, in statistics precision
};

struct BatchNormBackward {
  View view;
  Dtype dtype;
  const void *dout, *x;
  const uint8_t* mask;  // or null
  ChannelVector weight, bias, mean, rstd;
  bool training, relu;
  void *dx, *dresidual;          // or null
  ChannelVector dweight, dbias;  // or absent
  bool need_dparams;
};

void batch_norm(const BatchNormForward&);
void batch_norm_backward(const BatchNormBackward&);

// out = relu(x + residual) and its gradient over `numel` elements in memory order.
void add_relu(Dtype, int64_t numel, const void* x, const void* residual, void* out, uint8_t* mask);
void add_relu_backward(Dtype, int64_t numel, const void* dout, const uint8_t* mask, void* dx);

// The instruction set that was chosen for this processor: "avx512", "avx2" or "baseline".
const char* instruction_set();

}  // namespace fusedskip::cpu

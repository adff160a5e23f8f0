// What an operation is given, on any device: sizes, raw pointers, flags. csrc/bindings fills it in.

#pragma once

#include <cstdint>

namespace fusedskip {

enum class Dtype { kFloat64, kFloat32, kBFloat16, kFloat16 };
inline constexpr int kDtypes = 4;

constexpr int64_t bytes(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A dense tensor as its memory lies: (N, C, spatial), or (N * spatial, C, 1) channels-last.
struct View {
  int64_t n_outer, n_channels, n_inner;

  constexpr int64_t n_rows() const { return n_inner == 1 ? n_outer : n_outer * n_channels; }
  constexpr int64_t row_length() const { return n_inner == 1 ? n_channels : n_inner; }
  constexpr int64_t mask_row_bytes() const { return ceil_div(row_length(), 8); }
};

// A vector of one number a channel, of its own dtype; absent when data is null.
struct ChannelVector {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
};

// One batch norm: what it is given, and the statistics of this call, which forward fills in.
struct Norm {
  ChannelVector weight, bias, running_mean, running_var;
  ChannelVector mean, rstd;  // in statistics precision; absent where nothing is normalised
  double momentum = 0, eps = 0;

  constexpr bool present() const { return mean.data != nullptr; }
};

// out = relu(norm(x) + residual), the residual absent, a tensor, or, with residual_norm, what that
// is to normalise; then relu is set.
struct BatchNormForward {
  View view;
  Dtype dtype;
  const void* x;
  const void* residual = nullptr;
  Norm norm, residual_norm;  // residual_norm may be absent
  bool training, relu;
  void* out;
  int64_t out_pitch;  // in elements, from one outer index to the next; out may be part of a tensor
  uint8_t* mask = nullptr;
};

// What a rank has of a batch: of each channel of x the mean, then of each M2 = Σ(x - mean)², then
// the number of elements a channel. These moments are in statistics precision.
struct BatchNormStats {
  View view;
  Dtype dtype;
  const void* x;
  void* moments;
};

// The statistics of a batch from the moments of its parts, a row from each rank, zeros where a rank
// has no elements.
struct BatchNormMerge {
  int64_t n_ranks, n_channels;
  Dtype dtype;  // of the moments and of all results
  const void* moments;
  ChannelVector running_mean, running_var;  // or absent
  double momentum;
  void *mean, *var;  // biased
  void* count;       // one number: the elements of a channel
};

struct BatchNormBackward {
  View view;
  Dtype dtype;
  const void *dout, *x;
  const void* residual = nullptr;  // what residual_norm normalised; null if that is absent
  const uint8_t* mask = nullptr;   // there with residual_norm
  Norm norm, residual_norm;
  // In training, where x is a part of the batch: over the whole of it, the mean of g of each
  // channel, then of each that of g·x̂. In statistics precision, or null; not with residual_norm.
  const void* means = nullptr;
  bool training, relu;
  void *dx, *dresidual;          // or null
  ChannelVector dweight, dbias;  // or absent
  ChannelVector residual_dweight, residual_dbias;

  // Σg and Σg·x̂ are gradients of their own, and in training every element of dx needs them; with
  // residual_norm, so does every element of dresidual.
  constexpr bool reduces() const {
    const bool needs_means = training && (dx || (residual_norm.present() && dresidual));
    return dweight.data || dbias.data || residual_dweight.data || residual_dbias.data ||
           (needs_means && !means);
  }
};

}  // namespace fusedskip

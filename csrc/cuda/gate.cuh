// What the two backward stages share: the coefficients that forward used, and the gradient behind
// the ReLU.

#pragma once

#include "channels.cuh"

namespace fusedskip::cuda {

// Bitwise forward's, from the mean and rstd that it returned.
template <typename S, int kSize>
__device__ Affine<S, kSize> saved_affine(const BatchNormBackward& args, const Channels& channels) {
  Array<S, kSize> mean = {}, rstd = {};
  load_channels(mean, static_cast<const S*>(args.mean.data), channels);
  load_channels(rstd, static_cast<const S*>(args.rstd.data), channels);
  return affine_of(mean, rstd, args.weight, args.bias, channels);
}

template <typename S>
struct Gradient {
  Array<S, kOctet> g;        // dout where forward's ReLU passed, else 0
  Array<S, kOctet> centred;  // x - mean
};

// An octet of dout and of x, and how the gradient passes the ReLU: by the sign of the output,
// computed once more from x, by the saved bits, or freely where there are none.
template <typename T, int kWidth, bool kRecompute>
struct GatedOctet {
  using S = StatisticsOf<T>;
  Octet<T> dout, x;
  uint32_t bits;

  __device__ void read(const BatchNormBackward& args, const Place& place, bool reads_x) {
    dout = load<kWidth>(static_cast<const T*>(args.dout), place);
    x = {};
    if (kRecompute || reads_x) x = load<kWidth>(static_cast<const T*>(args.x), place);
    bits = 0xff;
    if (!kRecompute && args.relu && place.elements > 0)
      bits = args.mask[mask_offset<kWidth>(place)];
  }

  template <int kSize>
  __device__ Gradient<S> gradient(const Affine<S, kSize>& affine) const {
    Gradient<S> result{widen<T>(dout), widen<T>(x)};
    uint32_t passes = bits;
    if constexpr (kRecompute) {
      Array<S, kOctet> y;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) y[i] = affine(result.centred[i], i);
      passes = relu_passes<T>(y);
    }
    result.g = keep(result.g, passes);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) result.centred[i] -= affine.mean[i % kSize];
    return result;
  }
};

// Σg and Σg·(x - mean), of a part of a channel or of all of it.
template <typename S, int kSize>
struct GradientSums {
  Array<S, kSize> g, gx;
};

// One call of block_sum for both: its barriers cost more than its additions.
template <typename S, int kSize>
__device__ void block_sum(GradientSums<S, kSize>& sums, int columns) {
  Array<S, 2 * kSize> both;
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    both[j] = sums.g[j];
    both[kSize + j] = sums.gx[j];
  }
  block_sum(both, columns);
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    sums.g[j] = both[j];
    sums.gx[j] = both[kSize + j];
  }
}

}  // namespace fusedskip::cuda

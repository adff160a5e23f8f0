// The numbers of a channel: parameters of either dtype, sums over a block, partial results of the
// programs. A thread holds those of its own channels: eight channels-last, one channels-first.

#pragma once

#include "octet.cuh"

namespace fusedskip::cuda {

template <bool kChannelsLast>
inline constexpr int kLanes = kChannelsLast ? kOctet : 1;

// From an array of T, in the order of a thread's lanes. Lanes without a channel keep their values.
template <typename S, int kSize, typename T>
__device__ void load_channels(Array<S, kSize>& values, const T* data, const Channels& channels) {
#pragma unroll
  for (int j = 0; j < kSize; ++j)
    if (j < channels.count) values[j] = S(data[channels.first + j]);
}

template <typename S, int kSize, typename T>
__device__ void store_channels(T* data, const Array<S, kSize>& values, const Channels& channels) {
#pragma unroll
  for (int j = 0; j < kSize; ++j)
    if (j < channels.count) data[channels.first + j] = T(values[j]);
}

// From a vector of its own dtype, S or one of 16 bits: one branch for all lanes.
template <typename S, int kSize>
__device__ void load_channels(Array<S, kSize>& values, const ChannelVector& vector,
                              const Channels& channels, S absent) {
#pragma unroll
  for (int j = 0; j < kSize; ++j) values[j] = absent;
  if (!vector.data) return;
  if (bytes(vector.dtype) == sizeof(S)) {
    load_channels(values, static_cast<const S*>(vector.data), channels);
  } else {
    Array<uint16_t, kSize> bits = {};
    load_channels(bits, static_cast<const uint16_t*>(vector.data), channels);
    const bool bfloat16 = vector.dtype == Dtype::kBFloat16;
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      values[j] = bfloat16 ? __uint_as_float(uint32_t{bits[j]} << 16)
                           : __half2float(__ushort_as_half(bits[j]));
  }
}

template <typename S, int kSize>
__device__ void store_channels(const ChannelVector& vector, const Array<S, kSize>& values,
                               const Channels& channels) {
  if (!vector.data) return;
  if (bytes(vector.dtype) == sizeof(S)) {
    store_channels(static_cast<S*>(vector.data), values, channels);
  } else {
    Array<uint16_t, kSize> bits;
    const bool bfloat16 = vector.dtype == Dtype::kBFloat16;
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      bits[j] = bfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(values[j]))
                         : __half_as_ushort(__float2half_rn(values[j]));
    store_channels(static_cast<uint16_t*>(vector.data), bits, channels);
  }
}

// y = (x - mean)·scale + bias, in this form: with mean >> std, the constant of scale·x + constant
// would cancel nearly all of it. Backward recomputes forward's threshold from it bit for bit.
template <typename S, int kSize>
struct Affine {
  Array<S, kSize> mean, scale, bias;

  __device__ S operator()(S x, int i) const {
    return fma_rn(x - mean[i % kSize], scale[i % kSize], bias[i % kSize]);
  }
};

// The affine map of a thread's channels, its mean and rstd given.
template <typename S, int kSize>
__device__ Affine<S, kSize> affine_of(const Array<S, kSize>& mean, const Array<S, kSize>& rstd,
                                      const ChannelVector& weight, const ChannelVector& bias,
                                      const Channels& channels) {
  Affine<S, kSize> affine{mean};
  load_channels(affine.scale, weight, channels, S(1));
  load_channels(affine.bias, bias, channels, S(0));
#pragma unroll
  for (int j = 0; j < kSize; ++j) affine.scale[j] *= rstd[j];
  return affine;
}

// Replaces values by their sums over the threads of a column, in an order that never changes: over
// a warp by halves, then over the warps from first to last. All threads of the block must call it.
template <typename S, int kSize>
__device__ void block_sum(Array<S, kSize>& values, int columns) {
  constexpr int kWarps = kThreads / 32;
  __shared__ S warp_sums[kWarps][kSize * kMaxColumns];
  __shared__ S sums[kSize * kMaxColumns];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int distance = 16; distance >= columns; distance /= 2) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) values[j] += __shfl_xor_sync(~0u, values[j], distance);
  }
  if (lane < columns) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) warp_sums[warp][j * columns + lane] = values[j];
  }
  __syncthreads();
  if (threadIdx.x < kSize * columns) {
    S sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += warp_sums[w][threadIdx.x];
    sums[threadIdx.x] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kSize; ++j) values[j] = sums[j * columns + threadIdx.x % columns];
}
static_assert(2 * kOctet * kMaxColumns <= kThreads, "block_sum gives every sum a thread");

// What the first stage of a pair leaves to the second: two numbers for each program and channel,
// and of stats the elements that the programs saw of each channel of theirs.
template <typename S>
struct Partials {
  S *first, *second, *counts;

  Partials(void* workspace, const Tiling& tiling)
      : first(static_cast<S*>(workspace)),
        second(first + tiling.programs * tiling.pitch()),
        counts(second + tiling.programs * tiling.pitch()) {}
};

// The numbers of a thread's channels in row `program` of partial results.
template <int kSize, typename S>
__device__ Array<S, kSize>& partial_row(S* rows, const Tiling& tiling, int64_t program,
                                        const Channels& channels) {
  return *reinterpret_cast<Array<S, kSize>*>(rows + program * tiling.pitch() + channels.first);
}

// Calls body(program) for all programs: the threads of a column share them.
template <typename Body>
__device__ void for_each_program(const Tiling& tiling, const Channels& channels, Body body) {
  if (channels.count == 0) return;
  for (int program = threadIdx.x / tiling.columns; program < tiling.programs;
       program += tiling.depth())
    body(program);
}

}  // namespace fusedskip::cuda

// Mean and M2 = Σ(x - mean)² of a channel, in parts and as a whole.
//
// Parts give their means relative to the first element of the channel, its origin: with
// mean >> std, absolute means would be rounded by more than they differ.

#pragma once

#include "channels.cuh"

namespace fusedskip::cuda {

// A point that can be subtracted: about an infinite one, the mean of ±Inf would be NaN.
template <typename S>
__device__ S finite_or_zero(S x) {
  return abs(x) < S(INFINITY) ? x : S(0);
}

// The first element of a channel.
template <typename T>
__device__ StatisticsOf<T> origin_of(const T* x, const Tiling& tiling, int64_t channel) {
  return finite_or_zero(widen_element(x[channel * tiling.view.n_inner]));
}

// Of one channel of every norm's tensor.
template <typename S, int kNorms>
struct Moments {
  S mean[kNorms], m2[kNorms];
};

// Mean (relative to the origin) and M2 of whole channels from those of the programs: Chan's
// formula, for all at once. Returns those of the thread's own channel.
template <int kSize, int kNorms, typename Parts, typename S = typename Parts::Number>
__device__ Moments<S, kNorms> merge_moments(const Tiling& tiling, const Parts& partials,
                                            const Channels& channels) {
  const int columns = tiling.columns, row = kSize * columns;
  const S per_element = 1 / S(tiling.view.n_outer * tiling.view.n_inner);
  Moments<S, kNorms> whole = {};
  Array<S, kSize> mean[kNorms] = {}, m2[kNorms] = {};
  partials.for_each_program(tiling, channels, [&](int program) {
#pragma unroll
    for (int k = 0; k < kNorms; ++k) {
      const auto part = partials.template row<kSize>(2 * k, program, tiling, channels);
#pragma unroll
      for (int j = 0; j < kSize; ++j) mean[k][j] += partials.count(program, tiling) * part[j];
    }
  });
  const S* sums = block_sum(mean, columns);
#pragma unroll
  for (int k = 0; k < kNorms; ++k) {
    mean[k] = lanes_of<kSize>(sums + k * row, columns);
#pragma unroll
    for (int j = 0; j < kSize; ++j) mean[k][j] *= per_element;
    if (threadIdx.x < row) whole.mean[k] = sums[k * row + threadIdx.x] * per_element;
  }
  partials.for_each_program(tiling, channels, [&](int program) {
#pragma unroll
    for (int k = 0; k < kNorms; ++k) {
      const auto part_mean = partials.template row<kSize>(2 * k, program, tiling, channels);
      const auto part_m2 = partials.template row<kSize>(2 * k + 1, program, tiling, channels);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const S deviation = part_mean[j] - mean[k][j];
        m2[k][j] += part_m2[j] + partials.count(program, tiling) * deviation * deviation;
      }
    }
  });
  sums = block_sum(m2, columns);
#pragma unroll
  for (int k = 0; k < kNorms; ++k)
    if (threadIdx.x < row) whole.m2[k] = sums[k * row + threadIdx.x];
  return whole;
}

}  // namespace fusedskip::cuda

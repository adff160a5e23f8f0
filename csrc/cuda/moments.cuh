// Mean and M2 = Σ(x - mean)² of a channel, in parts and as a whole.
//
// Parts give their means relative to the first element of the channel, its origin: with
// mean >> std, absolute means would be rounded by more than they differ.

#pragma once

#include "channels.cuh"

namespace fusedskip::cuda {

template <typename S, int kSize>
struct Moments {
  Array<S, kSize> mean, m2;
};

// A point that can be subtracted: about an infinite one, the mean of ±Inf would be NaN.
template <typename S>
__device__ S finite_or_zero(S x) {
  return abs(x) < S(INFINITY) ? x : S(0);
}

// The first elements of a thread's channels.
template <int kSize, int kWidth, typename T>
__device__ auto load_origin(const T* x, const Tiling& tiling, const Channels& channels) {
  const Place place{channels.first * tiling.view.n_inner, 0, channels.count};
  const auto values = widen<T>(load<kWidth>(x, place));
  Array<StatisticsOf<T>, kSize> origin;
#pragma unroll
  for (int j = 0; j < kSize; ++j) origin[j] = finite_or_zero(values[j]);
  return origin;
}

// Mean (relative to the origin) and M2 of whole channels from those of the programs: Chan's
// formula, for all at once.
template <typename S, int kSize>
__device__ Moments<S, kSize> merge_moments(const Tiling& tiling, const Partials<S>& partials,
                                           const Channels& channels) {
  const S n_elements = S(tiling.view.n_outer * tiling.view.n_inner);
  const auto count = [&](int program) {
    return partials.counts[program * tiling.channel_blocks + blockIdx.x];
  };
  Moments<S, kSize> whole = {};
  for_each_program(tiling, channels, [&](int program) {
    const auto mean = partial_row<kSize>(partials.first, tiling, program, channels);
#pragma unroll
    for (int j = 0; j < kSize; ++j) whole.mean[j] += count(program) * mean[j];
  });
  block_sum(whole.mean, tiling.columns);
#pragma unroll
  for (int j = 0; j < kSize; ++j) whole.mean[j] *= 1 / n_elements;
  for_each_program(tiling, channels, [&](int program) {
    const auto mean = partial_row<kSize>(partials.first, tiling, program, channels);
    const auto m2 = partial_row<kSize>(partials.second, tiling, program, channels);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const S deviation = mean[j] - whole.mean[j];
      whole.m2[j] += m2[j] + count(program) * deviation * deviation;
    }
  });
  block_sum(whole.m2, tiling.columns);
  return whole;
}

}  // namespace fusedskip::cuda

// stats: x → mean and M2 of a program's part of each channel. Reads x: N.
//
// A thread holds pivot, Σ(x - pivot) and Σ(x - pivot)² of its channels. The pivot is its own first
// element: being one of them it is no further from their mean than sqrt(M2), so that taking
// n·(mean - pivot)² off the squares in the end costs at most log2(n + 1) bits, n being hundreds,
// whatever the data. Then the threads of a block are merged by Chan's formula, all at once.

#pragma once

#include "kept.cuh"
#include "moments.cuh"

namespace fusedskip::cuda {

// Rounds in flight at once.
template <typename T>
inline constexpr int kStatsBatch = kInFlight<T, 1>;

// Of the tensor of norm number `norm`.
template <bool kChannelsLast, int kWidth, typename T, typename Parts, typename Kept,
          typename S = StatisticsOf<T>>
__device__ void stats_of_program(const Tiling& tiling, const T* tensor, int norm,
                                 const Parts& partials, Kept& kept) {
  constexpr int kSize = kLanes<kChannelsLast>;
  constexpr int kUnroll = kStatsBatch<T>;
  const Channels channels = tiling.channels(blockIdx.x, threadIdx.x);
  Array<S, kSize> origin = {};
#pragma unroll
  for (int j = 0; j < kSize; ++j)
    if (j < channels.count) origin[j] = origin_of(tensor, tiling, channels.first + j);

  Array<S, kSize> pivot = {}, sum = {}, squares = {};
  int count = 0;
  static_assert(Kept::kHeld == 0 || Kept::kHeld == kUnroll);
  Walk<kChannelsLast, kWidth, /*kBackwards=*/false, Kept::kHeld> walk(tiling, blockIdx.x,
                                                                      blockIdx.y, threadIdx.x);
  while (!walk.done()) {
    const int round = walk.round();
    Place places[kUnroll];
    Octet<T> octets[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      places[u] = walk.next();
      octets[u] = load<kWidth>(tensor, places[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      kept.put(round + u, u, norm, octets[u]);
      const auto values = widen<T>(octets[u]);
      if (round + u == 0) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) pivot[j] = finite_or_zero(values[j]);
      }
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const S deviation = exists<kWidth>(places[u], i) ? values[i] - pivot[i % kSize] : S(0);
        sum[i % kSize] += deviation;
        squares[i % kSize] = fma_rn(deviation, deviation, squares[i % kSize]);
      }
      count += kChannelsLast ? places[u].elements > 0 : places[u].elements;
    }
  }

  // With the count of the block, which all its channels share, as one more number to add up.
  const S n = S(count), per_element = count > 0 ? 1 / n : S(0);
  Array<S, kSize + 1> parts[1];
#pragma unroll
  for (int j = 0; j < kSize; ++j) parts[0][j] = fma_rn(n, pivot[j] - origin[j], sum[j]);
  parts[0][kSize] = n;
  const auto totals = lanes_of<kSize + 1>(block_sum(parts, tiling.columns), tiling.columns);
  const S per_element_of_block = 1 / totals[kSize];
  Array<S, kSize> mean, m2[1];
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    mean[j] = totals[j] * per_element_of_block;
    const S from_pivot = sum[j] * per_element;
    const S about_own_mean = squares[j] - sum[j] * from_pivot;
    const S deviation = pivot[j] - origin[j] + from_pivot - mean[j];
    m2[0][j] = (about_own_mean < 0 ? S(0) : about_own_mean) + n * deviation * deviation;
  }
  const auto m2_of_block = lanes_of<kSize>(block_sum(m2, tiling.columns), tiling.columns);

  if (threadIdx.x >= tiling.columns || channels.count == 0) return;
  partials.template row<kSize>(2 * norm, blockIdx.y, tiling, channels) = mean;
  partials.template row<kSize>(2 * norm + 1, blockIdx.y, tiling, channels) = m2_of_block;
  if (threadIdx.x == 0 && norm == 0) partials.count(blockIdx.y, tiling) = totals[kSize];
}

}  // namespace fusedskip::cuda

// stats: x → mean and M2 of every program's part of each channel, and of the residual where it has
// a norm too. Reads x: N, or both: 2N.
//
// A thread holds pivot, Σ(x - pivot) and Σ(x - pivot)² of its channels. The pivot is its own first
// element: being one of them it is no further from their mean than sqrt(M2), so that taking
// n·(mean - pivot)² off the squares in the end costs at most log2(n + 1) bits, n being hundreds,
// whatever the data. Then the threads of a block are merged by Chan's formula, all at once.

#include "dispatch.cuh"
#include "moments.cuh"
#include "stages.h"

namespace fusedskip::cuda {
namespace {

template <typename T, bool kChannelsLast, int kWidth, typename S = StatisticsOf<T>>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, kChannelsLast, kWidth>)
    batch_norm_stats_kernel(const __grid_constant__ Tiling tiling, const T* x, const T* residual,
                            const __grid_constant__ Partials<S> partials) {
  constexpr int kSize = kLanes<kChannelsLast>;
  constexpr int kUnroll = kInFlight<T, 1>;
  const int norm = blockIdx.z;
  // Chosen once: left to itself, nvcc 13.0 chooses again at every load.
  const T* tensor = norm == 0 ? x : residual;
  asm("" : "+l"(tensor));
  __builtin_assume(__isGlobal(tensor));
  const Channels channels = tiling.channels(blockIdx.x, threadIdx.x);
  Array<S, kSize> origin = {};
#pragma unroll
  for (int j = 0; j < kSize; ++j)
    if (j < channels.count) origin[j] = origin_of<S>(tensor, tiling, channels.first + j);

  Array<S, kSize> pivot = {}, sum = {}, squares = {};
  int count = 0;
  Walk<kChannelsLast, kWidth> walk(tiling, blockIdx.x, blockIdx.y, threadIdx.x,
                                   /*backwards=*/false);
  while (!walk.done()) {
    Place places[kUnroll];
    Octet<T> octets[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      places[u] = walk.next();
      octets[u] = load<kWidth>(tensor, places[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const auto values = widen<T>(octets[u]);
      if (u == 0 && count == 0) {
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
  if (threadIdx.x == 0 && norm == 0)
    partials.counts[blockIdx.y * tiling.channel_blocks + blockIdx.x] = totals[kSize];
}

}  // namespace

cudaError_t stats(const View& view, Dtype dtype, const void* x, const void* residual,
                  void* workspace, cudaStream_t stream) {
  const int norms = residual ? 2 : 1;
  const Tiling tiling = stats_tiling(view, norms);
  const int width = vector_width(view.row_length(), dtype, addresses(x, residual));
  return dispatch(dtype, tiling.channels_last, width, [&](auto instance) {
    using I = decltype(instance);
    using T = typename I::T;
    const dim3 grid(tiling.channel_blocks, tiling.programs, norms);
    batch_norm_stats_kernel<T, I::kChannelsLast, I::kWidth><<<grid, kThreads, 0, stream>>>(
        tiling, static_cast<const T*>(x), static_cast<const T*>(residual),
        Partials<StatisticsOf<T>>(workspace, tiling, norms));
    return cudaGetLastError();
  });
}

}  // namespace fusedskip::cuda

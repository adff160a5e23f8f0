// What a synchronised norm does between stats and apply. Numbers a channel: no traffic to speak of.
//
// moments: what stats has left → a rank's row: the mean of each channel, then M2 of each, then the
// number of elements a channel. merge: the rows of all ranks → mean, var, count and the running
// statistics.

#include "batch_norm.h"
#include "dispatch.cuh"
#include "moments.cuh"
#include "stages.h"

namespace fusedskip::cuda {
namespace {

template <typename T, bool kChannelsLast, typename S = StatisticsOf<T>>
__global__ void __launch_bounds__(kThreads)
    batch_norm_moments_kernel(const __grid_constant__ Tiling tiling, const T* x,
                              const __grid_constant__ Partials<S> partials, S* row) {
  partials.wait_for_programs();
  const Channels channels = tiling.channels(blockIdx.x, threadIdx.x);
  const int64_t own = tiling.own_channel(blockIdx.x, threadIdx.x);
  const auto moments = merge_moments<kLanes<kChannelsLast>, 1>(tiling, partials, channels);
  if (own < 0) return;
  const View& view = tiling.view;
  row[own] = origin_of(x, tiling, own) + moments.mean[0];
  row[view.n_channels + own] = moments.m2[0];
  if (own == 0) row[2 * view.n_channels] = S(view.n_outer * view.n_inner);
}

// Chan's formula over the rows of all ranks, for all at once.
template <typename S>
__global__ void __launch_bounds__(kThreads)
    batch_norm_merge_kernel(const __grid_constant__ BatchNormMerge args) {
  const int64_t n_channels = args.n_channels, pitch = 2 * n_channels + 1;
  const int64_t own = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (own >= n_channels) return;
  const S* counts = static_cast<const S*>(args.moments) + 2 * n_channels;
  const S* means = static_cast<const S*>(args.moments) + own;
  const S* m2s = means + n_channels;

  // The origin is the mean of the first rank that has elements.
  S count = 0, origin = 0, sum = 0;
  for (int64_t rank = 0; rank < args.n_ranks; ++rank) {
    const S n = counts[rank * pitch], mean = means[rank * pitch];
    if (count == 0) origin = finite_or_zero(mean);
    sum = fma_rn(n, mean - origin, sum);
    count += n;
  }
  const S from_origin = sum / count, mean = origin + from_origin;
  S m2 = 0;
  for (int64_t rank = 0; rank < args.n_ranks; ++rank) {
    const S deviation = means[rank * pitch] - origin - from_origin;
    m2 += m2s[rank * pitch] + counts[rank * pitch] * deviation * deviation;
  }

  update_running(args.running_mean, own, mean, args.momentum);
  update_running(args.running_var, own, m2 / (count - 1), args.momentum);
  static_cast<S*>(args.mean)[own] = mean;
  static_cast<S*>(args.var)[own] = m2 / count;
  if (own == 0) *static_cast<S*>(args.count) = count;
}

}  // namespace

cudaError_t moments(const BatchNormStats& args, void* workspace, cudaStream_t stream) {
  const Tiling tiling = stats_tiling(args.view, 1);
  return dispatch(args.dtype, tiling.channels_last, /*width=*/1, [&](auto instance) {
    using I = decltype(instance);
    using T = typename I::T;
    using S = StatisticsOf<T>;
    const unsigned grid = tiling.channel_blocks;
    return launch_stage<batch_norm_moments_kernel<T, I::kChannelsLast>>(
        /*is_second=*/true, grid, stream, tiling, static_cast<const T*>(args.x),
        Partials<S>(workspace, tiling, 1), static_cast<S*>(args.moments));
  });
}

cudaError_t batch_norm_merge(const BatchNormMerge& args, cudaStream_t stream) {
  const auto kernel = args.dtype == Dtype::kFloat64 ? batch_norm_merge_kernel<double>
                                                    : batch_norm_merge_kernel<float>;
  return launch(kernel, unsigned(ceil_div(args.n_channels, kThreads)), stream, args);
}

}  // namespace fusedskip::cuda

// apply: out = relu((x - mean)·scale + bias + residual), scale = weight·rstd. Reads x and residual,
// writes out and the 1-bit mask: 2N, or 3N + m.
//
// Every block first merges the moments of its own channels, which are in L2; the first block of a
// channel also leaves mean, rstd and the running statistics behind.

#include "dispatch.cuh"
#include "moments.cuh"
#include "stages.h"

namespace fusedskip::cuda {
namespace {

// running = (1 - momentum)·running + momentum·batch, rounded once to the buffer's dtype.
template <typename S, int kSize>
__device__ void update_running(const ChannelVector& running, const Array<S, kSize>& batch,
                               double momentum, const Channels& channels) {
  Array<S, kSize> values;
  load_channels(values, running, channels, S(0));
#pragma unroll
  for (int j = 0; j < kSize; ++j) values[j] = S(1 - momentum) * values[j] + S(momentum) * batch[j];
  store_channels(running, values, channels);
}

template <typename T, bool kChannelsLast, int kWidth, typename S = StatisticsOf<T>>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, kChannelsLast, kWidth>)
    batch_norm_apply_kernel(const __grid_constant__ Tiling tiling,
                            const __grid_constant__ BatchNormForward args,
                            const __grid_constant__ Partials<S> partials) {
  constexpr int kSize = kLanes<kChannelsLast>;
  constexpr int kUnroll = kInFlight<T, 2>;
  const T* x = static_cast<const T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  T* out = static_cast<T*>(args.out);
  const Channels channels = tiling.channels(blockIdx.x, threadIdx.x);
  const bool writes_channels = blockIdx.y == 0 && threadIdx.x < tiling.columns;

  Array<S, kSize> mean, var, rstd;
  if (args.training) {
    const auto origin = load_origin<kSize, kWidth>(x, tiling, channels);
    auto [batch_mean, m2] = merge_moments<S, kSize>(tiling, partials, channels);
    const S n = S(tiling.view.n_outer * tiling.view.n_inner);
    Array<S, kSize> unbiased;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      mean[j] = origin[j] + batch_mean[j];
      var[j] = m2[j] * (1 / n);
      unbiased[j] = m2[j] * (1 / (n - 1));
    }
    if (writes_channels && args.running_mean.data) {
      update_running(args.running_mean, mean, args.momentum, channels);
      update_running(args.running_var, unbiased, args.momentum, channels);
    }
  } else {
    load_channels(mean, args.running_mean, channels, S(0));
    load_channels(var, args.running_var, channels, S(1));
  }
#pragma unroll
  for (int j = 0; j < kSize; ++j) rstd[j] = rsqrt(var[j] + S(args.eps));
  if (writes_channels) {
    store_channels(static_cast<S*>(args.mean.data), mean, channels);
    store_channels(static_cast<S*>(args.rstd.data), rstd, channels);
  }
  const auto affine = affine_of(mean, rstd, args.weight, args.bias, channels);

  Walk<kChannelsLast> walk(tiling, blockIdx.x, blockIdx.y, threadIdx.x, /*backwards=*/true);
  while (!walk.done()) {
    Place places[kUnroll];
    Octet<T> octets[kUnroll], residuals[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      places[u] = walk.next();
      octets[u] = load<kWidth>(x, places[u]);
      if (residual) residuals[u] = load<kWidth>(residual, places[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      auto values = widen<T>(octets[u]);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) values[i] = affine(values[i], i);
      if (residual) {
        const auto added = widen<T>(residuals[u]);
#pragma unroll
        for (int i = 0; i < kOctet; ++i) values[i] += added[i];
      }
      if (args.relu) {
        const uint32_t bits = relu_passes<T>(values);
        values = keep(values, bits);
        if (args.mask && places[u].elements > 0)
          args.mask[mask_offset<kWidth>(places[u])] = padded(bits, places[u]);
      }
      store<kWidth>(out, places[u], narrow<T>(values));
    }
  }
}

}  // namespace

cudaError_t apply(const BatchNormForward& args, const Tiling& tiling, void* workspace,
                  cudaStream_t stream) {
  const int width =
      vector_width(args.view.row_length(), args.dtype, addresses(args.x, args.residual, args.out));
  return dispatch(args.dtype, tiling.channels_last, width, [&](auto instance) {
    using I = decltype(instance);
    using T = typename I::T;
    const dim3 grid(tiling.channel_blocks, tiling.programs);
    batch_norm_apply_kernel<T, I::kChannelsLast, I::kWidth>
        <<<grid, kThreads, 0, stream>>>(tiling, args, Partials<StatisticsOf<T>>(workspace, tiling));
    return cudaGetLastError();
  });
}

}  // namespace fusedskip::cuda

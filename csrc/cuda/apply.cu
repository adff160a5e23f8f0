// apply: out = relu((x - mean)·scale + bias + residual), scale = weight·rstd; a residual with a
// norm of its own comes in as x does. Reads x and residual, writes out and the 1-bit mask: 2N, or
// 3N + m.
//
// Every block first merges the moments of its own channels, which are in L2; the first block of a
// channel also leaves mean, rstd and the running statistics behind.

#include "dispatch.cuh"
#include "moments.cuh"
#include "stages.h"

namespace fusedskip::cuda {
namespace {

template <typename T, bool kChannelsLast, int kWidth, int kNorms, typename S = StatisticsOf<T>>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, kChannelsLast, kWidth, kNorms>)
    batch_norm_apply_kernel(const __grid_constant__ Tiling tiling,
                            const __grid_constant__ BatchNormForward args,
                            const __grid_constant__ Partials<S> partials) {
  constexpr int kSize = kLanes<kChannelsLast>;
  constexpr int kUnroll = kInFlight<T, 2, kBlocksAtOnce<kChannelsLast, kNorms>>;
  const T* x = static_cast<const T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  T* out = static_cast<T*>(args.out);
  const Channels channels = tiling.channels(blockIdx.x, threadIdx.x);
  const int64_t own = tiling.own_channel(blockIdx.x, threadIdx.x);

  S origin[kNorms] = {};
  Moments<S, kNorms> moments = {};
  if (args.training) {
#pragma unroll
    for (int k = 0; k < kNorms; ++k)
      if (own >= 0) origin[k] = origin_of<S>(k == 0 ? x : residual, tiling, own);
    moments = merge_moments<kSize, kNorms>(tiling, partials, channels);
  }
  __shared__ BlockAffine<S, kChannelsLast> affine_of_block[kNorms];
#pragma unroll
  for (int k = 0; k < kNorms; ++k) {
    if (own < 0) break;
    const Norm& norm = norm_of(args, k);
    S mean, var;
    if (args.training) {
      const S n = S(tiling.view.n_outer * tiling.view.n_inner);
      mean = origin[k] + moments.mean[k];
      var = moments.m2[k] * (1 / n);
      if (blockIdx.y == 0) {
        update_running(norm.running_mean, own, mean, norm.momentum);
        update_running(norm.running_var, own, moments.m2[k] * (1 / (n - 1)), norm.momentum);
      }
    } else {
      mean = get(norm.running_mean, own, S(0));
      var = get(norm.running_var, own, S(1));
    }
    const S rstd = rsqrt_rn(var + S(norm.eps));
    if (blockIdx.y == 0) {
      set(norm.mean, own, mean);
      set(norm.rstd, own, rstd);
    }
    affine_of_block[k].put(norm, own, mean, rstd);
  }
  __syncthreads();
  Affine<S, kSize> affine[kNorms];
#pragma unroll
  for (int k = 0; k < kNorms; ++k) affine[k] = affine_of_block[k].lanes(tiling.columns);

  Walk<kChannelsLast, kWidth> walk(tiling, blockIdx.x, blockIdx.y, threadIdx.x, /*backwards=*/true);
  while (!walk.done()) {
    Place places[kUnroll];
    Octet<T> octets[kUnroll], residuals[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      places[u] = walk.next();
      octets[u] = load<kWidth>(x, places[u]);
      if (kNorms == 2 || residual) residuals[u] = load<kWidth>(residual, places[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      auto values = widen<T>(octets[u]);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) values[i] = affine[0](values[i], i);
      if (kNorms == 2 || residual) {
        const auto added = widen<T>(residuals[u]);
#pragma unroll
        for (int i = 0; i < kOctet; ++i)
          values[i] += kNorms == 2 ? affine[kNorms - 1](added[i], i) : added[i];
      }
      if (args.relu) {
        const uint32_t bits = relu_passes<T>(values);
        values = keep(values, bits);
        if (args.mask && places[u].elements > 0)
          args.mask[mask_offset<kWidth>(places[u])] = padded(bits, places[u]);
      }
      const Place result{places[u].result, 0, places[u].elements};
      store<kWidth>(out, result, narrow<T>(values));
    }
  }
}

}  // namespace

cudaError_t apply(const BatchNormForward& args, void* workspace, cudaStream_t stream) {
  const int norms = norm_count(args);
  Tiling tiling = stage_tiling(args.view, norms);
  tiling.outer_results = args.out_pitch;
  const uintptr_t pitch = args.out_pitch * bytes(args.dtype);
  const int width = vector_width(args.view.row_length(), args.dtype,
                                 addresses(args.x, args.residual, args.out) | pitch);
  return dispatch(args.dtype, tiling.channels_last, width, [&](auto instance) {
    using I = decltype(instance);
    using T = typename I::T;
    const auto kernel = norms == 2 ? batch_norm_apply_kernel<T, I::kChannelsLast, I::kWidth, 2>
                                   : batch_norm_apply_kernel<T, I::kChannelsLast, I::kWidth, 1>;
    const dim3 grid(tiling.channel_blocks, tiling.programs);
    kernel<<<grid, kThreads, 0, stream>>>(
        tiling, args, Partials<StatisticsOf<T>>(workspace, stats_tiling(args.view, norms), norms));
    return cudaGetLastError();
  });
}

}  // namespace fusedskip::cuda

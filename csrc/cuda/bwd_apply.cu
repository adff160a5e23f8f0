// bwd_apply: dx = scale·g + k2·(x - mean) + k3 and dresidual = g; also dweight and dbias. Reads
// dout, the mask, and x in training or to recompute the threshold; writes what is asked for: 3N, or
// 4N + m.
//
// Every block first adds up the partial sums of its own channels, which are in L2; the first block
// of a channel also leaves dweight and dbias behind.

#include "dispatch.cuh"
#include "gate.cuh"
#include "stages.h"

namespace fusedskip::cuda {
namespace {

template <typename T, bool kChannelsLast, int kWidth, bool kRecompute, typename S = StatisticsOf<T>>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, kChannelsLast, kWidth>)
    batch_norm_bwd_apply_kernel(const __grid_constant__ Tiling tiling,
                                const __grid_constant__ BatchNormBackward args,
                                const __grid_constant__ Partials<S> partials) {
  constexpr int kSize = kLanes<kChannelsLast>;
  // Beside four coefficients of eight channels, 80 registers hold one octet of each tensor. That is
  // enough: reads are half of the traffic.
  constexpr int kUnroll = kChannelsLast ? 1 : kInFlight<T, 2>;
  T* dx = static_cast<T*>(args.dx);
  T* dresidual = static_cast<T*>(args.dresidual);
  const Channels channels = tiling.channels(blockIdx.x, threadIdx.x);
  const auto affine = saved_affine<S, kSize>(args, channels);

  Array<S, kSize> k2 = {}, k3 = {};
  if (args.reduces()) {
    GradientSums<S, kSize> sums = {};
    for_each_program(tiling, channels, [&](int program) {
      const auto g = partial_row<kSize>(partials.first, tiling, program, channels);
      const auto gx = partial_row<kSize>(partials.second, tiling, program, channels);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        sums.g[j] += g[j];
        sums.gx[j] += gx[j];
      }
    });
    block_sum(sums, tiling.columns);
    Array<S, kSize> rstd = {};
    load_channels(rstd, static_cast<const S*>(args.rstd.data), channels);
    const S per_element = 1 / S(tiling.view.n_outer * tiling.view.n_inner);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      sums.gx[j] *= rstd[j];
      k2[j] = -affine.scale[j] * rstd[j] * sums.gx[j] * per_element;
      k3[j] = -affine.scale[j] * sums.g[j] * per_element;
    }
    if (blockIdx.y == 0 && threadIdx.x < tiling.columns) {
      store_channels(args.dweight, sums.gx, channels);
      store_channels(args.dbias, sums.g, channels);
    }
  }
  if (!dx && !dresidual) return;

  Walk<kChannelsLast> walk(tiling, blockIdx.x, blockIdx.y, threadIdx.x, /*backwards=*/true);
  while (!walk.done()) {
    Place places[kUnroll];
    GatedOctet<T, kWidth, kRecompute> octets[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      places[u] = walk.next();
      octets[u].read(args, places[u], /*reads_x=*/args.training && dx);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      auto [g, centred] = octets[u].gradient(affine);
      if (dresidual) store<kWidth>(dresidual, places[u], narrow<T>(g));
      if (!dx) continue;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const int j = i % kSize;
        g[i] = args.training ? fma_rn(affine.scale[j], g[i], fma_rn(k2[j], centred[i], k3[j]))
                             : affine.scale[j] * g[i];
      }
      store<kWidth>(dx, places[u], narrow<T>(g));
    }
  }
}

}  // namespace

cudaError_t bwd_apply(const BatchNormBackward& args, const Tiling& tiling, void* workspace,
                      cudaStream_t stream) {
  const int width = vector_width(args.view.row_length(), args.dtype,
                                 addresses(args.dout, args.x, args.dx, args.dresidual));
  return dispatch(args.dtype, tiling.channels_last, width, [&](auto instance) {
    using I = decltype(instance);
    using T = typename I::T;
    const auto kernel = args.relu && !args.mask
                            ? batch_norm_bwd_apply_kernel<T, I::kChannelsLast, I::kWidth, true>
                            : batch_norm_bwd_apply_kernel<T, I::kChannelsLast, I::kWidth, false>;
    const dim3 grid(tiling.channel_blocks, args.dx || args.dresidual ? tiling.programs : 1);
    kernel<<<grid, kThreads, 0, stream>>>(tiling, args,
                                          Partials<StatisticsOf<T>>(workspace, tiling));
    return cudaGetLastError();
  });
}

}  // namespace fusedskip::cuda

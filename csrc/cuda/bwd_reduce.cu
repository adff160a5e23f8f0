// bwd_reduce: dout, x and the threshold → Σg and Σg·(x - mean) of every program's part of each
// channel. Reads dout and x, and the mask if there is one: 2N + m.

#include "dispatch.cuh"
#include "gate.cuh"
#include "stages.h"

namespace fusedskip::cuda {
namespace {

template <typename T, bool kChannelsLast, int kWidth, bool kRecompute, typename S = StatisticsOf<T>>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, kChannelsLast, kWidth>)
    batch_norm_bwd_reduce_kernel(const __grid_constant__ Tiling tiling,
                                 const __grid_constant__ BatchNormBackward args,
                                 const __grid_constant__ Partials<S> partials) {
  constexpr int kSize = kLanes<kChannelsLast>;
  constexpr int kUnroll = kInFlight<T, 2>;
  const Channels channels = tiling.channels(blockIdx.x, threadIdx.x);
  const auto affine = saved_affine<S, kSize>(args, channels);

  GradientSums<S, kSize> sums = {};
  Walk<kChannelsLast> walk(tiling, blockIdx.x, blockIdx.y, threadIdx.x, /*backwards=*/false);
  while (!walk.done()) {
    GatedOctet<T, kWidth, kRecompute> octets[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) octets[u].read(args, walk.next(), /*reads_x=*/true);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      // What does not exist has a dout of 0 and adds nothing.
      const auto [g, centred] = octets[u].gradient(affine);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        sums.g[i % kSize] += g[i];
        sums.gx[i % kSize] = fma_rn(g[i], centred[i], sums.gx[i % kSize]);
      }
    }
  }
  block_sum(sums, tiling.columns);

  if (threadIdx.x >= tiling.columns || channels.count == 0) return;
  partial_row<kSize>(partials.first, tiling, blockIdx.y, channels) = sums.g;
  partial_row<kSize>(partials.second, tiling, blockIdx.y, channels) = sums.gx;
}

}  // namespace

cudaError_t bwd_reduce(const BatchNormBackward& args, const Tiling& tiling, void* workspace,
                       cudaStream_t stream) {
  const int width = vector_width(args.view.row_length(), args.dtype, addresses(args.dout, args.x));
  return dispatch(args.dtype, tiling.channels_last, width, [&](auto instance) {
    using I = decltype(instance);
    using T = typename I::T;
    const auto kernel = args.relu && !args.mask
                            ? batch_norm_bwd_reduce_kernel<T, I::kChannelsLast, I::kWidth, true>
                            : batch_norm_bwd_reduce_kernel<T, I::kChannelsLast, I::kWidth, false>;
    const dim3 grid(tiling.channel_blocks, tiling.programs);
    kernel<<<grid, kThreads, 0, stream>>>(tiling, args,
                                          Partials<StatisticsOf<T>>(workspace, tiling));
    return cudaGetLastError();
  });
}

}  // namespace fusedskip::cuda

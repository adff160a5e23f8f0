// bwd_reduce: dout, x and the threshold → Σg and Σg·(x - mean) of every program's part of each
// channel; the latter of a residual with a norm, too. Reads dout and x, and the mask if there is
// one: 2N + m; with that residual 3N + m.

#include "dispatch.cuh"
#include "gate.cuh"
#include "stages.h"

namespace fusedskip::cuda {
namespace {

template <typename T, bool kChannelsLast, int kWidth, Kind kKind, typename S = StatisticsOf<T>>
__global__ void __launch_bounds__(kThreads,
                                  kResidentBlocks<T, kChannelsLast, kWidth, kNorms<kKind>>)
    batch_norm_bwd_reduce_kernel(const __grid_constant__ Tiling tiling,
                                 const __grid_constant__ BatchNormBackward args,
                                 const __grid_constant__ Partials<S> partials) {
  constexpr int kSize = kLanes<kChannelsLast>, kNorms = cuda::kNorms<kKind>;
  constexpr int kUnroll = kInFlight<T, 1 + kNorms, kBlocksAtOnce<kChannelsLast, kNorms>>;
  const Channels channels = tiling.channels(blockIdx.x, threadIdx.x);
  Affine<S, kSize> affine[kNorms] = {};
  if constexpr (kKind == Kind::kRecomputed) {
    __shared__ BlockAffine<S, kChannelsLast> affine_of_block;
    const int64_t own = tiling.own_channel(blockIdx.x, threadIdx.x);
    if (own >= 0) put_saved(affine_of_block, args.norm, own);
    __syncthreads();
    affine[0] = affine_of_block.lanes(tiling.columns);
  } else {
    // Means alone, for which the first elements need not wait.
#pragma unroll
    for (int k = 0; k < kNorms; ++k) {
      const S* mean = static_cast<const S*>(norm_of(args, k).mean.data) + channels.first;
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        if (j < channels.count) affine[k].mean[j] = mean[j];
    }
  }

  Array<S, kSize> sums[1 + kNorms] = {};
  Walk<kChannelsLast, kWidth> walk(tiling, blockIdx.x, blockIdx.y, threadIdx.x,
                                   /*backwards=*/false);
  while (!walk.done()) {
    GatedOctet<T, kWidth, kKind> octets[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      octets[u].read(args, walk.next(), /*reads_x=*/true, /*reads_residual=*/true);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      // What does not exist has a dout of 0 and adds nothing.
      const auto [g, centred] = octets[u].gradient(affine);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const int j = i % kSize;
        sums[0][j] += g[i];
#pragma unroll
        for (int k = 0; k < kNorms; ++k)
          sums[1 + k][j] = fma_rn(g[i], centred[k][i], sums[1 + k][j]);
      }
    }
  }
  const S* totals = block_sum(sums, tiling.columns);

  if (threadIdx.x >= tiling.columns || channels.count == 0) return;
#pragma unroll
  for (int k = 0; k < 1 + kNorms; ++k)
    partials.template row<kSize>(k, blockIdx.y, tiling, channels) =
        lanes_of<kSize>(totals + k * kSize * tiling.columns, tiling.columns);
}

}  // namespace

cudaError_t bwd_reduce(const BatchNormBackward& args, void* workspace, cudaStream_t stream) {
  const int norms = norm_count(args);
  const Tiling tiling = stage_tiling(args.view, norms);
  const int width =
      vector_width(args.view.row_length(), args.dtype, addresses(args.dout, args.x, args.residual));
  return dispatch(args.dtype, tiling.channels_last, width, [&](auto instance) {
    using I = decltype(instance);
    using T = typename I::T;
    const Kind kind = kind_of(args);
    const auto kernel =
        kind == Kind::kDual
            ? batch_norm_bwd_reduce_kernel<T, I::kChannelsLast, I::kWidth, Kind::kDual>
        : kind == Kind::kRecomputed
            ? batch_norm_bwd_reduce_kernel<T, I::kChannelsLast, I::kWidth, Kind::kRecomputed>
            : batch_norm_bwd_reduce_kernel<T, I::kChannelsLast, I::kWidth, Kind::kSaved>;
    const dim3 grid(tiling.channel_blocks, tiling.programs);
    kernel<<<grid, kThreads, 0, stream>>>(tiling, args,
                                          Partials<StatisticsOf<T>>(workspace, tiling, norms));
    return cudaGetLastError();
  });
}

}  // namespace fusedskip::cuda

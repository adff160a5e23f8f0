// bwd_reduce: dout, x and the threshold → Σg and Σg·(x - mean) of a program's part of each channel;
// the latter of a residual with a norm, too. Reads dout and x, and the mask if there is one: 2N +
// m; with that residual 3N + m.

#pragma once

#include "gate.cuh"

namespace fusedskip::cuda {

// Rounds in flight at once.
template <typename T, bool kChannelsLast, int kNorms>
inline constexpr int kReduceBatch = kInFlight<T, 1 + kNorms, kBlocksAtOnce<kChannelsLast, kNorms>>;

template <bool kChannelsLast, int kWidth, Kind kKind, typename T, typename Parts, typename Kept,
          typename S = StatisticsOf<T>>
__device__ void bwd_reduce_of_program(const Tiling& tiling, const BatchNormBackward& args,
                                      const Parts& partials, Kept& kept) {
  constexpr int kSize = kLanes<kChannelsLast>, kNorms = cuda::kNorms<kKind>;
  constexpr int kUnroll = kReduceBatch<T, kChannelsLast, kNorms>;
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
  static_assert(Kept::kHeld == 0 || Kept::kHeld == kUnroll);
  Walk<kChannelsLast, kWidth, /*kBackwards=*/false, Kept::kHeld> walk(tiling, blockIdx.x,
                                                                      blockIdx.y, threadIdx.x);
  while (!walk.done()) {
    const int round = walk.round();
    GatedOctet<T, kWidth, kKind> octets[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      octets[u].template read<Use::kAgain>(args, walk.next(), /*reads_x=*/true,
                                           /*reads_residual=*/true);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      octets[u].put(kept, round + u, u);
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

}  // namespace fusedskip::cuda

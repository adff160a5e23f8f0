// bwd_apply: dx = scale·g + k2·(x - mean) + k3 and dresidual = g, or, the residual having a norm of
// its own, what dx is; also dweight and dbias. Reads dout, the mask, and in training or to
// recompute the threshold what was normalised; writes what is asked for: 3N, 4N + m, or of a dual
// norm 5N + m.
//
// Every block first adds up the partial sums of its own channels, which are in L2; the first block
// of a channel also leaves dweight and dbias behind.

#pragma once

#include "gate.cuh"

namespace fusedskip::cuda {

template <bool kChannelsLast, int kWidth, Kind kKind, typename T, typename Parts, typename Kept,
          typename S = StatisticsOf<T>>
__device__ void bwd_apply_to_program(const Tiling& tiling, const BatchNormBackward& args,
                                     const Parts& partials, const Kept& kept) {
  constexpr int kSize = kLanes<kChannelsLast>, kNorms = cuda::kNorms<kKind>;
  // Beside four coefficients of eight channels, the registers hold one octet of each tensor. That
  // is enough: half of the traffic is writing, and 24 KB an SM or more are in flight, where 18 KB
  // saturate an H100 that only reads (3.35 TB/s at 0.7 us).
  constexpr int kUnroll =
      kChannelsLast ? 1 : kInFlight<T, 1 + kNorms, kBlocksAtOnce<kChannelsLast, kNorms>>;
  T* dresidual = static_cast<T*>(args.dresidual);
  T* const dnormalised[] = {static_cast<T*>(args.dx), dresidual};
  const Channels channels = tiling.channels(blockIdx.x, threadIdx.x);
  const int64_t own = tiling.own_channel(blockIdx.x, threadIdx.x);

  const S* totals = nullptr;  // [1 + kNorms][channels of the block], from the thread's own on
  if (args.reduces()) {
    Array<S, kSize> sums[1 + kNorms] = {};
    partials.for_each_program(tiling, channels, [&](int program) {
#pragma unroll
      for (int k = 0; k < 1 + kNorms; ++k) {
        const auto part = partials.template row<kSize>(k, program, tiling, channels);
#pragma unroll
        for (int j = 0; j < kSize; ++j) sums[k][j] += part[j];
      }
    });
    totals = block_sum(sums, tiling.columns) + threadIdx.x;
  }
  __shared__ BlockAffine<S, kChannelsLast> affine_of_block[kNorms];
  __shared__ BlockArray<S, kChannelsLast> k2_of_block[kNorms];
  __shared__ BlockArray<S, kChannelsLast> k3_of_block[kNorms];
#pragma unroll
  for (int k = 0; k < kNorms; ++k) {
    if (own < 0) break;
    const Norm& norm = norm_of(args, k);
    const S rstd = put_saved(affine_of_block[k], norm, own);
    S mean_g, mean_gx;
    if (totals) {
      const S per_element = 1 / S(tiling.view.n_outer * tiling.view.n_inner);
      const S dbias = totals[0], dweight = totals[(1 + k) * kSize * tiling.columns] * rstd;
      mean_g = dbias * per_element;
      mean_gx = dweight * per_element;
      if (blockIdx.y == 0) {
        set(k == 0 ? args.dweight : args.residual_dweight, own, dweight);
        set(k == 0 ? args.dbias : args.residual_dbias, own, dbias);
      }
    } else if (args.means) {
      const S* means = static_cast<const S*>(args.means) + own;
      mean_g = means[0];
      mean_gx = means[tiling.view.n_channels];
    } else {
      continue;
    }
    const S scale = affine_of_block[k].scale[threadIdx.x];
    k2_of_block[k][threadIdx.x] = -scale * rstd * mean_gx;
    k3_of_block[k][threadIdx.x] = -scale * mean_g;
  }
  if (!args.dx && !args.dresidual) return;
  __syncthreads();
  partials.have_been_read();
  Affine<S, kSize> affine[kNorms];
  Array<S, kSize> k2[kNorms], k3[kNorms];
#pragma unroll
  for (int k = 0; k < kNorms; ++k) {
    affine[k] = affine_of_block[k].lanes(tiling.columns);
    k2[k] = lanes_of<kSize>(k2_of_block[k].values, tiling.columns);
    k3[k] = lanes_of<kSize>(k3_of_block[k].values, tiling.columns);
  }

  const auto finish = [&](const Place& place, const GatedOctet<T, kWidth, kKind>& octet) {
    const auto [g, centred] = octet.gradient(affine);
    if (kNorms == 1 && dresidual) store<kWidth>(dresidual, place, narrow<T>(g));
#pragma unroll
    for (int k = 0; k < kNorms; ++k) {
      if (!dnormalised[k]) continue;
      Array<S, kOctet> values;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const int j = i % kSize;
        values[i] = args.training ? fma_rn(affine[k].scale[j], g[i],
                                           fma_rn(k2[k][j], centred[k][i], k3[k][j]))
                                  : affine[k].scale[j] * g[i];
      }
      store<kWidth>(dnormalised[k], place, narrow<T>(values));
    }
  };
  Walk<kChannelsLast, kWidth, /*kBackwards=*/true> walk(tiling, blockIdx.x, blockIdx.y,
                                                        threadIdx.x);
#pragma unroll
  for (int u = Kept::kHeld - 1; u >= 0; --u) {
    GatedOctet<T, kWidth, kKind> octet;
    octet.get(kept.in_registers(u));
    finish(walk.next(), octet);
  }
  while (!walk.done()) {
    const int round = walk.round();
    Place places[kUnroll];
    GatedOctet<T, kWidth, kKind> octets[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      places[u] = walk.next();
      if (kept.has(round - u)) {
        octets[u].get(kept.in_shared(round - u));
      } else {
        octets[u].template read<Use::kLast>(args, places[u], /*reads_x=*/args.training && args.dx,
                                            /*reads_residual=*/args.training && dresidual);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) finish(places[u], octets[u]);
  }
}

}  // namespace fusedskip::cuda

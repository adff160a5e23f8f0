// apply: out = relu((x - mean)·scale + bias + residual), scale = weight·rstd; a residual with a
// norm of its own comes in as x does. Reads x and residual, writes out and the 1-bit mask: 2N, or
// 3N + m.
//
// Every block first merges the moments of its own channels, which are in L2; the first block of a
// channel also leaves mean, rstd and the running statistics behind.

#pragma once

#include "kept.cuh"
#include "moments.cuh"

namespace fusedskip::cuda {

template <bool kChannelsLast, int kWidth, int kNorms, typename T, typename Parts, typename Kept,
          typename S = StatisticsOf<T>>
__device__ void apply_to_program(const Tiling& tiling, const BatchNormForward& args,
                                 const Parts& partials, const Kept& kept) {
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
      if (own >= 0) origin[k] = origin_of(k == 0 ? x : residual, tiling, own);
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
  partials.have_been_read();
  Affine<S, kSize> affine[kNorms];
#pragma unroll
  for (int k = 0; k < kNorms; ++k) affine[k] = affine_of_block[k].lanes(tiling.columns);

  Walk<kChannelsLast, kWidth, /*kBackwards=*/true> walk(tiling, blockIdx.x, blockIdx.y,
                                                        threadIdx.x);
  // Of x, and of a residual with a norm, an octet comes from where `find` has it.
  const auto finish_rounds = [&]<int kCount>(auto find) {
    Place places[kCount];
    Octet<T> octets[kCount], residuals[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      places[u] = walk.next();
      octets[u] = find(u, 0, x, places[u]);
      if constexpr (kNorms == 2) {
        residuals[u] = find(u, 1, residual, places[u]);
      } else if (residual) {
        residuals[u] = load<kWidth, Use::kLast>(residual, places[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
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
  };
  constexpr int kHeldAtOnce = kNorms == 2 ? 1 : kUnroll;  // where nothing has to be loaded, one
#pragma unroll
  for (int last = Kept::kHeld - 1; last >= 0; last -= kHeldAtOnce)
    finish_rounds.template operator()<kHeldAtOnce>([&](int u, int tensor, const T*, const Place&) {
      return kept.in_registers(last - u).octet(tensor);
    });
  while (!walk.done()) {
    const int round = walk.round();
    finish_rounds.template operator()<kUnroll>(
        [&](int u, int tensor, const T* p, const Place& place) {
          return kept_or_loaded<kWidth>(kept, round - u, tensor, p, place);
        });
  }
}

}  // namespace fusedskip::cuda

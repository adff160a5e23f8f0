// The numbers of a channel: parameters of either dtype, sums over a block, partial results of the
// programs. A thread holds those of its lanes: eight channels, or one channels-first. What they
// come from is worked out by one thread a channel, and handed round in shared memory.

#pragma once

#include "launch.cuh"
#include "octet.cuh"

namespace fusedskip::cuda {

template <bool kChannelsLast>
inline constexpr int kLanes = kChannelsLast ? kOctet : 1;

// Numbers of all channels of a block, in their order.
template <typename S, bool kChannelsLast>
using BlockArray = Array<S, kMaxColumns * kLanes<kChannelsLast>>;

// Those of a thread's lanes.
template <int kSize, typename S>
__device__ Array<S, kSize> lanes_of(const S* of_block, int columns) {
  const int first = (threadIdx.x & (columns - 1)) * kSize;
  Array<S, kSize> lanes;
#pragma unroll
  for (int j = 0; j < kSize; ++j) lanes[j] = of_block[first + j];
  return lanes;
}

// From and to a vector of its own dtype, S or one of 16 bits.
template <typename S>
__device__ S get(const ChannelVector& vector, int64_t channel, S absent) {
  if (!vector.data) return absent;
  if (bytes(vector.dtype) == sizeof(S)) return static_cast<const S*>(vector.data)[channel];
  const uint16_t bits = static_cast<const uint16_t*>(vector.data)[channel];
  return vector.dtype == Dtype::kBFloat16 ? __uint_as_float(uint32_t{bits} << 16)
                                          : __half2float(__ushort_as_half(bits));
}

template <typename S>
__device__ void set(const ChannelVector& vector, int64_t channel, S value) {
  if (!vector.data) return;
  if (bytes(vector.dtype) == sizeof(S)) {
    static_cast<S*>(vector.data)[channel] = value;
  } else {
    static_cast<uint16_t*>(vector.data)[channel] =
        vector.dtype == Dtype::kBFloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                                         : __half_as_ushort(__float2half_rn(value));
  }
}

// running = (1 - momentum)·running + momentum·batch, rounded once to the buffer's dtype.
template <typename S>
__device__ void update_running(const ChannelVector& running, int64_t channel, S batch,
                               double momentum) {
  const S before = get(running, channel, S(0));
  set(running, channel, S(1 - momentum) * before + S(momentum) * batch);
}

// The norms of a call, that of x first.
template <typename Args>
__device__ const Norm& norm_of(const Args& args, int norm) {
  return norm == 0 ? args.norm : args.residual_norm;
}

// y = (x - mean)·scale + bias, in this form: with mean >> std, the constant of scale·x + constant
// would cancel nearly all of it. Backward recomputes forward's threshold from it bit for bit.
template <typename S, int kSize>
struct Affine {
  Array<S, kSize> mean, scale, bias;

  __device__ S operator()(S x, int i) const {
    return fma_rn(x - mean[i % kSize], scale[i % kSize], bias[i % kSize]);
  }
};

// Of all channels of a block: a thread puts in its own and takes out its lanes.
template <typename S, bool kChannelsLast>
struct BlockAffine {
  BlockArray<S, kChannelsLast> mean, scale, bias;

  __device__ void put(const Norm& norm, int64_t channel, S mean_of_channel, S rstd) {
    mean[threadIdx.x] = mean_of_channel;
    scale[threadIdx.x] = get(norm.weight, channel, S(1)) * rstd;
    bias[threadIdx.x] = get(norm.bias, channel, S(0));
  }
  __device__ auto lanes(int columns) const {
    constexpr int kSize = kLanes<kChannelsLast>;
    return Affine<S, kSize>{lanes_of<kSize>(mean.values, columns),
                            lanes_of<kSize>(scale.values, columns),
                            lanes_of<kSize>(bias.values, columns)};
  }
};

// The sums of values over the threads of a column, in an order that never changes: over a warp by
// halves, then over the warps from first to last. Returns them in shared memory, a row for each
// array in the order of the block's channels, good until the next call. All threads must call it.
template <typename S, int kSize, int kCount>
__device__ const S* block_sum(Array<S, kSize> (&values)[kCount], int columns) {
  constexpr int kSums = kCount * kSize * kMaxColumns;
  static_assert(kSums <= kThreads, "every sum has a thread");
  __shared__ S warp_sums[kWarps][kSums];
  __shared__ S sums[kSums];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    for (int distance = kWarp / 2; distance >= columns; distance /= 2) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) values[k][j] += __shfl_xor_sync(~0u, values[k][j], distance);
    }
    if (lane < columns) {
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        warp_sums[warp][(k * columns + lane) * kSize + j] = values[k][j];
    }
  }
  __syncthreads();
  if (threadIdx.x < kCount * kSize * columns) {
    S sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += warp_sums[w][threadIdx.x];
    sums[threadIdx.x] = sum;
  }
  __syncthreads();
  return sums;
}

// What the first stage of a pair leaves to the second: up to two numbers for each program, norm and
// channel, and of stats the elements that the programs saw of each channel of theirs.
template <typename S>
struct Partials {
  using Number = S;

  S *numbers, *counts;
  int programs;

  Partials(void* workspace, const Tiling& tiling, int norms)
      : numbers(static_cast<S*>(workspace)),
        counts(numbers + 2 * norms * tiling.programs * tiling.pitch()),
        programs(tiling.programs) {}

  // Number `which` of a program, of a thread's lanes.
  template <int kSize>
  __device__ Array<S, kSize>& row(int which, int program, const Tiling& tiling,
                                  const Channels& channels) const {
    S* first = numbers + (int64_t{which} * programs + program) * tiling.pitch();
    return *reinterpret_cast<Array<S, kSize>*>(first + channels.first);
  }

  __device__ S& count(int program, const Tiling& tiling) const {
    return counts[program * tiling.channel_blocks + blockIdx.x];
  }

  // What any program has left is then there.
  __device__ void wait_for_programs() const { wait_for_previous(); }
  // Once the threads of a block have read what they need of the others.
  __device__ void have_been_read() const {}

  // Calls body(program) for all programs: the threads of a column share them, up to six for each.
  template <typename Body>
  __device__ void for_each_program(const Tiling& tiling, const Channels& channels,
                                   Body body) const {
    if (channels.count == 0) return;
#pragma unroll 1
    for (int program = tiling.position(threadIdx.x); program < programs; program += tiling.depth())
      body(program);
  }
};

}  // namespace fusedskip::cuda

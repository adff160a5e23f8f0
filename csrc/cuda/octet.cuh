// Eight neighbours in a row of memory: loaded and stored in accesses of up to 16 bytes, computed
// with in statistics precision, thresholded into the bits of a byte.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "index.h"

namespace fusedskip::cuda {

// Statistics, coefficients and sums of tensors of T.
template <typename T>
using StatisticsOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Blocks that an SM is to hold at once.
template <bool kChannelsLast, int kNorms>
inline constexpr int kBlocksAtOnce = kChannelsLast && kNorms == 2 ? kDualBlocksPerSM : kBlocksPerSM;

// What is not meant to be fast takes the registers it needs: fp64, which is there for gradcheck,
// and channels-last rows that are not whole octets, with the predicates of their narrow accesses.
template <typename T, bool kChannelsLast, int kWidth, int kNorms = 1>
inline constexpr int kResidentBlocks =
    sizeof(T) == sizeof(double)
        ? 1
        : kBlocksAtOnce<kChannelsLast, kNorms> - (kChannelsLast && kWidth < kOctet);

// Octets that a thread has in flight of each of kTensors tensors that it reads: 48 KB an SM in all,
// 64 bytes a thread of three blocks.
template <typename T, int kTensors, int kBlocksAnSM = kBlocksPerSM>
inline constexpr int kInFlight = std::max<int>(1, 24 / kBlocksAnSM / sizeof(T) / kTensors);

template <typename S, int kSize>
struct alignas(kSize * sizeof(S) < 16 ? sizeof(S) : 16) Array {
  S values[kSize];

  __device__ S& operator[](int i) { return values[i]; }
  __device__ const S& operator[](int i) const { return values[i]; }
};

// As it lies in memory. Elements of 16 bits stay in pairs: conversions take two at a time.
template <typename T>
using Octet = Array<uint32_t, kOctet * sizeof(T) / 4>;

template <int kBytes>
using Access = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2,
                       std::conditional_t<kBytes == 4, unsigned, unsigned short>>>;

// The shape of accesses to octets of T in rows that are whole multiples of kWidth elements.
template <typename T, int kWidth>
struct Accesses {
  using Type = Access<std::min<int>(16, kWidth * sizeof(T))>;
  static constexpr int kElements = sizeof(Type) / sizeof(T);
  static constexpr int kCount = kOctet / kElements;
};

// Whether element i of an octet exists, of which kWidth at a time do.
template <int kWidth>
__device__ bool exists(const Place& place, int i) {
  return i / kWidth * kWidth < place.elements;
}

// The offset of an octet's mask. Where rows are whole octets it follows from that of its elements,
// and the compiler drops the other.
template <int kWidth>
__device__ int64_t mask_offset(const Place& place) {
  return kWidth == kOctet ? int64_t(uint64_t(place.element) / kOctet) : place.byte;
}

// Whether the second stage of a pair comes back to what the first reads. What has been read for the
// last time is to leave L2 first: then each octet makes room for what is written in its place, and
// not what the second stage has yet to read, of which otherwise a third would still be there.
enum class Use { kAgain, kLast };

// What does not exist is 0.
template <int kWidth, Use kUse = Use::kAgain, typename T>
__device__ Octet<T> load(const T* p, const Place& place) {
  using A = Accesses<T, kWidth>;
  union {
    Octet<T> octet;
    typename A::Type accesses[A::kCount];
  } result = {};
  const auto* from = reinterpret_cast<const typename A::Type*>(p + place.element);
#pragma unroll
  for (int i = 0; i < A::kCount; ++i)
    if (exists<kWidth>(place, i * A::kElements))
      result.accesses[i] = kUse == Use::kLast ? __ldcs(from + i) : from[i];
  return result.octet;
}

// One instruction. Assigned, the words of a vector were at times stored one by one (nvcc 13.0); and
// __stwb, which would do, is a strong store.
template <typename Access>
__device__ void store_access(Access* p, Access a) {
  if constexpr (sizeof(Access) == 16) {
    asm("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w)
        : "memory");
  } else if constexpr (sizeof(Access) == 8) {
    asm("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(a.x), "r"(a.y) : "memory");
  } else {
    *p = a;
  }
}

// A thread's octet, in its own accesses.
template <int kWidth, typename T>
__device__ void store_alone(T* p, const Place& place, const Octet<T>& octet) {
  using A = Accesses<T, kWidth>;
  union {
    Octet<T> octet;
    typename A::Type accesses[A::kCount];
  } source = {octet};
  auto* to = reinterpret_cast<typename A::Type*>(p + place.element);
#pragma unroll
  for (int i = 0; i < A::kCount; ++i)
    if (exists<kWidth>(place, i * A::kElements)) store_access(to + i, source.accesses[i]);
}

// What the threads of a warp store: each puts in its octet and takes out every 32nd element of
// them all.
template <typename T>
struct WarpOctets {
  Octet<T> octets[kWarp];
  int64_t offsets[kWarp];
  int elements[kWarp];
};

// All threads of a warp must call it. Single elements are exchanged first, so that neighbours in
// memory are neighbours in the warp: of 16 bits, the 32 of a store then lie in 2 sectors of 32
// bytes, or a few more at the ends of rows, where those of 32 octets lie in 16 or 17.
template <int kWidth, typename T>
__device__ void store(T* p, const Place& place, const Octet<T>& octet) {
  if constexpr (kWidth == 1) {
    __shared__ WarpOctets<T> of_warps[kWarps];
    WarpOctets<T>& warp = of_warps[threadIdx.x / kWarp];
    const int lane = threadIdx.x % kWarp;
    __syncwarp();  // the last store's have been taken out
    warp.octets[lane] = octet;
    warp.offsets[lane] = place.element;
    warp.elements[lane] = place.elements;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const int owner = (i * kWarp + lane) / kOctet, element = lane % kOctet;
      if (element < warp.elements[owner])
        p[warp.offsets[owner] + element] = reinterpret_cast<const T*>(&warp.octets[owner])[element];
    }
  } else {
    store_alone<kWidth>(p, place, octet);
  }
}

template <typename T>
__device__ Array<StatisticsOf<T>, kOctet> widen(const Octet<T>& octet) {
  Array<StatisticsOf<T>, kOctet> values;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if constexpr (std::is_same_v<T, double>) {
      values[i] = __hiloint2double(octet[2 * i + 1], octet[2 * i]);
    } else if constexpr (std::is_same_v<T, float>) {
      values[i] = __uint_as_float(octet[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const uint32_t pair = octet[i / 2];
      values[i] = __uint_as_float(i % 2 ? pair & 0xffff0000 : pair << 16);
    } else {
      const uint32_t pair = octet[i / 2];
      values[i] = __half2float(__ushort_as_half(i % 2 ? pair >> 16 : pair & 0xffff));
    }
  }
  return values;
}

// By name: torch compiles extensions without implicit conversions of 16-bit types.
template <typename T>
__device__ StatisticsOf<T> widen_element(T value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else {
    return value;
  }
}

// Rounds to nearest even.
template <typename T>
__device__ Octet<T> narrow(const Array<StatisticsOf<T>, kOctet>& values) {
  Octet<T> octet;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if constexpr (std::is_same_v<T, double>) {
      octet[2 * i] = __double2loint(values[i]);
      octet[2 * i + 1] = __double2hiint(values[i]);
    } else if constexpr (std::is_same_v<T, float>) {
      octet[i] = __float_as_uint(values[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(values[i / 2 * 2], values[i / 2 * 2 + 1]);
      octet[i / 2] = reinterpret_cast<const uint32_t&>(pair);
    } else {
      const __half2 pair = __floats2half2_rn(values[i / 2 * 2], values[i / 2 * 2 + 1]);
      octet[i / 2] = reinterpret_cast<const uint32_t&>(pair);
    }
  }
  return octet;
}

// Bit i is set where ReLU lets element i through: not (value <= 0), so NaN too, of the value as it
// is stored.
template <typename T>
__device__ uint32_t relu_passes(const Array<StatisticsOf<T>, kOctet>& values) {
  const auto stored = widen<T>(narrow<T>(values));
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) bits |= uint32_t(!(stored[i] <= 0)) << i;
  return bits;
}

// A selection, not a product: a NaN that is not let through leaves no trace.
template <typename S>
__device__ Array<S, kOctet> keep(Array<S, kOctet> values, uint32_t bits) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) values[i] = bits >> i & 1 ? values[i] : S(0);
  return values;
}

// The bits of the elements that exist.
__device__ inline uint8_t padded(uint32_t bits, const Place& place) {
  return uint8_t(bits & ((1u << place.elements) - 1));
}

__device__ inline float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fma_rn(double a, double b, double c) { return __fma_rn(a, b, c); }

// Of 1 it is 1, which rsqrt does not promise: without a norm, x is to stay what it is.
__device__ inline float rsqrt_rn(float x) { return __frsqrt_rn(x); }
__device__ inline double rsqrt_rn(double x) { return 1 / sqrt(x); }

}  // namespace fusedskip::cuda

// Pack: as many vector registers of numbers as elements lie in a register in memory, and 8 lanes or
// more, for whole bytes of mask.
//
// Included by one source file an instruction set, which defines FUSEDSKIP_ISA (the namespace) and
// one of FUSEDSKIP_AVX512, FUSEDSKIP_AVX2 or neither. Plain arithmetic uses the compiler's vector
// types; intrinsics stand where those have no word for it: fma, comparison to bits.

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "storage.h"

namespace fusedskip::cpu::FUSEDSKIP_ISA {

#if defined(FUSEDSKIP_AVX512)
inline constexpr int kVectorBytes = 64;
#elif defined(FUSEDSKIP_AVX2)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <typename S>
struct Native {
  typedef S type __attribute__((vector_size(kVectorBytes)));
};

// kVectors registers of numbers that are computed with.
template <typename S, int kRegisters>
struct Pack {
  using Scalar = S;
  using Vector = typename Native<S>::type;
  static constexpr int kVectors = kRegisters;
  static constexpr int kWidth = kVectorBytes / sizeof(S);
  static constexpr int kLanes = kVectors * kWidth;
  static constexpr int kMaskBytes = kLanes / 8;

  Vector v[kVectors];

  static Pack broadcast(S s) {
    Pack r;
    for (auto& v : r.v) v = s - Vector{};
    return r;
  }
};

constexpr int larger(int a, int b) { return a > b ? a : b; }

// Elements of T: whole bytes of mask, and in memory whole registers.
template <typename T, typename S = StatisticsOf<T>>
using PackOf = Pack<S, larger(8 * int(sizeof(S)) / kVectorBytes, int(sizeof(S) / sizeof(T)))>;

template <typename S, int n>
inline Pack<S, n> operator+(Pack<S, n> a, Pack<S, n> b) {
  for (int i = 0; i < n; ++i) a.v[i] += b.v[i];
  return a;
}

template <typename S, int n>
inline Pack<S, n> operator-(Pack<S, n> a, Pack<S, n> b) {
  for (int i = 0; i < n; ++i) a.v[i] -= b.v[i];
  return a;
}

template <typename S, int n>
inline Pack<S, n> operator*(Pack<S, n> a, Pack<S, n> b) {
  for (int i = 0; i < n; ++i) a.v[i] *= b.v[i];
  return a;
}

// One native vector: the operations that differ by instruction set.

template <typename V>
inline V fma_vector(V a, V b, V c) {
#if defined(FUSEDSKIP_AVX512)
  if constexpr (sizeof(a[0]) == 4)
    return _mm512_fmadd_ps(a, b, c);
  else
    return _mm512_fmadd_pd(a, b, c);
#elif defined(FUSEDSKIP_AVX2)
  if constexpr (sizeof(a[0]) == 4)
    return _mm256_fmadd_ps(a, b, c);
  else
    return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;  // forward and backward round alike, which is all that is asked
#endif
}

template <typename P>
inline P fma(P a, P b, P c) {
  for (int i = 0; i < P::kVectors; ++i) c.v[i] = fma_vector(a.v[i], b.v[i], c.v[i]);
  return c;
}

// Which lanes of a pack. Of a vector: a register of bits, or all the bits of each lane.
template <typename P>
struct Lanes {
#if defined(FUSEDSKIP_AVX512)
  using Vector = std::conditional_t<P::kWidth == 16, __mmask16, __mmask8>;
#else
  using Vector = decltype(typename P::Vector() <= typename P::Vector());
#endif

  Vector of[P::kVectors];
};

// Where not a <= threshold: true for NaN.
template <typename P>
inline Lanes<P> exceeds(P a, P threshold) {
  Lanes<P> lanes;
  for (int i = 0; i < P::kVectors; ++i) {
#if defined(FUSEDSKIP_AVX512)
    if constexpr (sizeof(typename P::Scalar) == 4)
      lanes.of[i] = _mm512_cmp_ps_mask(a.v[i], threshold.v[i], _CMP_NLE_UQ);
    else
      lanes.of[i] = _mm512_cmp_pd_mask(a.v[i], threshold.v[i], _CMP_NLE_UQ);
#else
    lanes.of[i] = ~(a.v[i] <= threshold.v[i]);
#endif
  }
  return lanes;
}

// The other lanes become 0.
template <typename P>
inline P keep(P a, Lanes<P> lanes) {
  for (int i = 0; i < P::kVectors; ++i) {
#if defined(FUSEDSKIP_AVX512)
    if constexpr (sizeof(typename P::Scalar) == 4)
      a.v[i] = _mm512_maskz_mov_ps(lanes.of[i], a.v[i]);
    else
      a.v[i] = _mm512_maskz_mov_pd(lanes.of[i], a.v[i]);
#else
    a.v[i] = typename P::Vector(typename Lanes<P>::Vector(a.v[i]) & lanes.of[i]);
#endif
  }
  return a;
}

// Bit i is lane i.

template <typename P>
inline uint32_t bits_of(Lanes<P> lanes) {
#if defined(FUSEDSKIP_AVX512)
  if constexpr (P::kVectors == 2 && P::kWidth == 16)
    return _mm512_kunpackw(lanes.of[1], lanes.of[0]);
#endif
  uint32_t bits = 0;
  for (int i = 0; i < P::kVectors; ++i) {
#if defined(FUSEDSKIP_AVX512)
    const uint32_t vector = lanes.of[i];
#elif defined(FUSEDSKIP_AVX2)
    uint32_t vector;
    if constexpr (sizeof(typename P::Scalar) == 4)
      vector = _mm256_movemask_ps(__m256(lanes.of[i]));
    else
      vector = _mm256_movemask_pd(__m256d(lanes.of[i]));
#else
    uint32_t vector = 0;
    for (int lane = 0; lane < P::kWidth; ++lane) vector |= (lanes.of[i][lane] & 1u) << lane;
#endif
    bits |= vector << i * P::kWidth;
  }
  return bits;
}

template <typename P>
[[gnu::always_inline]] inline Lanes<P> lanes_of(uint32_t bits) {
  using V = typename Lanes<P>::Vector;
  Lanes<P> lanes;
  for (int i = 0; i < P::kVectors; ++i) {
    const uint32_t vector = bits >> i * P::kWidth;
#if defined(FUSEDSKIP_AVX512)
    lanes.of[i] = V(vector);
#else
    V lane;
    for (int l = 0; l < P::kWidth; ++l) lane[l] = 1 << l;
    lanes.of[i] = ((int(vector) - V{}) & lane) == lane;
#endif
  }
  return lanes;
}

// By halves, which stay in registers: by way of memory, backward of 1x4096x2x2 took 1.2 of the
// time.
template <typename V>
inline auto sum_of_vector(V v) {
#if defined(FUSEDSKIP_AVX512)
  if constexpr (sizeof(v[0]) == 4)
    return _mm512_reduce_add_ps(v);
  else
    return _mm512_reduce_add_pd(v);
#elif defined(FUSEDSKIP_AVX2)
  if constexpr (sizeof(v[0]) == 4) {
    const __m128 half = _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1);
    return (half[0] + half[2]) + (half[1] + half[3]);
  } else {
    const __m128d half = _mm256_castpd256_pd128(v) + _mm256_extractf128_pd(v, 1);
    return half[0] + half[1];
  }
#else
  if constexpr (sizeof(v[0]) == 4)
    return (v[0] + v[2]) + (v[1] + v[3]);
  else
    return v[0] + v[1];
#endif
}

template <typename S, int n>
inline S sum(Pack<S, n> a) {
  for (int half = n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  return sum_of_vector(a.v[0]);
}

}  // namespace fusedskip::cpu::FUSEDSKIP_ISA

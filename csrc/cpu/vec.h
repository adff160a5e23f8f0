// Pack<S>: the least number of vector registers that holds whole bytes of mask, 8 lanes or more.
//
// Included by one source file an instruction set, which defines FUSEDSKIP_ISA (the namespace) and
// one of FUSEDSKIP_AVX512, FUSEDSKIP_AVX2 or neither. Plain arithmetic uses the compiler's vector
// types; intrinsics stand where those have no word for it: fma, comparison to bits, conversion,
// tails.

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
struct Native;
template <>
struct Native<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Native<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};

template <typename S>
struct Pack {
  using Vector = typename Native<S>::type;
  static constexpr int kWidth = kVectorBytes / sizeof(S);
  static constexpr int kLanes = kWidth < 8 ? 8 : kWidth;
  static constexpr int kVectors = kLanes / kWidth;
  static constexpr int kMaskBytes = kLanes / 8;

  Vector v[kVectors];

  static Pack broadcast(S s) {
    Pack r;
    for (auto& v : r.v) v = s - Vector{};
    return r;
  }
};

template <typename S>
inline Pack<S> operator+(Pack<S> a, Pack<S> b) {
  for (int i = 0; i < Pack<S>::kVectors; ++i) a.v[i] += b.v[i];
  return a;
}

template <typename S>
inline Pack<S> operator-(Pack<S> a, Pack<S> b) {
  for (int i = 0; i < Pack<S>::kVectors; ++i) a.v[i] -= b.v[i];
  return a;
}

template <typename S>
inline Pack<S> operator*(Pack<S> a, Pack<S> b) {
  for (int i = 0; i < Pack<S>::kVectors; ++i) a.v[i] *= b.v[i];
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

// Bit i: not (v[i] <= threshold). True for NaN.
template <typename V>
inline uint32_t exceeds_vector(V v, V threshold) {
#if defined(FUSEDSKIP_AVX512)
  if constexpr (sizeof(v[0]) == 4)
    return _mm512_cmp_ps_mask(v, threshold, _CMP_NLE_UQ);
  else
    return _mm512_cmp_pd_mask(v, threshold, _CMP_NLE_UQ);
#elif defined(FUSEDSKIP_AVX2)
  if constexpr (sizeof(v[0]) == 4)
    return _mm256_movemask_ps(_mm256_cmp_ps(v, threshold, _CMP_NLE_UQ));
  else
    return _mm256_movemask_pd(_mm256_cmp_pd(v, threshold, _CMP_NLE_UQ));
#else
  constexpr int kWidth = kVectorBytes / sizeof(v[0]);
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= uint32_t(!(v[i] <= threshold[i])) << i;
  return bits;
#endif
}

// v where the bit is set, else 0.
template <typename V>
inline V keep_vector(V v, uint32_t bits) {
#if defined(FUSEDSKIP_AVX512)
  // In a register first: compilers would make one masked load of a load and this, with which Zen 5
  // reads no more than two thirds of what it else does.
  asm("" : "+v"(v));
  if constexpr (sizeof(v[0]) == 4)
    return _mm512_maskz_mov_ps(__mmask16(bits), v);
  else
    return _mm512_maskz_mov_pd(__mmask8(bits), v);
#elif defined(FUSEDSKIP_AVX2)
  if constexpr (sizeof(v[0]) == 4) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(bits), lane);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
  } else {
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi64x(bits), lane);
    return _mm256_and_pd(v, _mm256_castsi256_pd(_mm256_cmpeq_epi64(set, lane)));
  }
#else
  constexpr int kWidth = kVectorBytes / sizeof(v[0]);
  for (int i = 0; i < kWidth; ++i) v[i] = bits >> i & 1 ? v[i] : 0;
  return v;
#endif
}

// v where a exceeds the threshold, else 0. On AVX2 the comparison is the mask: by way of bits it
// would be five instructions more, and bf16 apply 1.2 times as long.
template <typename V>
inline V keep_where_exceeds_vector(V v, V a, V threshold) {
#if defined(FUSEDSKIP_AVX2)
  if constexpr (sizeof(v[0]) == 4)
    return _mm256_and_ps(v, _mm256_cmp_ps(a, threshold, _CMP_NLE_UQ));
  else
    return _mm256_and_pd(v, _mm256_cmp_pd(a, threshold, _CMP_NLE_UQ));
#else
  return keep_vector(v, exceeds_vector(a, threshold));
#endif
}

template <typename S>
inline Pack<S> fma(Pack<S> a, Pack<S> b, Pack<S> c) {
  for (int i = 0; i < Pack<S>::kVectors; ++i) c.v[i] = fma_vector(a.v[i], b.v[i], c.v[i]);
  return c;
}

template <typename S>
inline uint32_t exceeds(Pack<S> a, Pack<S> threshold) {
  uint32_t bits = 0;
  for (int i = 0; i < Pack<S>::kVectors; ++i)
    bits |= exceeds_vector(a.v[i], threshold.v[i]) << (i * Pack<S>::kWidth);
  return bits;
}

template <typename S>
inline Pack<S> keep(Pack<S> a, uint32_t bits) {
  for (int i = 0; i < Pack<S>::kVectors; ++i)
    a.v[i] = keep_vector(a.v[i], bits >> (i * Pack<S>::kWidth));
  return a;
}

template <typename S>
inline Pack<S> keep_where_exceeds(Pack<S> v, Pack<S> a, Pack<S> threshold) {
  for (int i = 0; i < Pack<S>::kVectors; ++i)
    v.v[i] = keep_where_exceeds_vector(v.v[i], a.v[i], threshold.v[i]);
  return v;
}

// By halves: one after the other, 16 lanes take 64 cycles, several times for each channel.
template <typename S>
inline S sum(Pack<S> a) {
  S lanes[Pack<S>::kLanes];
  std::memcpy(lanes, &a, sizeof(a));
  for (int half = Pack<S>::kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Loads and stores of whole packs, widening from and rounding to the storage type.

template <typename S>
  requires std::is_floating_point_v<S>
inline Pack<S> load(const S* p) {
  Pack<S> r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}

template <typename S>
  requires std::is_floating_point_v<S>
inline void store(S* p, Pack<S> a) {
  std::memcpy(p, &a, sizeof(a));
}

#if defined(FUSEDSKIP_AVX512)
// What 16 bf16 take beside memory is their conversion. A shuffle of bytes is one instruction, where
// widening and shifting are two, shifting and narrowing three. With rounding's own bit tested, a
// store is 5 instructions instead of 9: out of L1, the four stages of BN+add+ReLU take 8.9 ns for
// 16 elements instead of 12. vcvtneps2bf16 would be 2, but takes subnormal numbers for 0.
struct Bytes {
  alignas(64) uint8_t from[64];

  constexpr explicit Bytes(auto from_of_byte) {
    for (int i = 0; i < 64; ++i) from[i] = uint8_t(from_of_byte(i));
  }
  __m512i vector() const { return _mm512_load_si512(from); }
};
inline constexpr Bytes kWidening([](int i) { return i / 4 * 2 + i % 2; });
inline constexpr Bytes kNarrowing([](int i) { return (i / 2 * 4 + 2 + i % 2) % 64; });
inline constexpr __mmask64 kUpperHalves = 0xcccccccccccccccc;
#endif

inline Pack<float> load(const BFloat16* p) {
  Pack<float> r;
#if defined(FUSEDSKIP_AVX512)
  const __m512i words = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
  const __m512i wide = _mm512_maskz_permutexvar_epi8(kUpperHalves, kWidening.vector(), words);
  r.v[0] = _mm512_castsi512_ps(wide);
#elif defined(FUSEDSKIP_AVX2)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  r.v[0] = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
#else
  for (int i = 0; i < Pack<float>::kLanes; ++i)
    r.v[i / Pack<float>::kWidth][i % Pack<float>::kWidth] = widen(p[i]);
#endif
  return r;
}

// Rounds to nearest even on the integer bits: adds 0x7fff, and 1 to what is odd. That could carry a
// NaN into 0, so it is left as it is: arithmetic makes NaN quiet, and the bit for that stays.
inline void store(BFloat16* p, Pack<float> a) {
#if defined(FUSEDSKIP_AVX512)
  const __m512i bits = _mm512_castps_si512(a.v[0]);
  const __mmask16 number = _mm512_cmp_ps_mask(a.v[0], a.v[0], _CMP_ORD_Q);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(number, bits, _mm512_set1_epi32(0x10000));
  __m512i rounded = _mm512_mask_add_epi32(bits, number, bits, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_sub_epi32(rounded, odd, rounded, _mm512_set1_epi32(-1));
  const __m512i words = _mm512_permutexvar_epi8(kNarrowing.vector(), rounded);
  _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(words));
#elif defined(FUSEDSKIP_AVX2)
  const __m256i bits = _mm256_castps_si256(a.v[0]);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256 number = _mm256_cmp_ps(a.v[0], a.v[0], _CMP_ORD_Q);
  const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_and_si256(up, _mm256_castps_si256(number)));
  rounded = _mm256_srli_epi32(rounded, 16);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(rounded),
                                                 _mm256_extracti128_si256(rounded, 1)));
#else
  for (int i = 0; i < Pack<float>::kLanes; ++i)
    p[i] = narrow<BFloat16>(a.v[i / Pack<float>::kWidth][i % Pack<float>::kWidth]);
#endif
}

inline Pack<float> load(const Float16* p) {
  Pack<float> r;
#if defined(FUSEDSKIP_AVX512)
  r.v[0] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(FUSEDSKIP_AVX2)
  r.v[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  for (int i = 0; i < Pack<float>::kLanes; ++i)
    r.v[i / Pack<float>::kWidth][i % Pack<float>::kWidth] = widen(p[i]);
#endif
  return r;
}

inline void store(Float16* p, Pack<float> a) {
#if defined(FUSEDSKIP_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v[0], _MM_FROUND_TO_NEAREST_INT));
#elif defined(FUSEDSKIP_AVX2)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.v[0], _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < Pack<float>::kLanes; ++i)
    p[i] = narrow<Float16>(a.v[i / Pack<float>::kWidth][i % Pack<float>::kWidth]);
#endif
}

// A store past the caches, which saves reading the line that it overwrites. For whole packs, each
// aligned to its size; `order_streams` before another thread may look.
template <typename T, typename S>
inline void stream(T* p, Pack<S> a) {
#if defined(__x86_64__)
  constexpr int kBytes = Pack<S>::kLanes * sizeof(T);
  alignas(64) char line[kBytes];
  store(reinterpret_cast<T*>(line), a);
  char* to = reinterpret_cast<char*>(p);
  constexpr int kStep = kBytes < kVectorBytes ? kBytes : kVectorBytes;
  for (int i = 0; i < kBytes; i += kStep) {
#if defined(FUSEDSKIP_AVX512)
    if constexpr (kStep == 64) _mm512_stream_si512((__m512i*)(to + i), *(__m512i*)(line + i));
#endif
#if defined(FUSEDSKIP_AVX512) || defined(FUSEDSKIP_AVX2)
    if constexpr (kStep == 32) _mm256_stream_si256((__m256i*)(to + i), *(__m256i*)(line + i));
#endif
    if constexpr (kStep == 16) _mm_stream_si128((__m128i*)(to + i), *(__m128i*)(line + i));
  }
#else
  store(p, a);
#endif
}

inline void order_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// A loop over them would become a call of memcpy, which takes longer than all the rest of a tail.
template <int kLanes, typename T>
inline void copy_first(T* to, const T* from, int n) {
  int i = 0;
  for (int step = kLanes / 2; step > 0; step /= 2)
    if (n & step) {
      std::memcpy(to + i, from + i, step * sizeof(T));
      i += step;
    }
}

// The first n < kLanes elements; the other lanes load as 0 and are not stored.

template <typename T>
inline auto load(const T* p, int n) {
  using P = decltype(load(p));
  alignas(64) T lanes[P::kLanes] = {};
#if defined(FUSEDSKIP_AVX512)
  const uint32_t first = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) _mm512_store_epi64(lanes, _mm512_maskz_loadu_epi64(first, p));
  if constexpr (sizeof(T) == 4) _mm512_store_epi32(lanes, _mm512_maskz_loadu_epi32(first, p));
  if constexpr (sizeof(T) == 2)
    _mm256_store_si256((__m256i*)lanes, _mm256_maskz_loadu_epi16(first, p));
#else
  copy_first<P::kLanes>(lanes, p, n);
#endif
  return load(lanes);
}

template <typename T, typename S>
inline void store(T* p, Pack<S> a, int n) {
  alignas(64) T lanes[Pack<S>::kLanes];
  store(lanes, a);
#if defined(FUSEDSKIP_AVX512)
  const uint32_t first = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_epi64(p, first, _mm512_load_epi64(lanes));
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(p, first, _mm512_load_epi32(lanes));
  if constexpr (sizeof(T) == 2)
    _mm256_mask_storeu_epi16(p, first, _mm256_load_si256((const __m256i*)lanes));
#else
  copy_first<Pack<S>::kLanes>(p, lanes, n);
#endif
}

}  // namespace fusedskip::cpu::FUSEDSKIP_ISA

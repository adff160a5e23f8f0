// Pack: as many vector registers of numbers as elements lie in a register in memory, and 8 lanes or
// more, for whole bytes of mask.
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

// By halves: one after the other, 16 lanes take 64 cycles, several times for each channel.
template <typename P>
inline auto sum(P a) {
  typename P::Scalar lanes[P::kLanes];
  std::memcpy(lanes, &a, sizeof(a));
  for (int half = P::kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// A pack as it lies in memory, widened from and rounded to the storage type.

using Register = long long __attribute__((vector_size(kVectorBytes)));
using InMemory = Register __attribute__((aligned(1), may_alias));

template <typename T>
struct Stored {
  static constexpr int kLanes = PackOf<T>::kLanes, kRegisters = kLanes * sizeof(T) / kVectorBytes;

  Register r[kRegisters];
};

template <typename T>
inline Stored<T> load_stored(const T* p) {
  Stored<T> a;
  for (int i = 0; i < a.kRegisters; ++i) a.r[i] = reinterpret_cast<const InMemory*>(p)[i];
  return a;
}

template <typename T>
  requires std::is_floating_point_v<T>
inline PackOf<T> widened(Stored<T> a) {
  PackOf<T> r;
  for (int i = 0; i < r.kVectors; ++i) r.v[i] = typename PackOf<T>::Vector(a.r[i]);
  return r;
}

template <typename T>
  requires std::is_floating_point_v<T>
inline Stored<T> stored(PackOf<T> a) {
  Stored<T> r;
  for (int i = 0; i < r.kRegisters; ++i) r.r[i] = Register(a.v[i]);
  return r;
}

#if defined(FUSEDSKIP_AVX512)

// Constants of a register, in memory: compilers would make those of a word anew in every turn of a
// loop.
template <typename Word>
struct Words {
  alignas(64) Word words[64 / sizeof(Word)];

  constexpr explicit Words(auto word_at) {
    for (int i = 0; i < int(sizeof(words) / sizeof(Word)); ++i) words[i] = Word(word_at(i));
  }
  operator __m512i() const {
    __m512i v = _mm512_load_si512(words);
    asm("" : "+v"(v));
    return v;
  }
};

// Besides memory, the conversion is most of what bf16 takes. A shuffle of bytes widens or narrows
// in one instruction. GCC would load the words for either shuffle, and make the mask in every turn.
inline PackOf<BFloat16> widened(Stored<BFloat16> a) {
  static constexpr Words<uint8_t> kLow([](int i) { return i / 4 * 2 + i % 2; });
  static constexpr Words<uint8_t> kHigh([](int i) { return 32 + i / 4 * 2 + i % 2; });
  __mmask64 upper_halves = 0xcccccccccccccccc;
  asm("" : "+Yk"(upper_halves));
  asm("" : "+v"(a.r[0]));
  return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi8(upper_halves, kLow, a.r[0])),
          _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi8(upper_halves, kHigh, a.r[0]))};
}

// Rounds to nearest even on 32 upper and 32 lower halves: up where the lower is more than 0x8000,
// or no less and the upper odd. Not from 0x7fff, a NaN, which would become 0: other NaN stay NaN,
// as arithmetic makes them quiet. Comparisons to masks would be fewer instructions, and no faster;
// vcvtneps2bf16 takes subnormal numbers for 0. BN+add+ReLU's bwd_apply out of L1 takes 1.4 ns for
// 16 elements, where pack by pack, with masks, it took 1.9.
template <typename T>
  requires std::is_same_v<T, BFloat16>
inline Stored<T> stored(PackOf<T> a) {
  static constexpr Words<uint8_t> kUpper([](int i) { return i / 2 * 4 + 2 + i % 2; });
  static constexpr Words<uint8_t> kLower([](int i) { return i / 2 * 4 + i % 2; });
  static constexpr Words<uint16_t> kOne([](int) { return 1; });
  static constexpr Words<uint16_t> kHalf([](int) { return 0x8000; });
  static constexpr Words<uint16_t> kLargest([](int) { return 0x7fff; });
  const __m512i low = _mm512_castps_si512(a.v[0]), high = _mm512_castps_si512(a.v[1]);
  const __m512i upper = _mm512_permutex2var_epi8(low, kUpper, high);
  const __m512i lower = _mm512_permutex2var_epi8(low, kLower, high);
  constexpr int kFirstOrBothOthers = 0xf8;
  const __m512i sticky = _mm512_ternarylogic_epi32(lower, upper, kOne, kFirstOrBothOthers);
  const __m512i up = _mm512_min_epu16(_mm512_subs_epu16(sticky, kHalf), kOne);
  const __m512i room = _mm512_andnot_si512(upper, kLargest);
  return {_mm512_add_epi16(upper, _mm512_min_epu16(up, room))};
}

inline PackOf<Float16> widened(Stored<Float16> a) {
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(a.r[0])),
          _mm512_cvtph_ps(_mm512_extracti64x4_epi64(a.r[0], 1))};
}

template <typename T>
  requires std::is_same_v<T, Float16>
inline Stored<T> stored(PackOf<T> a) {
  const __m256i low = _mm512_cvtps_ph(a.v[0], _MM_FROUND_TO_NEAREST_INT);
  const __m256i high = _mm512_cvtps_ph(a.v[1], _MM_FROUND_TO_NEAREST_INT);
  return {_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)};
}

#elif defined(FUSEDSKIP_AVX2)

inline __m256 widened(__m128i a, BFloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
}

inline __m256 widened(__m128i a, Float16) { return _mm256_cvtph_ps(a); }

template <typename T>
  requires(sizeof(T) == 2)
inline PackOf<T> widened(Stored<T> a) {
  return {widened(_mm256_castsi256_si128(a.r[0]), T()),
          widened(_mm256_extracti128_si256(a.r[0], 1), T())};
}

// Rounds to nearest even on the integer bits: adds 0x7fff, and 1 to what is odd. That could carry a
// NaN into 0, so it is left as it is: arithmetic makes NaN quiet, and the bit for that stays.
inline __m256i rounded_halves(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256 number = _mm256_cmp_ps(v, v, _CMP_ORD_Q);
  const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_and_si256(up, _mm256_castps_si256(number)));
  return _mm256_srli_epi32(sum, 16);
}

template <typename T>
  requires std::is_same_v<T, BFloat16>
inline Stored<T> stored(PackOf<T> a) {
  // Packs the halves of registers apart.
  const __m256i words = _mm256_packus_epi32(rounded_halves(a.v[0]), rounded_halves(a.v[1]));
  return {_mm256_permute4x64_epi64(words, 0b11011000)};
}

template <typename T>
  requires std::is_same_v<T, Float16>
inline Stored<T> stored(PackOf<T> a) {
  return {_mm256_set_m128i(_mm256_cvtps_ph(a.v[1], _MM_FROUND_TO_NEAREST_INT),
                           _mm256_cvtps_ph(a.v[0], _MM_FROUND_TO_NEAREST_INT))};
}

#else

template <typename T>
  requires(sizeof(T) == 2)
inline PackOf<T> widened(Stored<T> a) {
  PackOf<T> r;
  T elements[Stored<T>::kLanes];
  std::memcpy(elements, &a, sizeof(a));
  for (int i = 0; i < Stored<T>::kLanes; ++i) r.v[i / r.kWidth][i % r.kWidth] = widen(elements[i]);
  return r;
}

template <typename T>
  requires(sizeof(T) == 2)
inline Stored<T> stored(PackOf<T> a) {
  T elements[Stored<T>::kLanes];
  for (int i = 0; i < Stored<T>::kLanes; ++i)
    elements[i] = narrow<T>(a.v[i / a.kWidth][i % a.kWidth]);
  return load_stored(elements);
}

#endif

// A loop over them would become a call of memcpy, which takes longer than all the rest of a tail.
template <int kLanes, typename T>
inline void copy_first(T* to, const T* from, int n) {
  int i = 0;
  for (int step = kLanes; step > 0; step /= 2)
    if (n & step) {
      std::memcpy(to + i, from + i, step * sizeof(T));
      i += step;
    }
}

// The first n elements, of a pack at most; the other lanes load as 0 and are not stored.

template <typename T>
inline Stored<T> load_stored(const T* p, int n) {
#if defined(FUSEDSKIP_AVX512)
  const uint32_t first = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) return {_mm512_maskz_loadu_epi64(first, p)};
  if constexpr (sizeof(T) == 4) return {_mm512_maskz_loadu_epi32(first, p)};
  if constexpr (sizeof(T) == 2) return {_mm512_maskz_loadu_epi16(first, p)};
#else
  T elements[Stored<T>::kLanes] = {};
  copy_first<Stored<T>::kLanes>(elements, p, n);
  return load_stored(elements);
#endif
}

template <typename T>
inline void store(T* p, PackOf<T> a, int n) {
  const Stored<T> s = stored<T>(a);
#if defined(FUSEDSKIP_AVX512)
  const uint32_t first = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_epi64(p, first, s.r[0]);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(p, first, s.r[0]);
  if constexpr (sizeof(T) == 2) _mm512_mask_storeu_epi16(p, first, s.r[0]);
#else
  T elements[Stored<T>::kLanes];
  std::memcpy(elements, &s, sizeof(s));
  copy_first<Stored<T>::kLanes>(p, elements, n);
#endif
}

template <typename T>
inline void store(T* p, PackOf<T> a) {
  const Stored<T> s = stored<T>(a);
  for (int i = 0; i < s.kRegisters; ++i) reinterpret_cast<InMemory*>(p)[i] = s.r[i];
}

// A store past the caches, which saves reading the line that it overwrites: to addresses that are
// whole registers; `order_streams` before another thread may look.
template <typename T>
inline void stream(T* p, PackOf<T> a) {
#if defined(__x86_64__)
  const Stored<T> s = stored<T>(a);
  Register* to = reinterpret_cast<Register*>(p);
  for (int i = 0; i < Stored<T>::kRegisters; ++i) {
#if defined(FUSEDSKIP_AVX512)
    _mm512_stream_si512(to + i, s.r[i]);
#elif defined(FUSEDSKIP_AVX2)
    _mm256_stream_si256(to + i, s.r[i]);
#else
    _mm_stream_si128(to + i, s.r[i]);
#endif
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

template <typename T, typename... N>
inline PackOf<T> load(const T* p, N... n) {
  return widened(load_stored(p, n...));
}

// keep(load(p), lanes). In a register first: compilers would make a masked load of both, with which
// Zen 5 reads no more than two thirds of what it else does.
template <typename T, typename... N>
inline PackOf<T> load_kept(const T* p, Lanes<PackOf<T>> lanes, N... n) {
  Stored<T> a = load_stored(p, n...);
#if defined(FUSEDSKIP_AVX512)
  asm("" : "+v"(a.r[0]));
#endif
  return keep(widened(a), lanes);
}

// The same by bits: those of 16-bit elements before they are widened, which is half the work.
template <typename T, typename... N>
[[gnu::always_inline]] inline PackOf<T> load_kept(const T* p, uint32_t bits, N... n) {
#if defined(FUSEDSKIP_AVX512)
  if constexpr (sizeof(T) == 2) {
    Stored<T> a = load_stored(p, n...);
    asm("" : "+v"(a.r[0]));
    return widened(Stored<T>{_mm512_maskz_mov_epi16(bits, a.r[0])});
  }
#endif
  return load_kept(p, lanes_of<PackOf<T>>(bits), n...);
}

// Numbers as they are computed with, for the lanes of a P, which may be more than a pack of them.

template <typename P>
inline P load_lanes(const typename P::Scalar* p) {
  P r;
  for (int i = 0; i < P::kVectors; ++i)
    r.v[i] = typename P::Vector(reinterpret_cast<const InMemory*>(p)[i]);
  return r;
}

template <typename P>
inline P load_lanes(const typename P::Scalar* p, int n) {
  using Part = PackOf<typename P::Scalar>;
  Part parts[P::kVectors / Part::kVectors];
  for (Part& part : parts) {
    part = load(p, n < 0 ? 0 : n < Part::kLanes ? n : Part::kLanes);
    p += Part::kLanes;
    n -= Part::kLanes;
  }
  P r;
  std::memcpy(&r, parts, sizeof(r));
  return r;
}

template <typename P>
inline void store_lanes(typename P::Scalar* p, P a) {
  for (int i = 0; i < P::kVectors; ++i) reinterpret_cast<InMemory*>(p)[i] = Register(a.v[i]);
}

}  // namespace fusedskip::cpu::FUSEDSKIP_ISA

// Packs of a storage type as they lie in memory, widened to the numbers that are computed with and
// narrowed to what is stored: by the instructions for it where a processor has them, else an
// element at a time.

#pragma once

#include "pack.h"

namespace fusedskip::cpu::FUSEDSKIP_ISA {

using cpu::narrow;
using cpu::widen;

using Register = long long __attribute__((vector_size(kVectorBytes)));

// An integer of the size of T.
template <typename T>
using WordOf = std::conditional_t<sizeof(T) == 8, int64_t,
                                  std::conditional_t<sizeof(T) == 4, int32_t, int16_t>>;

// A pack as it lies in memory.
template <typename T>
struct Stored {
  static constexpr int kLanes = PackOf<T>::kLanes, kRegisters = kLanes * sizeof(T) / kVectorBytes;

  Register r[kRegisters];
};

template <typename T>
  requires std::is_floating_point_v<T>
inline PackOf<T> widen(Stored<T> a) {
  PackOf<T> r;
  for (int i = 0; i < r.kVectors; ++i) r.v[i] = typename PackOf<T>::Vector(a.r[i]);
  return r;
}

template <typename T>
  requires std::is_floating_point_v<T>
inline Stored<T> narrow(PackOf<T> a) {
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
inline PackOf<BFloat16> widen(Stored<BFloat16> a) {
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
inline Stored<T> narrow(PackOf<T> a) {
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

inline PackOf<Float16> widen(Stored<Float16> a) {
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(a.r[0])),
          _mm512_cvtph_ps(_mm512_extracti64x4_epi64(a.r[0], 1))};
}

template <typename T>
  requires std::is_same_v<T, Float16>
inline Stored<T> narrow(PackOf<T> a) {
  const __m256i low = _mm512_cvtps_ph(a.v[0], _MM_FROUND_TO_NEAREST_INT);
  const __m256i high = _mm512_cvtps_ph(a.v[1], _MM_FROUND_TO_NEAREST_INT);
  return {_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)};
}

#elif defined(FUSEDSKIP_AVX2)

inline __m256 widen(__m128i a, BFloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
}

inline __m256 widen(__m128i a, Float16) { return _mm256_cvtph_ps(a); }

template <typename T>
  requires(sizeof(T) == 2)
inline PackOf<T> widen(Stored<T> a) {
  return {widen(_mm256_castsi256_si128(a.r[0]), T()),
          widen(_mm256_extracti128_si256(a.r[0], 1), T())};
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
inline Stored<T> narrow(PackOf<T> a) {
  // Packs the halves of registers apart.
  const __m256i words = _mm256_packus_epi32(rounded_halves(a.v[0]), rounded_halves(a.v[1]));
  return {_mm256_permute4x64_epi64(words, 0b11011000)};
}

template <typename T>
  requires std::is_same_v<T, Float16>
inline Stored<T> narrow(PackOf<T> a) {
  return {_mm256_set_m128i(_mm256_cvtps_ph(a.v[1], _MM_FROUND_TO_NEAREST_INT),
                           _mm256_cvtps_ph(a.v[0], _MM_FROUND_TO_NEAREST_INT))};
}

#else

template <typename T>
  requires(sizeof(T) == 2)
inline PackOf<T> widen(Stored<T> a) {
  PackOf<T> r;
  T elements[Stored<T>::kLanes];
  std::memcpy(elements, &a, sizeof(a));
  for (int i = 0; i < Stored<T>::kLanes; ++i) r.v[i / r.kWidth][i % r.kWidth] = widen(elements[i]);
  return r;
}

template <typename T>
  requires(sizeof(T) == 2)
inline Stored<T> narrow(PackOf<T> a) {
  Stored<T> r;
  T elements[Stored<T>::kLanes];
  for (int i = 0; i < Stored<T>::kLanes; ++i)
    elements[i] = narrow<T>(a.v[i / a.kWidth][i % a.kWidth]);
  std::memcpy(&r, elements, sizeof(r));
  return r;
}

#endif

// Elements whose bit is not set become 0.
template <typename T>
[[gnu::always_inline]] inline Stored<T> keep(Stored<T> a, uint32_t bits) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  for (int i = 0; i < a.kRegisters; ++i) {
    const uint32_t of_register = bits >> i * kWidth;
#if defined(FUSEDSKIP_AVX512)
    if constexpr (sizeof(T) == 8) a.r[i] = _mm512_maskz_mov_epi64(of_register, a.r[i]);
    if constexpr (sizeof(T) == 4) a.r[i] = _mm512_maskz_mov_epi32(of_register, a.r[i]);
    if constexpr (sizeof(T) == 2) a.r[i] = _mm512_maskz_mov_epi16(of_register, a.r[i]);
#else
    typename Native<WordOf<T>>::type bit;
    for (int lane = 0; lane < kWidth; ++lane) bit[lane] = WordOf<T>(1) << lane;
    a.r[i] &= Register((WordOf<T>(of_register) & bit) == bit);
#endif
  }
  return a;
}

}  // namespace fusedskip::cpu::FUSEDSKIP_ISA

// Loads and stores of packs: whole, or the first n elements of one at a run's end.

#pragma once

#include "convert.h"

namespace fusedskip::cpu::FUSEDSKIP_ISA {

using InMemory = Register __attribute__((aligned(1), may_alias));

template <typename T>
inline Stored<T> load_stored(const T* p) {
  Stored<T> a;
  for (int i = 0; i < a.kRegisters; ++i) a.r[i] = reinterpret_cast<const InMemory*>(p)[i];
  return a;
}

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
inline void store(T* p, Stored<T> s, int n) {
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
inline void store(T* p, Stored<T> s) {
  for (int i = 0; i < s.kRegisters; ++i) reinterpret_cast<InMemory*>(p)[i] = s.r[i];
}

// A store past the caches, which saves reading the line that it overwrites: to addresses that are
// whole registers; `order_streams` before another thread may look.
template <typename T>
inline void stream(T* p, Stored<T> s) {
#if defined(__x86_64__)
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
  store(p, s);
#endif
}

inline void order_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <typename T, typename... N>
inline PackOf<T> load(const T* p, N... n) {
  return widen(load_stored(p, n...));
}

// Between a load and `keep`: compilers would make a masked load of both, with which Zen 5 reads no
// more than two thirds of what it else does.
template <typename T>
[[gnu::always_inline]] inline Stored<T> in_register(Stored<T> a) {
#if defined(FUSEDSKIP_AVX512)
  asm("" : "+v"(a.r[0]));
#endif
  return a;
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

// The 16-bit storage types, one element at a time, without any instruction set.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fusedskip::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Statistics, coefficients and sums of tensors of T.
template <typename T>
using StatisticsOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The largest number that is stored as 0 or less: half the least subnormal, which ties to even.
template <typename T>
inline constexpr StatisticsOf<T> kLargestStoredAsZero = 0;
template <>
inline constexpr float kLargestStoredAsZero<BFloat16> = 0x1p-134f;
template <>
inline constexpr float kLargestStoredAsZero<Float16> = 0x1p-25f;

template <typename S>
  requires std::is_floating_point_v<S>
inline S widen(S value) {
  return value;
}

inline float widen(BFloat16 value) { return std::bit_cast<float>(uint32_t(value.bits) << 16); }

// Not inlined: the copies would be most of the code of a processor without conversions of its own.
[[gnu::noinline]] inline float widen(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t exponent = value.bits >> 10 & 0x1f, fraction = value.bits & 0x3ff;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000 | fraction << 13);
  const float magnitude = exponent == 0 ? std::ldexp(float(fraction), -24)
                                        : std::ldexp(float(fraction | 0x400), int(exponent) - 25);
  return sign ? -magnitude : magnitude;
}

// Rounds to nearest even.
template <typename T>
  requires std::is_floating_point_v<T>
inline T narrow(double value) {
  return T(value);
}

template <typename T>
[[gnu::noinline]] inline T narrow(double value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = std::bit_cast<uint32_t>(float(value));
    if (std::isnan(value)) return {0x7fc0};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return {uint16_t(sign | 0x7e00)};
    const float magnitude = std::fabs(float(value));
    if (magnitude == 0) return {sign};
    if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    int exponent = 0;
    std::frexp(magnitude, &exponent);  // magnitude = m·2^exponent, 0.5 <= m < 1
    // One unit in the last place is 2^(exponent - 11), or 2^-24 among the subnormals.
    const int ulp = exponent - 11 < -24 ? -24 : exponent - 11;
    const auto units = uint16_t(std::nearbyint(std::ldexp(magnitude, -ulp)));
    // Units carry into the exponent field by themselves: 0x400 units at ulp 2^-24 are 2^-14.
    return {uint16_t(sign | ((uint32_t(ulp + 24) << 10) + units))};
  }
}

}  // namespace fusedskip::cpu

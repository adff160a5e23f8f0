// Walks over the runs of a tile, a pack of lanes at a time. Coefficients are broadcast over a
// channel's run, or loaded lane by lane along a row.

#pragma once

#include "kernels.h"
#include "load_store.h"

namespace fusedskip::cpu::FUSEDSKIP_ISA {

// The coefficients of the lanes from element i of a run on; n < kLanes of them near a run's end.
template <typename P, bool kPerLane>
struct Coefficient {
  using S = typename P::Scalar;
  const S* p;

  explicit Coefficient(const void* coefficients, int64_t = 0)
      : p(static_cast<const S*>(coefficients)) {}

  template <typename... N>
  P at(int64_t i, N... n) const {
    return load_lanes<P>(p + i, n...);
  }
};

// One number for all lanes; absent it is 0.
template <typename P>
struct Coefficient<P, false> {
  using S = typename P::Scalar;
  P all;

  explicit Coefficient(const void* p, int64_t channel = 0)
      : all(P::broadcast(p ? static_cast<const S*>(p)[channel] : 0)) {}

  template <typename... N>
  P at(int64_t, N...) const {
    return all;
  }
};

// Calls body(i, n...) over a run: n is left out for whole packs and given for the rest.
template <int kLanes, typename Body>
inline void for_each_pack(int64_t length, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) body(i);
  if (i < length) body(i, int(length - i));
}

// Likewise body(k, i, n...), k going round the accumulators of the packs. Every k is a constant
// once these loops are unrolled: accumulators that are chosen at run time lie in memory.
template <int kLanes, int kAccumulators, typename Body>
inline void for_each_pack_in_turn(int64_t length, Body body) {
  int64_t i = 0;
  for (; i + kAccumulators * kLanes <= length; i += kAccumulators * kLanes)
    for (int k = 0; k < kAccumulators; ++k) body(k, i + k * kLanes);
  for (int k = 0; k < kAccumulators - 1 && i + kLanes <= length; ++k, i += kLanes) body(k, i);
  if (i < length) body(kAccumulators - 1, i, int(length - i));
}

// All lanes of the accumulators of a sum. Not in a loop over sums: they would lie in memory.
template <typename P, int kAccumulators>
inline double fold(const P (&sums)[kAccumulators]) {
  P all = sums[0];
  for (int k = 1; k < kAccumulators; ++k) all = all + sums[k];
  return double(sum(all));
}

// Packs at once, so that their accumulators hide the latency of an add: 4 cycles at up to 2 a
// cycle, halved by the loads they wait for.
template <typename P>
inline constexpr int kAtOnce = P::kVectors > 2 ? 1 : 4 / P::kVectors;

// Numbers of the channels of a slice of rows: of as many as stay in L1, beside some coefficients.
template <typename P, int kNumbers, int kCoefficients>
struct alignas(64) Slice {
  using S = typename P::Scalar;
  static constexpr int64_t kBytes = 24 << 10;
  static constexpr int64_t kMost = kBytes / ((kNumbers + kCoefficients) * sizeof(S)) / 64 * 64;
  static_assert(kMost % P::kLanes == 0 && kMost * sizeof(S) % 64 == 0);

  S numbers[kNumbers][kMost];

  void clear(int64_t n_channels) {
    for (auto& number : numbers)
      for (int64_t i = 0; i < n_channels; i += P::kLanes) store_lanes(number + i, P{});
  }
};

// Calls body(first, n) for each slice of n channels.
template <int64_t kMost, typename Body>
inline void for_each_slice(int64_t n_channels, Body body) {
  for (int64_t first = 0; first < n_channels; first += kMost)
    body(first, n_channels - first < kMost ? n_channels - first : kMost);
}

// Calls body(first row, rows at once, i, packs at once, n...) over `length` lanes of a block of
// rows.
//
// Short rows, and parts of rows, go down columns of packs, their sums in registers. Whole rows are
// walked as they lie in memory, which is what hardware fetches ahead best, kRows at once: more than
// one where to add to sums in L1 takes longer than to read a row. Down columns, on two threads of
// Zen 5, bwd_reduce behind a mask at 32x512x28x28 took 1.3 (fp32) to 1.8 times (bf16) as long.
template <typename P, int kRows, typename Body>
inline void for_each_pack_of_rows(int64_t rows, int64_t length, int64_t stride, Body body) {
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, kAtOnce<P>> kColumn;
  int64_t row = 0;
  const auto walk = [&](auto rows_at_once, auto packs) {
    for (; row + rows_at_once <= rows; row += rows_at_once) {
      int64_t i = 0;
      for (; i + packs * P::kLanes <= length; i += packs * P::kLanes)
        body(row, rows_at_once, i, packs);
      for_each_pack<P::kLanes>(length - i, [&](int64_t rest, auto... n) {
        body(row, rows_at_once, i + rest, kOne, n...);
      });
    }
  };
  const bool is_short = length <= kColumn * P::kLanes, is_part = kRows == 1 && length < stride;
  if (is_short || is_part) return walk(rows, kColumn);
  walk(std::integral_constant<int, kRows>(), kOne);
  if constexpr (kRows > 1) walk(kOne, kOne);
}

// Rows a block: enough that merging in double costs little, few enough that bwd_reduce keeps its
// sums in single precision.
inline int64_t rows_a_block(const Runs& rows) {
  return ceil_div(rows.count, ceil_div(rows.count, 128));
}

// The mask of the pack from element i of a run on, whole bytes; with n its padding bits are 0.
// Given the place of that byte instead, as load_mask is, fp32 channels-first forward takes 1.05.
template <int kMaskBytes>
inline void store_mask(uint8_t* mask, int64_t i, uint32_t bits) {
  std::memcpy(mask + i / 8, &bits, kMaskBytes);
}

template <int kMaskBytes>
inline void store_mask(uint8_t* mask, int64_t i, uint32_t bits, int n) {
  bits &= (1u << n) - 1;
  for (int byte = 0; byte < kMaskBytes; ++byte)
    if (8 * byte < n) mask[i / 8 + byte] = uint8_t(bits >> 8 * byte);
}

// The mask of a pack, from its own first byte on.
template <int kMaskBytes>
inline uint32_t load_mask(const uint8_t* mask) {
  uint32_t bits = 0;
  std::memcpy(&bits, mask, kMaskBytes);
  return bits;
}

template <int kMaskBytes>
inline uint32_t load_mask(const uint8_t* mask, int n) {
  uint32_t bits = 0;
  for (int byte = 0; byte < kMaskBytes; ++byte)
    if (8 * byte < n) bits |= uint32_t(mask[byte]) << 8 * byte;
  return bits;
}

// Fetches into L2.
template <int kWrite = 0, typename T>
inline void prefetch(const T* p) {
  __builtin_prefetch(p, kWrite, 2);
}

// A pack 16 KB further on. Hardware fetches rows ahead by itself, but in time only with this:
// bwd_reduce takes 0.93 of the time by it.
template <int kLanes, typename T>
inline void prefetch_ahead(const T* p) {
  constexpr int kLine = 64 / sizeof(T), kAhead = (16 << 10) / sizeof(T);
  for (int i = 0; i < kLanes; i += kLine) prefetch(p + kAhead + i);
}

template <typename T>
inline void store_result(bool streams, T* p, Stored<T> a) {
  streams ? stream(p, a) : store(p, a);
}

template <typename T>
inline void store_result(bool, T* p, Stored<T> a, int n) {
  store(p, a, n);
}

template <typename Body>
inline void with_flag(bool flag, Body body) {
  if (flag) {
    body(std::true_type());
  } else {
    body(std::false_type());
  }
}

}  // namespace fusedskip::cpu::FUSEDSKIP_ISA

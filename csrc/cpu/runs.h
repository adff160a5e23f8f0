// Walks over the runs of a tile, a pack of lanes at a time: along a run, or down the columns of a
// block of rows. Coefficients are broadcast over a channel's run, or loaded lane by lane along a
// row.

#pragma once

#include "kernels.h"
#include "vec.h"

namespace fusedskip::cpu::FUSEDSKIP_ISA {

// The coefficients of the lanes from element i of a run on; n < kLanes of them near a run's end.
template <typename S, bool kPerLane>
struct Coefficient {
  const S* p;

  explicit Coefficient(const void* coefficients, int64_t = 0)
      : p(static_cast<const S*>(coefficients)) {}

  template <typename... N>
  Pack<S> at(int64_t i, N... n) const {
    return load(p + i, n...);
  }
};

// One number for all lanes; absent it is 0.
template <typename S>
struct Coefficient<S, false> {
  Pack<S> all;

  explicit Coefficient(const void* p, int64_t channel = 0)
      : all(Pack<S>::broadcast(p ? static_cast<const S*>(p)[channel] : 0)) {}

  template <typename... N>
  Pack<S> at(int64_t, N...) const {
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

// Independent accumulators hide the latency of an add: 4 cycles at up to 2 a cycle, halved by the
// loads they wait for.
inline constexpr int kColumn = 4;

// Rows a block: enough that merging in double costs little, few enough that bwd_reduce keeps its
// sums in single precision.
inline int64_t rows_a_block(const Runs& rows) {
  const int64_t fit = 8192 / rows.length, most = fit < 32 ? 32 : fit > 256 ? 256 : fit;
  return ceil_div(rows.count, ceil_div(rows.count, most));
}

// Calls body(column, packs as a constant, n...) over the columns of a row.
template <int kLanes, typename Body>
inline void for_each_column(int64_t length, Body body) {
  int64_t i = 0;
  for (; i + kColumn * kLanes <= length; i += kColumn * kLanes)
    body(i, std::integral_constant<int, kColumn>());
  for (; i + kLanes <= length; i += kLanes) body(i, std::integral_constant<int, 1>());
  if (i < length) body(i, std::integral_constant<int, 1>(), int(length - i));
}

// The mask of a pack from element i of a run on, whole bytes; with n its padding bits are 0.
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

template <int kMaskBytes>
inline uint32_t load_mask(const uint8_t* mask, int64_t i) {
  uint32_t bits = 0;
  std::memcpy(&bits, mask + i / 8, kMaskBytes);
  return bits;
}

template <int kMaskBytes>
inline uint32_t load_mask(const uint8_t* mask, int64_t i, int n) {
  uint32_t bits = 0;
  for (int byte = 0; byte < kMaskBytes; ++byte)
    if (8 * byte < n) bits |= uint32_t(mask[i / 8 + byte]) << 8 * byte;
  return bits;
}

// Fetches into L2.
template <int kWrite = 0, typename T>
inline void prefetch(const T* p) {
  __builtin_prefetch(p, kWrite, 2);
}

// A row of a column. Walking down a block of rows, that of the next block is fetched meanwhile:
// bf16 stats at 32x256x56x56 take 0.6 of the time by it, bwd_reduce 0.85.
template <int kLanes, typename T>
inline void prefetch_column(const T* p) {
  constexpr int kLine = 64 / sizeof(T);
  for (int i = 0; i < kLanes; i += kLine) prefetch(p + i);
}

template <typename T, typename S>
inline void store_result(bool streams, T* p, Pack<S> a) {
  streams ? stream(p, a) : store(p, a);
}

template <typename T, typename S>
inline void store_result(bool, T* p, Pack<S> a, int n) {
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

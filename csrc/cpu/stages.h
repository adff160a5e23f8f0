// The four stages on one tile, written once for every instruction set, storage type and layout.
//
// The elementwise stages (apply, bwd_apply) do not care about the layout beyond where a coefficient
// comes from: broadcast over a channel's run, or loaded lane by lane along a row. The reducing
// stages (stats, bwd_reduce) differ: channels-first folds the lanes at the end of the tile,
// channels-last keeps a column of packs in registers down a block of rows.

#pragma once

#include "kernels.h"
#include "moments.h"
#include "vec.h"

namespace fusedskip::cpu::FUSEDSKIP_ISA {

// The coefficients of the lanes from element i of a run on; n < kLanes of them near a run's end.
template <typename S, bool kPerLane>
struct Coefficient {
  const S* p;

  explicit Coefficient(const void* coefficients) : p(static_cast<const S*>(coefficients)) {}

  template <typename... N>
  Pack<S> at(int64_t i, N... n) const {
    return load(p + i, n...);
  }
};

// One number for all lanes; absent it is 0.
template <typename S>
struct Coefficient<S, false> {
  Pack<S> all;

  explicit Coefficient(const void* p)
      : all(Pack<S>::broadcast(p ? *static_cast<const S*>(p) : 0)) {}

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

// Fetches what lies `runs.prefetch` elements behind a run: the same plane some channels on.
template <int kWrite, typename T>
inline void prefetch(const Runs& runs, const T* run) {
  if (runs.prefetch == 0 || run == nullptr) return;
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < runs.length; i += kLine)
    __builtin_prefetch(run + runs.prefetch + i, kWrite, 2);
}

template <typename T, typename S>
inline void store_result(bool streams, T* p, Pack<S> a) {
  streams ? stream(p, a) : store(p, a);
}

template <typename T, typename S>
inline void store_result(bool, T* p, Pack<S> a, int n) {
  store(p, a, n);
}

// What is added up: nothing, a tensor as it is, or a tensor normalised.
enum class Term { kAbsent, kPlain, kNormalised };

template <typename T, Term kTerm, bool kPerLane>
struct TermOf {
  using S = StatisticsOf<T>;
  Coefficient<S, kPerLane> mean, scale, shift;

  explicit TermOf(const Affine& affine)
      : mean(affine.mean), scale(affine.scale), shift(affine.shift) {}

  template <typename... N>
  Pack<S> operator()(const T* run, int64_t i, N... n) const {
    const Pack<S> x = load(run + i, n...);
    if constexpr (kTerm == Term::kNormalised)
      return fma(x - mean.at(i, n...), scale.at(i, n...), shift.at(i, n...));
    return x;
  }
};

// The gradient behind the ReLU.
template <typename T, Gate kGate, bool kPerLane>
struct Gated {
  using S = StatisticsOf<T>;
  Coefficient<S, kPerLane> mean, scale, shift;
  Pack<S> threshold = Pack<S>::broadcast(kLargestStoredAsZero<T>);

  explicit Gated(const Affine& affine)
      : mean(affine.mean), scale(affine.scale), shift(affine.shift) {}

  template <typename... N>
  Pack<S> operator()(Pack<S> g, Pack<S> centred, const uint8_t* mask, int64_t i, N... n) const {
    if constexpr (kGate == Gate::kMask)
      return keep(g, load_mask<Pack<S>::kMaskBytes>(mask, i, n...));
    if constexpr (kGate == Gate::kRecompute)
      return keep(g, exceeds(fma(centred, scale.at(i, n...), shift.at(i, n...)), threshold));
    return g;
  }
};

// The gradient in front of a norm, of g behind it.
template <typename S, bool kPerLane, bool kTraining>
struct NormGradient {
  Coefficient<S, kPerLane> mean, scale, k2, k3;

  explicit NormGradient(const Affine& affine)
      : mean(affine.mean), scale(affine.scale), k2(affine.k2), k3(affine.k3) {}

  template <typename... N>
  Pack<S> operator()(Pack<S> g, Pack<S> centred, int64_t i, N... n) const {
    if constexpr (!kTraining) return g * scale.at(i, n...);
    return fma(g, scale.at(i, n...), fma(centred, k2.at(i, n...), k3.at(i, n...)));
  }
};

template <typename T, bool kPerLane, Term kX, Term kResidual, Relu kRelu>
void apply_runs(const ApplyTile& tile) {
  using S = StatisticsOf<T>;
  using P = Pack<S>;
  const TermOf<T, kX, kPerLane> x_term(tile.affine);
  const TermOf<T, kResidual, kPerLane> residual_term(tile.residual_affine);
  constexpr bool kHasResidual = kResidual != Term::kAbsent;
  const P threshold = P::broadcast(kLargestStoredAsZero<T>);
  for (int64_t run = 0; run < tile.runs.count; ++run) {
    const int64_t offset = run * tile.runs.stride;
    const T* x = static_cast<const T*>(tile.x) + offset;
    const T* residual = static_cast<const T*>(tile.residual) + (kHasResidual ? offset : 0);
    T* out = static_cast<T*>(tile.out) + run * tile.out_stride;
    uint8_t* mask = tile.mask ? tile.mask + run * tile.runs.mask_stride : nullptr;
    prefetch<0>(tile.runs, kHasResidual ? residual : nullptr);
    if (!tile.runs.streams) prefetch<1>(tile.runs, out);
    for_each_pack<P::kLanes>(tile.runs.length, [&](int64_t i, auto... n) {
      const auto relu = [&](P a) {
        const uint32_t bits = exceeds(a, threshold);
        a = keep(a, bits);
        if (mask) store_mask<P::kMaskBytes>(mask, i, bits, n...);
        return a;
      };
      P y = x_term(x, i, n...);
      if constexpr (kRelu == Relu::kFirst) y = relu(y);
      if constexpr (kHasResidual) y = y + residual_term(residual, i, n...);
      if constexpr (kRelu == Relu::kLast) y = relu(y);
      store_result(tile.runs.streams, out + i, y, n...);
    });
  }
  if (tile.runs.streams) order_streams();
}

template <typename T, bool kPerLane, Gate kGate, bool kDual, bool kTraining>
void bwd_apply_runs(const BwdApplyTile& tile) {
  using S = StatisticsOf<T>;
  using P = Pack<S>;
  const Gated<T, kGate, kPerLane> gated(tile.affine);
  const NormGradient<S, kPerLane, kTraining> gradient(tile.affine),
      residual_gradient(tile.residual_affine);
  constexpr bool kReadsX = kTraining || kGate == Gate::kRecompute;
  for (int64_t run = 0; run < tile.runs.count; ++run) {
    const int64_t offset = run * tile.runs.stride;
    const T* dout = static_cast<const T*>(tile.dout) + offset;
    const T* x = static_cast<const T*>(tile.x) + (kReadsX ? offset : 0);
    const T* residual = static_cast<const T*>(tile.residual) + (kDual ? offset : 0);
    const uint8_t* mask = kGate == Gate::kMask ? tile.mask + run * tile.runs.mask_stride : nullptr;
    T* dx = tile.dx ? static_cast<T*>(tile.dx) + offset : nullptr;
    T* dresidual = tile.dresidual ? static_cast<T*>(tile.dresidual) + offset : nullptr;
    if (!tile.runs.streams) {
      prefetch<1>(tile.runs, dx);
      prefetch<1>(tile.runs, dresidual);
    }
    for_each_pack<P::kLanes>(tile.runs.length, [&](int64_t i, auto... n) {
      P centred = P::broadcast(0);
      if constexpr (kReadsX) {
        if (kGate == Gate::kRecompute || dx) centred = load(x + i, n...) - gated.mean.at(i, n...);
      }
      const P g = gated(load(dout + i, n...), centred, mask, i, n...);
      if (dresidual) {
        P d = g;
        if constexpr (kDual) {
          P residual_centred = P::broadcast(0);
          if constexpr (kTraining)
            residual_centred = load(residual + i, n...) - residual_gradient.mean.at(i, n...);
          d = residual_gradient(g, residual_centred, i, n...);
        }
        store_result(tile.runs.streams, dresidual + i, d, n...);
      }
      if (dx) store_result(tile.runs.streams, dx + i, gradient(g, centred, i, n...), n...);
    });
  }
  if (tile.runs.streams) order_streams();
}

// The same for a block of which are known a pivot K near its mean, Σ(x - K) and Σ(x - K)².
inline void merge_block(const Merge& merge, double& sum, double& m2, double pivot, double d1,
                        double d2) {
  merge(sum, m2, pivot * merge.count + d1, d2 - d1 * d1 * merge.per_element);
}

// The pivot of a block of n elements is the mean of k of them. It is then no further from the mean
// of all than sqrt(M2/k), so that taking n·(mean - K)² off Σ(x - K)² costs at most log2(1 + n/k)
// bits, whatever the data: 5 or 6 in the blocks below. One pass over the block is saved by it.
// About an infinite pivot the mean of ±Inf would be NaN.
template <typename S>
inline Pack<S> finite_or_zero(Pack<S> a) {
  return keep(a, ~exceeds(a - a, Pack<S>::broadcast(0)));  // Inf - Inf is NaN
}

// Independent accumulators hide the latency of an add: 4 cycles at up to 2 a cycle, halved by the
// loads they wait for.
inline constexpr int kColumn = 4;

template <typename T>
void stats_planes(const StatsTile& tile) {
  using S = StatisticsOf<T>;
  using P = Pack<S>;
  const T* tile_x = static_cast<const T*>(tile.x);
  // body(k, pack, n...): a pack of x for accumulator k.
  const auto for_each = [&](auto body) {
    for (int64_t run = 0; run < tile.runs.count; ++run) {
      const T* x = tile_x + run * tile.runs.stride;
      for_each_pack_in_turn<P::kLanes, kColumn>(
          tile.runs.length, [&](int k, int64_t i, auto... n) { body(k, load(x + i, n...), n...); });
    }
  };
  const auto fold = [](const P(&a)[kColumn]) { return double(sum((a[0] + a[1]) + (a[2] + a[3]))); };

  for (int64_t run = 0; run < tile.runs.count; ++run)
    prefetch<0>(tile.runs, tile_x + run * tile.runs.stride);
  constexpr int64_t kSample = 64 * P::kLanes;
  const int64_t length = tile.runs.length < kSample ? tile.runs.length : kSample;
  P sampled = {};
  int64_t sample = 0;
  for (int64_t run = 0; sample < kSample && 16 * run < tile.runs.count; ++run, sample += length)
    for_each_pack<P::kLanes>(length, [&](int64_t i, auto... n) {
      sampled = sampled + load(tile_x + run * tile.runs.stride + i, n...);
    });
  const P pivots = finite_or_zero(P::broadcast(sum(sampled) / S(sample)));
  P d1[kColumn] = {}, d2[kColumn] = {};
  for_each([&](int k, P x, auto... n) {
    P d = x - pivots;
    ((d = keep(d, (1u << n) - 1)), ...);
    d1[k] = d1[k] + d;
    d2[k] = fma(d, d, d2[k]);
  });
  *tile.sum = *tile.m2 = 0;
  const Merge merge(0, double(tile.runs.count) * double(tile.runs.length));
  merge_block(merge, *tile.sum, *tile.m2, pivots.v[0][0], fold(d1), fold(d2));
}

// Rows a block: enough that merging in double costs little, few enough that bwd_reduce keeps its
// sums in single precision.
inline int64_t rows_a_block(int64_t n_channels) {
  const int64_t rows = 8192 / n_channels;
  return rows < 32 ? 32 : rows > 256 ? 256 : rows;
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

template <typename T>
void stats_rows(const StatsTile& tile) {
  using S = StatisticsOf<T>;
  using P = Pack<S>;
  const int64_t n_channels = tile.runs.length, block = rows_a_block(n_channels);
  for (int64_t c = 0; c < n_channels; ++c) tile.sum[c] = tile.m2[c] = 0;
  for (int64_t row = 0; row < tile.runs.count; row += block) {
    const int64_t rows = row + block < tile.runs.count ? block : tile.runs.count - row;
    const int64_t sample = rows < 64 ? (rows + 7) / 8 : 8;
    const T* x = static_cast<const T*>(tile.x) + row * n_channels;
    const Merge merge{double(row), double(rows)};
    for_each_column<P::kLanes>(n_channels, [&](int64_t c, auto packs, auto... n) {
      constexpr int kPacks = packs;
      constexpr int kLanes = kPacks * P::kLanes;
      P pivot[kPacks] = {}, d1[kPacks] = {}, d2[kPacks] = {};
      for (int64_t r = 0; r < sample; ++r)
        for (int k = 0; k < kPacks; ++k)
          pivot[k] = pivot[k] + load(x + r * n_channels + c + k * P::kLanes, n...);
      for (int k = 0; k < kPacks; ++k)
        pivot[k] = finite_or_zero(pivot[k] * P::broadcast(S(1) / S(sample)));
      for (int64_t r = 0; r < rows; ++r)
        for (int k = 0; k < kPacks; ++k) {
          const P d = load(x + r * n_channels + c + k * P::kLanes, n...) - pivot[k];
          d1[k] = d1[k] + d;
          d2[k] = fma(d, d, d2[k]);
        }
      S lanes[3][kLanes];
      std::memcpy(lanes[0], pivot, sizeof(pivot));
      std::memcpy(lanes[1], d1, sizeof(d1));
      std::memcpy(lanes[2], d2, sizeof(d2));
      int valid = kLanes;
      ((valid = n), ...);
      for (int l = 0; l < valid; ++l)
        merge_block(merge, tile.sum[c + l], tile.m2[c + l], lanes[0][l], lanes[1][l], lanes[2][l]);
    });
  }
}

template <typename T, Gate kGate, bool kDual>
void bwd_reduce_planes(const BwdReduceTile& tile) {
  using S = StatisticsOf<T>;
  using P = Pack<S>;
  const Gated<T, kGate, false> gated(tile.affine);
  const Coefficient<S, false> residual_mean(tile.residual_affine.mean);
  // Several vectors in a pack hide the latency by themselves.
  constexpr int kSums = kDual ? 3 : 2, kAccumulators = P::kVectors == 1 ? 2 : 1;
  P sums[kSums][kAccumulators] = {};
  for (int64_t run = 0; run < tile.runs.count; ++run) {
    const T* dout = static_cast<const T*>(tile.dout) + run * tile.runs.stride;
    const T* x = static_cast<const T*>(tile.x) + run * tile.runs.stride;
    const T* residual = static_cast<const T*>(tile.residual) + (kDual ? run * tile.runs.stride : 0);
    const uint8_t* mask = kGate == Gate::kMask ? tile.mask + run * tile.runs.mask_stride : nullptr;
    prefetch<0>(tile.runs, dout);
    prefetch<0>(tile.runs, x);
    prefetch<0>(tile.runs, kDual ? residual : nullptr);
    for_each_pack_in_turn<P::kLanes, kAccumulators>(
        tile.runs.length, [&](int k, int64_t i, auto... n) {
          const P centred = load(x + i, n...) - gated.mean.all;
          // Lanes past the run's end load dout = 0 and add nothing.
          const P g = gated(load(dout + i, n...), centred, mask, i, n...);
          sums[0][k] = sums[0][k] + g;
          sums[1][k] = fma(g, centred, sums[1][k]);
          if constexpr (kDual)
            sums[2][k] = fma(g, load(residual + i, n...) - residual_mean.all, sums[2][k]);
        });
  }
  for (int s = 0; s < kSums; ++s) {
    P total = sums[s][0];
    for (int k = 1; k < kAccumulators; ++k) total = total + sums[s][k];
    *tile.sums[s] = double(sum(total));
  }
}

template <typename T, Gate kGate, bool kDual>
void bwd_reduce_rows(const BwdReduceTile& tile) {
  using S = StatisticsOf<T>;
  using P = Pack<S>;
  const Gated<T, kGate, true> gated(tile.affine);
  const Coefficient<S, true> residual_mean(tile.residual_affine.mean);
  constexpr int kSums = kDual ? 3 : 2;
  const int64_t n_channels = tile.runs.length, block = rows_a_block(n_channels);
  for (int s = 0; s < kSums; ++s)
    for (int64_t c = 0; c < n_channels; ++c) tile.sums[s][c] = 0;
  for (int64_t row = 0; row < tile.runs.count; row += block) {
    const int64_t rows = row + block < tile.runs.count ? block : tile.runs.count - row;
    const T* dout = static_cast<const T*>(tile.dout) + row * n_channels;
    const T* x = static_cast<const T*>(tile.x) + row * n_channels;
    const T* residual = static_cast<const T*>(tile.residual) + (kDual ? row * n_channels : 0);
    const uint8_t* mask = kGate == Gate::kMask ? tile.mask + row * tile.runs.mask_stride : nullptr;
    for_each_column<P::kLanes>(n_channels, [&](int64_t c, auto packs, auto... n) {
      constexpr int kPacks = packs;
      constexpr int kLanes = kPacks * P::kLanes;
      P sums[kSums][kPacks] = {};
      for (int64_t r = 0; r < rows; ++r)
        for (int k = 0; k < kPacks; ++k) {
          const int64_t i = c + k * P::kLanes;
          const P centred = load(x + r * n_channels + i, n...) - gated.mean.at(i, n...);
          const P g = gated(load(dout + r * n_channels + i, n...), centred,
                            mask + r * tile.runs.mask_stride, i, n...);
          sums[0][k] = sums[0][k] + g;
          sums[1][k] = fma(g, centred, sums[1][k]);
          if constexpr (kDual)
            sums[2][k] =
                fma(g, load(residual + r * n_channels + i, n...) - residual_mean.at(i, n...),
                    sums[2][k]);
        }
      S lanes[kSums][kLanes];
      std::memcpy(lanes, sums, sizeof(sums));
      int valid = kLanes;
      ((valid = n), ...);
      for (int s = 0; s < kSums; ++s)
        for (int l = 0; l < valid; ++l) tile.sums[s][c + l] += lanes[s][l];
    });
  }
}

template <typename Body>
inline void with_flag(bool flag, Body body) {
  if (flag) {
    body(std::true_type());
  } else {
    body(std::false_type());
  }
}

// Calls body(gate, dual) with both as constants. Two norms always come with a mask.
template <typename Tile, typename Body>
inline void with_gate(const Tile& tile, Body body) {
  if (tile.residual) return body(std::integral_constant<Gate, Gate::kMask>(), std::true_type());
  switch (tile.gate) {
    case Gate::kNone:
      return body(std::integral_constant<Gate, Gate::kNone>(), std::false_type());
    case Gate::kMask:
      return body(std::integral_constant<Gate, Gate::kMask>(), std::false_type());
    case Gate::kRecompute:
      return body(std::integral_constant<Gate, Gate::kRecompute>(), std::false_type());
  }
}

template <typename T>
void stats(const StatsTile& tile) {
  tile.runs.per_lane ? stats_rows<T>(tile) : stats_planes<T>(tile);
}

template <typename T>
void apply(const ApplyTile& tile) {
  using enum Term;
  if (!tile.affine.mean)  // add_relu: a ReLU and a residual, and the layout does not matter
    return tile.relu == Relu::kFirst ? apply_runs<T, false, kPlain, kPlain, Relu::kFirst>(tile)
                                     : apply_runs<T, false, kPlain, kPlain, Relu::kLast>(tile);
  with_flag(tile.runs.per_lane, [&](auto per_lane) {
    if (tile.residual_affine.mean)
      return apply_runs<T, per_lane, kNormalised, kNormalised, Relu::kLast>(tile);
    with_flag(tile.residual != nullptr, [&](auto residual) {
      with_flag(tile.relu == Relu::kLast, [&](auto relu) {
        apply_runs<T, per_lane, kNormalised, residual ? kPlain : kAbsent,
                   relu ? Relu::kLast : Relu::kNone>(tile);
      });
    });
  });
}

template <typename T>
void bwd_reduce(const BwdReduceTile& tile) {
  with_gate(tile, [&](auto gate, auto dual) {
    tile.runs.per_lane ? bwd_reduce_rows<T, gate, dual>(tile)
                       : bwd_reduce_planes<T, gate, dual>(tile);
  });
}

template <typename T>
void bwd_apply(const BwdApplyTile& tile) {
  with_flag(tile.runs.per_lane, [&](auto per_lane) {
    with_flag(tile.affine.k2 != nullptr, [&](auto training) {
      with_gate(tile, [&](auto gate, auto dual) {
        bwd_apply_runs<T, per_lane, gate, dual, training>(tile);
      });
    });
  });
}

template <typename T>
constexpr Kernels kernels_of() {
  return {stats<T>, apply<T>, bwd_reduce<T>, bwd_apply<T>};
}

extern const Kernels kKernels[kDtypes] = {kernels_of<double>(), kernels_of<float>(),
                                          kernels_of<BFloat16>(), kernels_of<Float16>()};

}  // namespace fusedskip::cpu::FUSEDSKIP_ISA

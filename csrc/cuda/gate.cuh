// What the two backward stages share: the coefficients that forward used, and the gradient behind
// the ReLU.

#pragma once

#include "channels.cuh"
#include "dispatch.cuh"
#include "kept.cuh"

namespace fusedskip::cuda {

// The kinds of backward: by the saved mask, or without a ReLU; by a mask computed once more from x;
// and by the saved mask with a residual that has a norm of its own.
enum class Kind { kSaved, kRecomputed, kDual };

template <Kind kKind>
inline constexpr int kNorms = kKind == Kind::kDual ? 2 : 1;

inline Kind kind_of(const BatchNormBackward& args) {
  if (args.residual_norm.present()) return Kind::kDual;
  return args.relu && !args.mask ? Kind::kRecomputed : Kind::kSaved;
}

// Calls launch(Instance(), the kind as a constant).
template <typename Launch>
cudaError_t dispatch(const BatchNormBackward& args, Launch launch) {
  const View& view = args.view;
  const int width =
      vector_width(view.row_length(), args.dtype,
                   addresses(args.dout, args.x, args.residual, args.dx, args.dresidual));
  return dispatch(args.dtype, view.n_inner == 1, width, [&](auto instance) {
    switch (kind_of(args)) {
      case Kind::kDual:
        return launch(instance, std::integral_constant<Kind, Kind::kDual>());
      case Kind::kRecomputed:
        return launch(instance, std::integral_constant<Kind, Kind::kRecomputed>());
      default:
        return launch(instance, std::integral_constant<Kind, Kind::kSaved>());
    }
  });
}

// Bitwise forward's map, from the mean and rstd that it returned. Returns rstd.
template <typename S, bool kChannelsLast>
__device__ S put_saved(BlockAffine<S, kChannelsLast>& affine, const Norm& norm, int64_t channel) {
  const S mean = get(norm.mean, channel, S(0)), rstd = get(norm.rstd, channel, S(0));
  affine.put(norm, channel, mean, rstd);
  return rstd;
}

template <typename S, int kNorms>
struct Gradient {
  Array<S, kOctet> g;                // dout where forward's ReLU passed, else 0
  Array<S, kOctet> centred[kNorms];  // x - mean, and so the residual if it has a norm
};

// An octet of dout and of what was normalised, and how the gradient passes the ReLU.
template <typename T, int kWidth, Kind kKind>
struct GatedOctet {
  using S = StatisticsOf<T>;
  static constexpr bool kRecompute = kKind == Kind::kRecomputed;
  static constexpr int kNorms = cuda::kNorms<kKind>;
  Octet<T> dout, x[kNorms];
  uint32_t bits;

  template <Use kUse>
  __device__ void read(const BatchNormBackward& args, const Place& place, bool reads_x,
                       bool reads_residual) {
    dout = load<kWidth, kUse>(static_cast<const T*>(args.dout), place);
    x[0] = {};
    if (kRecompute || reads_x) x[0] = load<kWidth, kUse>(static_cast<const T*>(args.x), place);
    if constexpr (kNorms == 2) {
      x[1] = {};
      if (reads_residual) x[1] = load<kWidth, kUse>(static_cast<const T*>(args.residual), place);
    }
    bits = 0xff;
    if (!kRecompute && args.relu && place.elements > 0)
      bits = args.mask[mask_offset<kWidth>(place)];
  }

  // As number u of a batch.
  template <typename Kept>
  __device__ void put(Kept& kept, int round, int u) const {
    kept.put(round, u, 0, dout);
#pragma unroll
    for (int k = 0; k < kNorms; ++k) kept.put(round, u, 1 + k, x[k]);
    kept.put_bits(round, u, bits);
  }
  template <typename Round>
  __device__ void get(const Round& kept) {
    dout = kept.octet(0);
#pragma unroll
    for (int k = 0; k < kNorms; ++k) x[k] = kept.octet(1 + k);
    bits = kept.bits();
  }

  template <int kSize>
  __device__ Gradient<S, kNorms> gradient(const Affine<S, kSize> (&affine)[kNorms]) const {
    Gradient<S, kNorms> result{widen<T>(dout)};
#pragma unroll
    for (int k = 0; k < kNorms; ++k) result.centred[k] = widen<T>(x[k]);
    uint32_t passes = bits;
    if constexpr (kRecompute) {
      Array<S, kOctet> y;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) y[i] = affine[0](result.centred[0][i], i);
      passes = relu_passes<T>(y);
    }
    result.g = keep(result.g, passes);
#pragma unroll
    for (int k = 0; k < kNorms; ++k) {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) result.centred[k][i] -= affine[k].mean[i % kSize];
    }
    return result;
  }
};

}  // namespace fusedskip::cuda

// The numbers of all channels: parameters of any dtype, partial results of the tiles, coefficients.

#pragma once

#include <memory>

#include "storage.h"
#include "tiling.h"

namespace fusedskip::cpu {

inline double get(const ChannelVector& vector, int64_t c, double absent) {
  const void* data = vector.data;
  if (!data) return absent;
  switch (vector.dtype) {
    case Dtype::kFloat64:
      return static_cast<const double*>(data)[c];
    case Dtype::kFloat32:
      return static_cast<const float*>(data)[c];
    case Dtype::kBFloat16:
      return widen(static_cast<const BFloat16*>(data)[c]);
    case Dtype::kFloat16:
      return widen(static_cast<const Float16*>(data)[c]);
  }
  __builtin_unreachable();
}

inline void set(const ChannelVector& vector, int64_t c, double value) {
  void* data = vector.data;
  switch (vector.dtype) {
    case Dtype::kFloat64:
      static_cast<double*>(data)[c] = value;
      return;
    case Dtype::kFloat32:
      static_cast<float*>(data)[c] = float(value);
      return;
    case Dtype::kBFloat16:
      static_cast<BFloat16*>(data)[c] = narrow<BFloat16>(value);
      return;
    case Dtype::kFloat16:
      static_cast<Float16*>(data)[c] = narrow<Float16>(value);
      return;
  }
}

// Some numbers for every channel of every tile.
class Partials {
 public:
  Partials(const Tiling& tiling, int numbers)
      : tiling_(tiling),
        size_(tiling.tiles * tiling.view.n_channels),
        data_(new double[numbers * size_]) {}

  // One of the numbers for all channels of a tile.
  double* of_tile(int number, int64_t group, int64_t tile) const {
    return data_.get() + number * size_ + (group * tiling_.tiles + tile) * tiling_.group_channels();
  }

  double& of_channel(int number, int64_t c, int64_t tile) const {
    return tiling_.per_lane ? of_tile(number, 0, tile)[c] : *of_tile(number, c, tile);
  }

  // Calls merge(c, tile) to merge each tile behind the first into it, tile by tile: channels-last
  // one channel's numbers lie so far apart that each is a cache miss, and finding the statistics of
  // 32x2048x7x7 took longer for these than for x.
  template <typename Merge>
  void merge_tiles(int64_t begin, int64_t end, const Merge& merge) const {
    for (int64_t tile = 1; tile < tiling_.tiles; ++tile)
      for (int64_t c = begin; c < end; ++c) merge(c, tile);
  }

 private:
  const Tiling& tiling_;
  int64_t size_;
  std::unique_ptr<double[]> data_;
};

// One array of S for each of kArrays coefficients.
template <typename S, int kArrays>
class Coefficients {
 public:
  explicit Coefficients(int64_t n_channels)
      : n_channels_(n_channels), data_(new S[kArrays * n_channels]) {}

  S* operator[](int array) const { return data_.get() + array * n_channels_; }

 private:
  int64_t n_channels_;
  std::unique_ptr<S[]> data_;
};

// The one place where y = (x - mean)·scale + bias gets its scale: backward must find bitwise what
// forward used, to recompute the same mask.
template <typename S>
S scale_of(const ChannelVector& weight, int64_t c, S rstd) {
  return S(get(weight, c, 1)) * rstd;
}

}  // namespace fusedskip::cpu

// The numbers of all channels: parameters of any dtype, partial results of the tiles, coefficients.

#pragma once

#include <memory>
#include <new>

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

// Begins on a cache line. A load of 64 bytes that lies across two is two: out of L1, with
// coefficients as `new` places them apply and bwd_apply of channels-last tensors take 1.3 to 1.5
// times as long.
template <typename T>
class Lines {
 public:
  static constexpr size_t kBytes = 64;

  explicit Lines(int64_t size)
      : data_(static_cast<T*>(operator new(size * sizeof(T), std::align_val_t(kBytes)))) {}

  T* data() const { return data_.get(); }

 private:
  struct Delete {
    void operator()(T* data) const { operator delete(data, std::align_val_t(kBytes)); }
  };

  std::unique_ptr<T, Delete> data_;
};

// Some numbers for every channel of every tile.
class Partials {
 public:
  Partials(const Tiling& tiling, int numbers)
      : tiling_(tiling), size_(tiling.tiles * tiling.view.n_channels), data_(numbers * size_) {}

  // One of the numbers for all channels of a tile.
  double* of_tile(int number, int64_t group, int64_t tile) const {
    return data_.data() + number * size_ +
           (group * tiling_.tiles + tile) * tiling_.group_channels();
  }

  // One of the numbers for the lanes of a tile from `lane` on.
  double* of_lanes(int number, int64_t lane, int64_t tile) const {
    return tiling_.per_lane ? of_tile(number, 0, tile) + lane : of_tile(number, lane, tile);
  }

  // Calls merge(lane, count, tile) to merge some lanes of each tile behind the first into it. Not
  // channel by channel: channels-last one channel's numbers lie so far apart that each is a cache
  // miss, and finding the statistics of 32x2048x7x7 took longer for these than for x.
  template <typename Merge>
  void merge_tiles(int64_t begin, int64_t end, const Merge& merge) const {
    const int64_t count = tiling_.per_lane ? end - begin : 1;
    for (int64_t c = begin; c < end; c += count)
      tiling_.for_each_lane(c, [&](int64_t lane) {
        for (int64_t tile = 1; tile < tiling_.tiles; ++tile) merge(lane, count, tile);
      });
  }

 private:
  const Tiling& tiling_;
  int64_t size_;
  Lines<double> data_;
};

// One array of S for each of kArrays coefficients of every lane of a row.
template <typename S, int kArrays>
class Coefficients {
 public:
  explicit Coefficients(int64_t n_lanes)
      : pitch_(ceil_div(n_lanes, kLine) * kLine), data_(kArrays * pitch_) {}

  S* operator[](int array) const { return data_.data() + array * pitch_; }

 private:
  static constexpr int64_t kLine = Lines<S>::kBytes / sizeof(S);

  int64_t pitch_;
  Lines<S> data_;
};

// The one place where y = (x - mean)·scale + bias gets its scale: backward must find bitwise what
// forward used, to recompute the same mask.
template <typename S>
S scale_of(const ChannelVector& weight, int64_t c, S rstd) {
  return S(get(weight, c, 1)) * rstd;
}

}  // namespace fusedskip::cpu

// The numbers of all channels: parameters of any dtype, partial results of the tiles, coefficients.

#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "storage.h"
#include "tiling.h"

namespace fusedskip::cpu {

// Calls body(elements) with the vector, which is there, as an array of its dtype.
template <typename Body>
inline auto with_elements(const ChannelVector& vector, Body body) {
  switch (vector.dtype) {
    case Dtype::kFloat64:
      return body(static_cast<double*>(vector.data));
    case Dtype::kFloat32:
      return body(static_cast<float*>(vector.data));
    case Dtype::kBFloat16:
      return body(static_cast<BFloat16*>(vector.data));
    case Dtype::kFloat16:
      return body(static_cast<Float16*>(vector.data));
  }
  __builtin_unreachable();
}

inline double get(const ChannelVector& vector, int64_t c) {
  return with_elements(vector, [&](const auto* from) { return double(widen(from[c])); });
}

inline void set(const ChannelVector& vector, int64_t c, double value) {
  with_elements(vector,
                [&](auto* to) { to[c] = narrow<std::remove_pointer_t<decltype(to)>>(value); });
}

// The numbers of channels [begin, end), as S: compilers make vectors of such a loop. Evaluation of
// 1x4096x2x2 takes 0.7 of the time that it took with one channel after the other.
template <typename S>
void read(const ChannelVector& vector, S absent, int64_t begin, int64_t end, S* to) {
  if (!vector.data) return std::fill(to + begin, to + end, absent);
  with_elements(vector, [&](const auto* from) {
    for (int64_t c = begin; c < end; ++c) to[c] = S(widen(from[c]));
  });
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

// The coefficients of y = (x - mean)·scale + bias, the first three arrays, for channels [begin,
// end) of a norm whose mean and rstd are known. Forward and backward both have them from here: they
// must be bitwise the same, for backward to recompute the same mask.
template <typename S, int kArrays>
void set_affine(const Norm& norm, const Tiling& tiling, int64_t begin, int64_t end,
                const Coefficients<S, kArrays>& coefficients) {
  S *mean = coefficients[0], *scale = coefficients[1], *bias = coefficients[2];
  const S* rstd = static_cast<const S*>(norm.rstd.data);
  read(norm.mean, S(0), begin, end, mean);
  read(norm.weight, S(1), begin, end, scale);
  read(norm.bias, S(0), begin, end, bias);
  for (int64_t c = begin; c < end; ++c) scale[c] *= rstd[c];
  for (S* array : {mean, scale, bias})
    for (int64_t lane = tiling.n_channels; lane < tiling.view.n_channels; lane += tiling.n_channels)
      std::copy(array + begin, array + end, array + lane + begin);
}

}  // namespace fusedskip::cpu

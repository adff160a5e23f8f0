// Cuts a tensor into tiles and runs the stages over them.
//
// The tiles, and the order in which their partial results are merged, follow from the shape alone,
// so that results are bitwise the same whatever the number of threads. What the threads change is
// the order of the work: with channels enough for all of them, each takes a channel through both
// stages while it lies in cache; otherwise all run the first stage, then all the second, backwards,
// so that it starts with what the first has left in cache.

#include "batch_norm.h"

#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "kernels.h"
#include "moments.h"
#include "parallel.h"
#include "storage.h"

namespace fusedskip::cpu {
namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
};

// ATEN_CPU_CAPABILITY holds torch's own kernels to a lesser instruction set, and so these.
InstructionSet choose_instruction_set() {
#if defined(__x86_64__)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view capability = variable ? variable : "avx512";
  const bool allows_avx2 = capability != "default", allows_avx512 = capability == "avx512";
  if (allows_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi"))
    return {"avx512", avx512::kKernels};
  if (allows_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return {"avx2", avx2::kKernels};
#endif
  return {"baseline", baseline::kKernels};
}

const InstructionSet kInstructionSet = choose_instruction_set();

const Kernels& kernels(Dtype dtype) { return kInstructionSet.kernels[int(dtype)]; }

// A pointer moved by elements of a run-time dtype; null stays null.
template <typename Pointer>
Pointer advance(Pointer p, int64_t elements, Dtype dtype) {
  using Byte =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return p ? static_cast<Byte*>(p) + elements * bytes(dtype) : nullptr;
}

template <typename Pointer>
Pointer advance_mask(Pointer mask, int64_t n_bytes) {
  return mask ? mask + n_bytes : nullptr;
}

double get(const ChannelVector& vector, int64_t c, double absent) {
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

void set(const ChannelVector& vector, int64_t c, double value) {
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

struct Tile {
  Runs runs;
  int64_t offset;       // of its first element in the tensor
  int64_t mask_offset;  // in bytes
};

// Channels fall into groups that are reduced apart: one channel each, or channels-last all
// together. Every group is cut into `tiles` tiles.
struct Tiling {
  View view;
  bool per_lane;
  int64_t groups, tiles;
  int64_t pieces, piece_length;  // of a plane, when one is more than a tile
  int64_t outer;                 // planes or rows a tile
  int64_t prefetch;
  bool streams;

  Tiling(View v, Dtype dtype) : view(v), per_lane(v.n_inner == 1) {
    // 8192 elements stay in L1 for a second look. Rows are many channels at once, and each tile of
    // them writes its sums for all: as few tiles as will still spread over the threads.
    constexpr int64_t kPlaneTile = 8192, kRowTile = 65536, kMaxRowTiles = 128;
    pieces = 1;
    piece_length = v.n_inner;
    if (per_lane) {
      groups = 1;
      const int64_t rows =
          std::max(ceil_div(kRowTile, v.n_channels), ceil_div(v.n_outer, kMaxRowTiles));
      outer = std::min(rows, v.n_outer);
    } else {
      groups = v.n_channels;
      outer = std::clamp<int64_t>(kPlaneTile / v.n_inner, 1, v.n_outer);
      // Pieces start at a whole byte of mask and a cache line of any dtype.
      piece_length = ceil_div(ceil_div(v.n_inner, ceil_div(v.n_inner, kPlaneTile)), 64) * 64;
      pieces = ceil_div(v.n_inner, piece_length);
    }
    tiles = ceil_div(v.n_outer, outer) * pieces;
    constexpr int64_t kL2 = 2 << 20;
    const bool large = v.n_outer * v.n_channels * v.n_inner * bytes(dtype) > kL2;
    // Going through one channel of many small planes jumps from page to page, and hardware gives
    // up. But each page is walked from channel to channel: 512 bytes on is a few channels ahead.
    const bool small_planes = !per_lane && v.n_inner * bytes(dtype) < 2048;
    prefetch = small_planes && large ? 512 / bytes(dtype) : 0;
    // A result larger than L2 will be gone from it before it is read. Written past the caches it
    // saves reading the lines that it overwrites: fp32 forward and backward at 32x256x56x56 take
    // 43 ms instead of 57. Runs must start on cache lines, as the allocations do.
    const bool aligned = v.row_length() * bytes(dtype) % 64 == 0 || v.n_rows() == 1;
    streams = aligned && large;
  }

  int64_t group_channels() const { return per_lane ? view.n_channels : 1; }
  int64_t first_channel(int64_t group) const { return group * group_channels(); }
  int64_t tile_elements() const { return outer * piece_length * group_channels(); }

  Tile tile(int64_t group, int64_t index) const {
    const int64_t first = index / pieces * outer, count = std::min(outer, view.n_outer - first);
    if (per_lane)
      return {{count, view.n_channels, view.n_channels, view.mask_row_bytes(), 0, streams, true},
              first * view.n_channels,
              first * view.mask_row_bytes()};
    const int64_t begin = index % pieces * piece_length;
    const int64_t row = first * view.n_channels + group;
    return {{count, std::min(piece_length, view.n_inner - begin), view.n_channels * view.n_inner,
             view.n_channels * view.mask_row_bytes(), prefetch, streams, false},
            row * view.n_inner + begin,
            row * view.mask_row_bytes() + begin / 8};
  }

  // Elements a channel in tile `index`.
  int64_t count(int64_t index) const {
    const Runs runs = tile(0, index).runs;
    return per_lane ? runs.count : runs.count * runs.length;
  }
};

// reduce(group, tile) for all tiles, unless nothing is to be reduced, then
// finish(first channel, last channel), then apply(group, tile).
template <typename Reduce, typename Finish, typename Apply>
void two_stages(const Tiling& tiling, bool reduces, const Reduce& reduce, const Finish& finish,
                const Apply& apply) {
  const int64_t tiles = tiling.tiles, width = tiling.group_channels();
  if (tiling.groups >= num_threads()) {
    parallel_for(tiling.groups, tiles * tiling.tile_elements(), [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        for (int64_t tile = 0; reduces && tile < tiles; ++tile) reduce(group, tile);
        finish(group * width, (group + 1) * width);
        for (int64_t tile = tiles; tile-- > 0;) apply(group, tile);
      }
    });
    return;
  }
  const int64_t items = tiling.groups * tiles;
  if (reduces)
    parallel_for(items, tiling.tile_elements(), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) reduce(item / tiles, item % tiles);
    });
  parallel_for(tiling.view.n_channels, reduces ? 16 * tiles : 16, finish);
  parallel_for(items, tiling.tile_elements(), [&](int64_t begin, int64_t end) {
    for (int64_t item = end; item-- > begin;) apply(item / tiles, item % tiles);
  });
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

  double of_channel(int number, int64_t c, int64_t tile) const {
    return tiling_.per_lane ? of_tile(number, 0, tile)[c] : *of_tile(number, c, tile);
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

// The one place where y = (x - mean)·scale + shift gets its scale: backward must find bitwise what
// forward used, to recompute the same mask.
template <typename S>
S scale_of(const ChannelVector& weight, int64_t c, S rstd) {
  return S(get(weight, c, 1)) * rstd;
}

// Of one channel, or of a part of it.
struct Moments {
  double count = 0, sum = 0, m2 = 0;  // M2 = Σ(x - mean)²

  double mean() const { return sum / count; }

  void add(const Moments& part) {
    if (part.count == 0) return;
    Merge(count, part.count)(sum, m2, part.sum, part.m2);
    count += part.count;
  }

  // running = (1 - momentum)·running + momentum·batch, where it is given.
  void update_running(const ChannelVector& running_mean, const ChannelVector& running_var,
                      int64_t c, double momentum) const {
    const auto update = [&](const ChannelVector& running, double batch) {
      if (running.data) set(running, c, (1 - momentum) * get(running, c, 0) + momentum * batch);
    };
    update(running_mean, mean());
    update(running_var, m2 / (count - 1));
  }
};

// The first stage of forward, stats, over all tiles of a tensor.
class MomentsOfTiles {
 public:
  MomentsOfTiles(const void* input, Dtype dtype, const Tiling& tiling, bool wanted)
      : input_(input), dtype_(dtype), tiling_(tiling), partials_(tiling, wanted ? 2 : 0) {
    for (int64_t index = 0; wanted && index < tiling.tiles; ++index) {
      const double count = double(tiling.count(index));
      merges_.emplace_back(count_, count);
      count_ += count;
    }
  }

  void stats(int64_t group, int64_t index) const {
    const Tile tile = tiling_.tile(group, index);
    kernels(dtype_).stats({tile.runs, advance(input_, tile.offset, dtype_),
                           partials_.of_tile(0, group, index), partials_.of_tile(1, group, index)});
  }

  Moments of_channel(int64_t c) const {
    Moments moments{count_};
    for (int64_t index = 0; index < tiling_.tiles; ++index)
      merges_[index](moments.sum, moments.m2, partials_.of_channel(0, c, index),
                     partials_.of_channel(1, c, index));
    return moments;
  }

 private:
  const void* input_;
  Dtype dtype_;
  const Tiling& tiling_;
  Partials partials_;
  std::vector<Merge> merges_;  // of each tile with those before it
  double count_ = 0;
};

// One norm in forward, of x or of residual: its statistics, and the coefficients that they give.
template <typename S>
class ForwardNorm {
 public:
  ForwardNorm(const BatchNormForward& args, const Norm& norm, const void* input,
              const Tiling& tiling)
      : args_(args),
        norm_(norm),
        moments_(input, args.dtype, tiling, args.training),
        mean_(static_cast<S*>(norm.mean.data)),
        rstd_(static_cast<S*>(norm.rstd.data)),
        coefficients_(args.view.n_channels) {}

  void stats(int64_t group, int64_t index) const { moments_.stats(group, index); }

  void finish(int64_t c) const {
    if (args_.training) {
      const Moments moments = moments_.of_channel(c);
      moments.update_running(norm_.running_mean, norm_.running_var, c, norm_.momentum);
      mean_[c] = S(moments.mean());
      rstd_[c] = S(1 / std::sqrt(moments.m2 / moments.count + norm_.eps));
    } else {
      mean_[c] = S(get(norm_.running_mean, c, 0));
      rstd_[c] = S(1 / std::sqrt(get(norm_.running_var, c, 1) + norm_.eps));
    }
    scale_[c] = scale_of(norm_.weight, c, rstd_[c]);
    shift_[c] = S(get(norm_.bias, c, 0));
  }

  // Of the channels from c on.
  Affine affine(int64_t c) const {
    return {.mean = mean_ + c, .scale = scale_ + c, .shift = shift_ + c};
  }

 private:
  const BatchNormForward& args_;
  const Norm& norm_;
  MomentsOfTiles moments_;
  S *mean_, *rstd_;
  Coefficients<S, 2> coefficients_;
  S *scale_ = coefficients_[0], *shift_ = coefficients_[1];
};

template <typename S>
void forward(const BatchNormForward& args) {
  const Tiling tiling(args.view, args.dtype);
  const ForwardNorm<S> norm(args, args.norm, args.x, tiling);
  std::optional<ForwardNorm<S>> residual_norm;
  if (args.residual_norm.present())
    residual_norm.emplace(args, args.residual_norm, args.residual, tiling);

  const auto stats = [&](int64_t group, int64_t index) {
    norm.stats(group, index);
    if (residual_norm) residual_norm->stats(group, index);
  };

  const auto finish = [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      norm.finish(c);
      if (residual_norm) residual_norm->finish(c);
    }
  };

  const int64_t slab = args.view.n_channels * args.view.n_inner;
  const bool dense = args.out_pitch == slab;
  const bool on_cache_lines =
      (uintptr_t(args.out) | uintptr_t(args.out_pitch * bytes(args.dtype))) % 64 == 0;
  const auto apply = [&](int64_t group, int64_t index) {
    Tile tile = tiling.tile(group, index);
    tile.runs.streams &= dense || on_cache_lines;
    const int64_t c = tiling.first_channel(group);
    const int64_t out_offset = tile.offset + tile.offset / slab * (args.out_pitch - slab);
    kernels(args.dtype)
        .apply({.runs = tile.runs,
                .x = advance(args.x, tile.offset, args.dtype),
                .residual = advance(args.residual, tile.offset, args.dtype),
                .out = advance(args.out, out_offset, args.dtype),
                .out_stride = args.out_pitch,
                .mask = advance_mask(args.mask, tile.mask_offset),
                .affine = norm.affine(c),
                .residual_affine = residual_norm ? residual_norm->affine(c) : Affine{},
                .relu = args.relu ? Relu::kLast : Relu::kNone});
  };

  two_stages(tiling, args.training, stats, finish, apply);
}

// One norm in backward, of x or of residual: the coefficients that forward used, and those of its
// input's gradient.
template <typename S>
class BackwardNorm {
 public:
  BackwardNorm(const BatchNormBackward& args, const Norm& norm, const ChannelVector& dweight,
               const ChannelVector& dbias)
      : args_(args),
        dweight_(dweight),
        dbias_(dbias),
        mean_(static_cast<const S*>(norm.mean.data)),
        rstd_(static_cast<const S*>(norm.rstd.data)),
        coefficients_(args.view.n_channels) {
    for (int64_t c = 0; c < args.view.n_channels; ++c) {
      scale_[c] = scale_of(norm.weight, c, rstd_[c]);
      shift_[c] = S(get(norm.bias, c, 0));
    }
  }

  // From Σg and Σg·(x - mean).
  void finish(int64_t c, double sum_g, double sum_gx) const {
    const double n = double(args_.view.n_outer) * double(args_.view.n_inner);
    const double dweight = rstd_[c] * sum_gx;
    if (dweight_.data) set(dweight_, c, dweight);
    if (dbias_.data) set(dbias_, c, sum_g);
    finish_means(c, sum_g / n, dweight / n);
  }

  // From the means of g and g·x̂ over the batch.
  void finish_means(int64_t c, double mean_g, double mean_gx) const {
    const double scale = scale_[c], rstd = rstd_[c];
    k2_[c] = S(-scale * rstd * mean_gx);
    k3_[c] = S(-scale * mean_g);
  }

  // Of the channels from c on.
  Affine affine(int64_t c) const {
    return {mean_ + c, scale_ + c, shift_ + c, args_.training ? k2_ + c : nullptr, k3_ + c};
  }

 private:
  const BatchNormBackward& args_;
  const ChannelVector &dweight_, &dbias_;
  const S *mean_, *rstd_;
  Coefficients<S, 4> coefficients_;
  S *scale_ = coefficients_[0], *shift_ = coefficients_[1];
  S *k2_ = coefficients_[2], *k3_ = coefficients_[3];
};

template <typename S>
void backward(const BatchNormBackward& args) {
  const Tiling tiling(args.view, args.dtype);
  const bool needs_apply = args.dx || args.dresidual;
  const bool reduces = args.reduces(), dual = args.residual_norm.present();
  const Partials partials(tiling, !reduces ? 0 : dual ? 3 : 2);
  const BackwardNorm<S> norm(args, args.norm, args.dweight, args.dbias);
  std::optional<BackwardNorm<S>> residual_norm;
  if (dual)
    residual_norm.emplace(args, args.residual_norm, args.residual_dweight, args.residual_dbias);
  const Gate gate = !args.relu ? Gate::kNone : args.mask ? Gate::kMask : Gate::kRecompute;

  const auto bwd_reduce = [&](int64_t group, int64_t index) {
    const Tile tile = tiling.tile(group, index);
    const int64_t c = tiling.first_channel(group);
    kernels(args.dtype)
        .bwd_reduce({.runs = tile.runs,
                     .dout = advance(args.dout, tile.offset, args.dtype),
                     .x = advance(args.x, tile.offset, args.dtype),
                     .residual = advance(args.residual, tile.offset, args.dtype),
                     .mask = advance_mask(args.mask, tile.mask_offset),
                     .affine = norm.affine(c),
                     .residual_affine = dual ? residual_norm->affine(c) : Affine{},
                     .gate = gate,
                     .sums = {partials.of_tile(0, group, index), partials.of_tile(1, group, index),
                              dual ? partials.of_tile(2, group, index) : nullptr}});
  };

  const auto finish = [&](int64_t begin, int64_t end) {
    if (const S* means = static_cast<const S*>(args.means))
      for (int64_t c = begin; c < end; ++c)
        norm.finish_means(c, means[c], means[args.view.n_channels + c]);
    if (!reduces) return;
    for (int64_t c = begin; c < end; ++c) {
      double sums[3] = {};
      for (int64_t index = 0; index < tiling.tiles; ++index)
        for (int s = 0; s < (dual ? 3 : 2); ++s) sums[s] += partials.of_channel(s, c, index);
      norm.finish(c, sums[0], sums[1]);
      if (dual) residual_norm->finish(c, sums[0], sums[2]);
    }
  };

  const auto bwd_apply = [&](int64_t group, int64_t index) {
    if (!needs_apply) return;
    const Tile tile = tiling.tile(group, index);
    const int64_t c = tiling.first_channel(group);
    kernels(args.dtype)
        .bwd_apply({.runs = tile.runs,
                    .dout = advance(args.dout, tile.offset, args.dtype),
                    .x = advance(args.x, tile.offset, args.dtype),
                    .residual = advance(args.residual, tile.offset, args.dtype),
                    .mask = advance_mask(args.mask, tile.mask_offset),
                    .dx = advance(args.dx, tile.offset, args.dtype),
                    .dresidual = advance(args.dresidual, tile.offset, args.dtype),
                    .affine = norm.affine(c),
                    .residual_affine = dual ? residual_norm->affine(c) : Affine{},
                    .gate = gate});
  };

  two_stages(tiling, reduces, bwd_reduce, finish, bwd_apply);
}

template <typename S>
void stats(const BatchNormStats& args) {
  const Tiling tiling(args.view, args.dtype);
  const MomentsOfTiles moments(args.x, args.dtype, tiling, /*wanted=*/true);
  S* const mean = static_cast<S*>(args.moments);
  S *const m2 = mean + args.view.n_channels, *const count = m2 + args.view.n_channels;
  *count = S(args.view.n_outer * args.view.n_inner);
  two_stages(
      tiling, /*reduces=*/true, [&](int64_t group, int64_t index) { moments.stats(group, index); },
      [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          const Moments whole = moments.of_channel(c);
          mean[c] = S(whole.mean());
          m2[c] = S(whole.m2);
        }
      },
      [](int64_t, int64_t) {});
}

template <typename S>
void merge(const BatchNormMerge& args) {
  const S* const moments = static_cast<const S*>(args.moments);
  S *const mean = static_cast<S*>(args.mean), *const var = static_cast<S*>(args.var);
  const int64_t row_length = 2 * args.n_channels + 1;
  parallel_for(args.n_channels, args.n_ranks, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      Moments whole;
      for (int64_t rank = 0; rank < args.n_ranks; ++rank) {
        const S* row = moments + rank * row_length;
        const double count = row[2 * args.n_channels];
        whole.add({count, count * row[c], row[args.n_channels + c]});
      }
      whole.update_running(args.running_mean, args.running_var, c, args.momentum);
      mean[c] = S(whole.mean());
      var[c] = S(whole.m2 / whole.count);
      if (c == 0) *static_cast<S*>(args.count) = S(whole.count);
    }
  });
}

}  // namespace

void batch_norm(const BatchNormForward& args) {
  args.dtype == Dtype::kFloat64 ? forward<double>(args) : forward<float>(args);
}

void batch_norm_backward(const BatchNormBackward& args) {
  args.dtype == Dtype::kFloat64 ? backward<double>(args) : backward<float>(args);
}

void batch_norm_stats(const BatchNormStats& args) {
  args.dtype == Dtype::kFloat64 ? stats<double>(args) : stats<float>(args);
}

void batch_norm_merge(const BatchNormMerge& args) {
  args.dtype == Dtype::kFloat64 ? merge<double>(args) : merge<float>(args);
}

void add_relu(Dtype dtype, int64_t numel, bool relu_first, const void* x, const void* residual,
              void* out, uint8_t* mask) {
  const Tiling tiling({1, 1, numel}, dtype);
  parallel_for(tiling.tiles, tiling.tile_elements(), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tiling.tile(0, index);
      kernels(dtype).apply({.runs = tile.runs,
                            .x = advance(x, tile.offset, dtype),
                            .residual = advance(residual, tile.offset, dtype),
                            .out = advance(out, tile.offset, dtype),
                            .out_stride = tile.runs.stride,
                            .mask = advance_mask(mask, tile.mask_offset),
                            .relu = relu_first ? Relu::kFirst : Relu::kLast});
    }
  });
}

void add_relu_backward(Dtype dtype, int64_t numel, const void* dout, const uint8_t* mask,
                       void* dx) {
  const Tiling tiling({1, 1, numel}, dtype);
  parallel_for(tiling.tiles, tiling.tile_elements(), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tiling.tile(0, index);
      kernels(dtype).bwd_apply({.runs = tile.runs,
                                .dout = advance(dout, tile.offset, dtype),
                                .mask = mask + tile.mask_offset,
                                .dresidual = advance(dx, tile.offset, dtype),
                                .gate = Gate::kMask});
    }
  });
}

const char* instruction_set() { return kInstructionSet.name; }

}  // namespace fusedskip::cpu

// Forward: stats and apply.

#include "batch_norm.h"

#include <cmath>
#include <optional>

#include "moments.h"

namespace fusedskip::cpu {
namespace {

// One norm in forward, of x or of residual: its statistics, and the coefficients that they give.
template <typename S>
class ForwardNorm {
 public:
  ForwardNorm(const BatchNormForward& args, const Norm& norm, const void* input,
              const Tiling& tiling)
      : args_(args),
        norm_(norm),
        tiling_(tiling),
        moments_(input, args.dtype, tiling, args.training),
        coefficients_(tiling.view.n_channels) {}

  void stats(int64_t group, int64_t index) const { moments_.stats(group, index); }

  void finish(int64_t begin, int64_t end) const {
    S* const mean = static_cast<S*>(norm_.mean.data);
    S* const rstd = static_cast<S*>(norm_.rstd.data);
    if (args_.training) {
      moments_.merge_tiles(begin, end);
      for (int64_t c = begin; c < end; ++c) {
        const Moments moments = moments_.of_channel(c);
        moments.update_running(norm_.running_mean, norm_.running_var, c, norm_.momentum);
        mean[c] = S(moments.mean());
        rstd[c] = S(1 / std::sqrt(moments.m2 / moments.count + norm_.eps));
      }
    } else {
      read(norm_.running_mean, S(0), begin, end, mean);
      read(norm_.running_var, S(1), begin, end, rstd);
      for (int64_t c = begin; c < end; ++c) rstd[c] = S(1 / std::sqrt(rstd[c] + norm_.eps));
    }
    set_affine(norm_, tiling_, begin, end, coefficients_);
  }

  // Of the lanes from that of channel c on.
  Affine affine(int64_t c) const {
    return {.mean = mean_ + c, .scale = scale_ + c, .bias = bias_ + c};
  }

 private:
  const BatchNormForward& args_;
  const Norm& norm_;
  const Tiling& tiling_;
  MomentsOfTiles moments_;
  Coefficients<S, 3> coefficients_;
  S *mean_ = coefficients_[0], *scale_ = coefficients_[1], *bias_ = coefficients_[2];
};

template <typename S>
void forward(const BatchNormForward& args) {
  const int64_t slab = args.view.n_channels * args.view.n_inner;
  const Tiling tiling(args.view, args.dtype, /*out_is_dense=*/args.out_pitch == slab);
  const ForwardNorm<S> norm(args, args.norm, args.x, tiling);
  std::optional<ForwardNorm<S>> residual_norm;
  if (args.residual_norm.present())
    residual_norm.emplace(args, args.residual_norm, args.residual, tiling);

  const auto stats = [&](int64_t group, int64_t index) {
    norm.stats(group, index);
    if (residual_norm) residual_norm->stats(group, index);
  };

  const auto finish = [&](int64_t begin, int64_t end) {
    norm.finish(begin, end);
    if (residual_norm) residual_norm->finish(begin, end);
  };

  // Which out, being part of a wider tensor, may be off.
  const int64_t pitch = args.view.n_outer == 1 ? 0 : args.out_pitch * bytes(args.dtype);
  const bool on_cache_lines = (uintptr_t(args.out) | uintptr_t(pitch)) % 64 == 0;
  const auto in_out = [&](int64_t offset) {
    return offset + offset / slab * (args.out_pitch - slab);
  };
  const auto apply = [&](Tile tile) {
    tile.runs.streams &= on_cache_lines;
    kernels(args.dtype)
        .apply({.runs = tile.runs,
                .x = advance(args.x, tile.offset, args.dtype),
                .residual = advance(args.residual, tile.offset, args.dtype),
                .out = advance(args.out, in_out(tile.offset), args.dtype),
                .out_stride = in_out(tile.runs.stride),
                .mask = advance_mask(args.mask, tile.mask_offset),
                .affine = norm.affine(tile.channel),
                .residual_affine = residual_norm ? residual_norm->affine(tile.channel) : Affine{},
                .relu = args.relu ? Relu::kLast : Relu::kNone});
  };

  args.training ? two_stages(tiling, stats, finish, apply) : one_stage(tiling, finish, apply);
}

}  // namespace

void batch_norm(const BatchNormForward& args) {
  args.dtype == Dtype::kFloat64 ? forward<double>(args) : forward<float>(args);
}

}  // namespace fusedskip::cpu

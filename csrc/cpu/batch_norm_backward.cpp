// Backward: bwd_reduce and bwd_apply.

#include <optional>

#include "batch_norm.h"
#include "channels.h"

namespace fusedskip::cpu {
namespace {

// One norm in backward, of x or of residual: the coefficients that forward used, and those of its
// input's gradient.
template <typename S>
class BackwardNorm {
 public:
  BackwardNorm(const BatchNormBackward& args, const Norm& norm, const ChannelVector& dweight,
               const ChannelVector& dbias, const Tiling& tiling)
      : args_(args),
        norm_(norm),
        dweight_(dweight),
        dbias_(dbias),
        tiling_(tiling),
        coefficients_(tiling.view.n_channels) {
    set_affine(norm, tiling, 0, tiling.n_channels, coefficients_);
  }

  // From Σg and Σg·(x - mean).
  void finish(int64_t c, double sum_g, double sum_gx) const {
    const double n = double(args_.view.n_outer) * double(args_.view.n_inner);
    const double dweight = rstd(c) * sum_gx;
    if (dweight_.data) set(dweight_, c, dweight);
    if (dbias_.data) set(dbias_, c, sum_g);
    finish_means(c, sum_g / n, dweight / n);
  }

  // From the means of g and g·x̂ over the batch.
  void finish_means(int64_t c, double mean_g, double mean_gx) const {
    const double scale = scale_[c];
    tiling_.for_each_lane(c, [&](int64_t lane) {
      k2_[lane] = S(-scale * rstd(c) * mean_gx);
      k3_[lane] = S(-scale * mean_g);
    });
  }

  // Of the lanes from that of channel c on.
  Affine affine(int64_t c) const {
    const bool training = args_.training;
    return {mean_ + c, scale_ + c, bias_ + c, training ? k2_ + c : nullptr,
            training ? k3_ + c : nullptr};
  }

 private:
  S rstd(int64_t c) const { return static_cast<const S*>(norm_.rstd.data)[c]; }

  const BatchNormBackward& args_;
  const Norm& norm_;
  const ChannelVector &dweight_, &dbias_;
  const Tiling& tiling_;
  Coefficients<S, 5> coefficients_;
  S *mean_ = coefficients_[0], *scale_ = coefficients_[1], *bias_ = coefficients_[2];
  S *k2_ = coefficients_[3], *k3_ = coefficients_[4];
};

template <typename S>
void backward(const BatchNormBackward& args) {
  const Tiling tiling(args.view, args.dtype);
  const bool needs_apply = args.dx || args.dresidual;
  const bool reduces = args.reduces(), dual = args.residual_norm.present();
  const Partials partials(tiling, !reduces ? 0 : dual ? 3 : 2);
  const BackwardNorm<S> norm(args, args.norm, args.dweight, args.dbias, tiling);
  std::optional<BackwardNorm<S>> residual_norm;
  if (dual)
    residual_norm.emplace(args, args.residual_norm, args.residual_dweight, args.residual_dbias,
                          tiling);
  const Gate gate = !args.relu ? Gate::kNone : args.mask ? Gate::kMask : Gate::kRecompute;

  const auto bwd_tile = [&](const Tile& tile) -> BwdTile {
    return {.runs = tile.runs,
            .dout = advance(args.dout, tile.offset, args.dtype),
            .x = advance(args.x, tile.offset, args.dtype),
            .residual = advance(args.residual, tile.offset, args.dtype),
            .mask = advance_mask(args.mask, tile.mask_offset),
            .affine = norm.affine(tile.channel),
            .residual_affine = dual ? residual_norm->affine(tile.channel) : Affine{},
            .gate = gate};
  };

  const auto bwd_reduce = [&](int64_t group, int64_t index) {
    kernels(args.dtype)
        .bwd_reduce({bwd_tile(tiling.tile(group, index)),
                     {partials.of_tile(0, group, index), partials.of_tile(1, group, index),
                      dual ? partials.of_tile(2, group, index) : nullptr}});
  };

  const auto finish = [&](int64_t begin, int64_t end) {
    if (const S* means = static_cast<const S*>(args.means))
      for (int64_t c = begin; c < end; ++c)
        norm.finish_means(c, means[c], means[args.view.n_channels + c]);
    if (!reduces) return;
    for (int s = 0; s < (dual ? 3 : 2); ++s)
      partials.merge_tiles(begin, end, [&](int64_t lane, int64_t count, int64_t tile) {
        double* const sum = partials.of_lanes(s, lane, 0);
        const double* const part = partials.of_lanes(s, lane, tile);
        for (int64_t i = 0; i < count; ++i) sum[i] += part[i];
      });
    for (int64_t c = begin; c < end; ++c) {
      double sums[3] = {};
      for (int s = 0; s < (dual ? 3 : 2); ++s)
        tiling.for_each_lane(c, [&](int64_t lane) { sums[s] += *partials.of_lanes(s, lane, 0); });
      norm.finish(c, sums[0], sums[1]);
      if (dual) residual_norm->finish(c, sums[0], sums[2]);
    }
  };

  const auto bwd_apply = [&](const Tile& tile) {
    if (!needs_apply) return;
    kernels(args.dtype)
        .bwd_apply({bwd_tile(tile), advance(args.dx, tile.offset, args.dtype),
                    advance(args.dresidual, tile.offset, args.dtype)});
  };

  reduces ? two_stages(tiling, bwd_reduce, finish, bwd_apply)
          : one_stage(tiling, finish, bwd_apply);
}

}  // namespace

void batch_norm_backward(const BatchNormBackward& args) {
  args.dtype == Dtype::kFloat64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace fusedskip::cpu

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
               const ChannelVector& dbias)
      : args_(args),
        dweight_(dweight),
        dbias_(dbias),
        mean_(static_cast<const S*>(norm.mean.data)),
        rstd_(static_cast<const S*>(norm.rstd.data)),
        coefficients_(args.view.n_channels) {
    for (int64_t c = 0; c < args.view.n_channels; ++c) {
      scale_[c] = scale_of(norm.weight, c, rstd_[c]);
      bias_[c] = S(get(norm.bias, c, 0));
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
    return {mean_ + c, scale_ + c, bias_ + c, args_.training ? k2_ + c : nullptr, k3_ + c};
  }

 private:
  const BatchNormBackward& args_;
  const ChannelVector &dweight_, &dbias_;
  const S *mean_, *rstd_;
  Coefficients<S, 4> coefficients_;
  S *scale_ = coefficients_[0], *bias_ = coefficients_[1];
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
      partials.merge_tiles(begin, end, [&](int64_t c, int64_t tile) {
        partials.of_channel(s, c, 0) += partials.of_channel(s, c, tile);
      });
    for (int64_t c = begin; c < end; ++c) {
      const double sum_g = partials.of_channel(0, c, 0);
      norm.finish(c, sum_g, partials.of_channel(1, c, 0));
      if (dual) residual_norm->finish(c, sum_g, partials.of_channel(2, c, 0));
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

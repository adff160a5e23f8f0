// What a synchronised norm needs by itself: the moments of a part of a batch, and their merging.

#include "moments.h"

#include "batch_norm.h"

namespace fusedskip::cpu {
namespace {

template <typename S>
void stats(const BatchNormStats& args) {
  const Tiling tiling(args.view, args.dtype);
  const MomentsOfTiles moments(args.x, args.dtype, tiling, /*wanted=*/true);
  S* const mean = static_cast<S*>(args.moments);
  S *const m2 = mean + args.view.n_channels, *const count = m2 + args.view.n_channels;
  *count = S(args.view.n_outer * args.view.n_inner);
  two_stages(
      tiling, [&](int64_t group, int64_t index) { moments.stats(group, index); },
      [&](int64_t begin, int64_t end) {
        moments.merge_tiles(begin, end);
        for (int64_t c = begin; c < end; ++c) {
          const Moments whole = moments.of_channel(c);
          mean[c] = S(whole.mean());
          m2[c] = S(whole.m2);
        }
      },
      [](const Tile&) {});
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

void batch_norm_stats(const BatchNormStats& args) {
  args.dtype == Dtype::kFloat64 ? stats<double>(args) : stats<float>(args);
}

void batch_norm_merge(const BatchNormMerge& args) {
  args.dtype == Dtype::kFloat64 ? merge<double>(args) : merge<float>(args);
}

}  // namespace fusedskip::cpu

// The statistics of a tensor: the first stage of forward, stats, over all its tiles.

#pragma once

#include <vector>

#include "channels.h"
#include "merge.h"

namespace fusedskip::cpu {

// Of one channel, or of a part of it.
struct Moments {
  double count = 0, sum = 0, m2 = 0;  // M2 = Σ(x - mean)²

  double mean() const { return sum / count; }

  void add(const Moments& part) {
    if (part.count == 0) return;
    if (count == 0) {  // mostly: and then without the divisions of a merge
      *this = part;
      return;
    }
    Merge(count, part.count)(sum, m2, part.sum, part.m2);
    count += part.count;
  }

  // running = (1 - momentum)·running + momentum·batch, where it is given.
  void update_running(const ChannelVector& running_mean, const ChannelVector& running_var,
                      int64_t c, double momentum) const {
    const auto update = [&](const ChannelVector& running, double batch) {
      if (running.data) set(running, c, (1 - momentum) * get(running, c) + momentum * batch);
    };
    update(running_mean, mean());
    update(running_var, m2 / (count - 1));
  }
};

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

  void merge_tiles(int64_t begin, int64_t end) const {
    partials_.merge_tiles(begin, end, [&](int64_t lane, int64_t count, int64_t tile) {
      double *sum = partials_.of_lanes(0, lane, 0), *m2 = partials_.of_lanes(1, lane, 0);
      const double* part_sum = partials_.of_lanes(0, lane, tile);
      const double* part_m2 = partials_.of_lanes(1, lane, tile);
      const Merge merge = merges_[tile];
      for (int64_t i = 0; i < count; ++i) merge(sum[i], m2[i], part_sum[i], part_m2[i]);
    });
  }

  // Once the tiles are merged.
  Moments of_channel(int64_t c) const {
    Moments moments;
    tiling_.for_each_lane(c, [&](int64_t lane) {
      moments.add({count_, *partials_.of_lanes(0, lane, 0), *partials_.of_lanes(1, lane, 0)});
    });
    return moments;
  }

 private:
  const void* input_;
  Dtype dtype_;
  const Tiling& tiling_;
  Partials partials_;
  std::vector<Merge> merges_;  // of each tile with those before it
  double count_ = 0;           // elements a lane
};

}  // namespace fusedskip::cpu

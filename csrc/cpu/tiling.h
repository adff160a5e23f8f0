// Cuts a tensor into tiles and runs two stages over them.
//
// The tiles, and the order in which their partial results are merged, follow from the shape alone,
// so that results are bitwise the same whatever the number of threads. What the threads change is
// the order of the work: with channels enough for all of them, each takes a channel through both
// stages while it lies in cache; otherwise all run the first stage, then all the second, backwards,
// so that it starts with what the first has left in cache.

#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "parallel.h"

namespace fusedskip::cpu {

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

}  // namespace fusedskip::cpu

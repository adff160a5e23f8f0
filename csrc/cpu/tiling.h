// Cuts a tensor into tiles and runs one stage or two over them.
//
// The tiles, and the order in which their partial results are merged, follow from the shape alone,
// so that results are bitwise the same whatever the number of threads. What the threads change is
// the order of the work: with channels enough for all of them, each takes a channel, or a block of
// small ones, through both stages while it lies in cache; otherwise all run the first stage, then
// all the second, backwards, so that it starts with what the first has left in cache. Elementwise
// work alone goes as memory does, from one channel to the next: bf16 evaluation at 32x2048x7x7
// takes 0.4 ms instead of 1.2.

#pragma once

#include <algorithm>
#include <bit>
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
  int64_t channel;      // of its first run
  int64_t offset;       // likewise, in elements of the tensor
  int64_t mask_offset;  // likewise, in bytes

  // From its last run to its first.
  Tile reversed() const {
    const int64_t last = runs.count - 1;
    Tile tile = *this;
    tile.offset += last * runs.stride;
    tile.mask_offset += last * runs.mask_stride;
    tile.runs.stride = -runs.stride;
    tile.runs.mask_stride = -runs.mask_stride;
    if (runs.prefetch == runs.stride) tile.runs.prefetch = -runs.stride;
    return tile;
  }
};

// Channels-last rows of few channels may be shorter than a pack. So some of them, of a number that
// divides all, are taken for one, whose lanes go through the channels as many times: at 32x16x56x56
// bf16 forward takes 0.5 and backward 0.8 of the time by it, fp32 0.9 and 0.95.
// Not of fp64, whose packs are 8 channels and whose means would lose digits in being merged.
inline int64_t rows_as_one(const View& v, Dtype dtype) {
  constexpr int64_t kLanes = 64;
  const bool pads_mask = v.n_channels % 8 != 0;  // rows to whole bytes
  if (v.n_inner != 1 || pads_mask || dtype == Dtype::kFloat64) return 1;
  int64_t rows = std::max<int64_t>(1, kLanes / std::max<int64_t>(1, v.n_channels));
  while (v.n_outer % rows != 0) --rows;
  return rows;
}

// Channels fall into groups that are reduced apart: one channel each, or channels-last all
// together. Every group is cut into `tiles` tiles.
struct Tiling {
  int64_t n_channels, repeats;  // the lanes of a row are the channels, `repeats` times
  View view;
  bool per_lane;
  int64_t groups, tiles;
  int64_t pieces, piece_length;  // of a plane, when one is more than a tile
  int64_t outer;                 // planes or rows a tile
  int64_t ordered;               // planes or rows an ordered tile
  int64_t block;                 // channels that go through both stages together
  int64_t prefetch;
  bool streams, ordered_streams;  // the results of tiles, and of ordered ones

  Tiling(View tensor, Dtype dtype, bool out_is_dense = true)
      : n_channels(tensor.n_channels),
        repeats(out_is_dense ? rows_as_one(tensor, dtype) : 1),
        view{tensor.n_outer / repeats, tensor.n_channels * repeats, tensor.n_inner},
        per_lane(tensor.n_inner == 1) {
    const View& v = view;
    // 8192 elements stay in L1 for a second look, and ordered tiles of as many share a small tensor
    // out evenly: of 32768, evaluation at 8x80x8x8 took 1.15 to 1.3 of the time. Rows are many
    // channels at once, and each tile of them writes its sums for all, in double, to be merged: 32
    // tiles, for as many threads, and only of many rows more. With 128 at 32x512x28x28 bf16 forward
    // and backward took 1.15 of the time. Of few rows two, of 24 at least, by which 2x2048x7x7
    // takes 0.6 to 0.8.
    constexpr int64_t kPlaneTile = 8192, kRowTile = 32768, kMaxRowTiles = 128;
    // As many channels as stay in L2 beside what else is read and written: the second stage then
    // goes through pages in order. Of tensors out of memory NCHW 7x7 takes 0.65 of the time by it,
    // out of L3 0.85, where batches are so small that it finds most of a page in one piece; at a
    // batch of 256, with 10 elements at once, it would take 1.3 to 3.4.
    constexpr int64_t kBlock = 128 << 10, kPiece = 3 << 10;
    pieces = 1;
    piece_length = v.n_inner;
    if (per_lane) {
      groups = 1;
      const int64_t of_rows = std::max({std::min<int64_t>(v.n_outer / 24, 2),
                                        std::min<int64_t>(v.n_outer / 64, 32), v.n_outer / 512});
      const int64_t most = std::min(of_rows, v.n_outer * v.n_channels / kRowTile);
      const uint64_t n_tiles = std::bit_floor(uint64_t(std::clamp<int64_t>(most, 1, kMaxRowTiles)));
      outer = ceil_div(v.n_outer, int64_t(n_tiles));
      ordered = std::clamp<int64_t>(kPlaneTile / v.n_channels, 1, v.n_outer);
      block = 1;
    } else {
      groups = v.n_channels;
      outer = std::clamp<int64_t>(kPlaneTile / v.n_inner, 1, v.n_outer);
      // Pieces start at a whole byte of mask and a cache line of any dtype.
      piece_length = ceil_div(ceil_div(v.n_inner, ceil_div(v.n_inner, kPlaneTile)), 64) * 64;
      pieces = ceil_div(v.n_inner, piece_length);
      ordered = std::clamp<int64_t>(kPlaneTile / v.n_inner, 1, v.n_channels);
      const int64_t in_block = kBlock / (v.n_outer * v.n_inner * bytes(dtype));
      block = std::clamp<int64_t>(in_block, 1, v.n_channels);
      if (pieces > 1 || block * v.n_inner * bytes(dtype) < kPiece) block = 1;
    }
    tiles = ceil_div(v.n_outer, outer) * pieces;
    constexpr int64_t kMB = 1 << 20;
    const int64_t size = v.n_outer * v.n_channels * v.n_inner * bytes(dtype);
    const bool large = size > 2 * kMB;
    // Going through one channel jumps from page to page, and hardware starts anew in each. So what
    // is next is fetched meanwhile: as far in the next plane, by which bf16 forward at 32x256x56x56
    // takes 0.6 of the time, fp32 0.9; or of small planes the next channel, as each page is walked
    // from channel to channel, by which bf16 stats at 32x512x28x28 takes 0.55.
    constexpr int64_t kAhead = 256, kSmallPlane = 2 << 10;
    const bool small_planes = v.n_inner * bytes(dtype) < kSmallPlane;
    prefetch = per_lane || pieces > 1 || !large ? 0
               : small_planes                   ? std::max(v.n_inner, kAhead)
                                                : v.n_channels * v.n_inner;
    // A large result will be gone from the caches before it is read. Written past them it saves
    // reading the lines that it overwrites: fp32 forward and backward at 32x256x56x56 take 43 ms
    // instead of 57. From which size on, whole models say, whose next layer would find its input in
    // the caches: with 2 MB, inference of DenseNet-121 and ResNet-50 on 8 images of 128 pixels took
    // 1.03 to 1.08 of the time, training up to 1.02. Training gains from 4 MB on, for the second
    // stage is to find in the caches what the first has read: bf16 at 32x2048x7x7 takes 0.88.
    // Runs must start on cache lines, as the allocations do.
    const bool aligned = v.row_length() * bytes(dtype) % 64 == 0 || v.n_rows() == 1;
    streams = aligned && size > 4 * kMB;
    ordered_streams = aligned && size > 8 * kMB;
  }

  // Calls body(lane) for each lane of a channel.
  template <typename Body>
  void for_each_lane(int64_t c, const Body& body) const {
    for (int64_t lane = c; lane < view.n_channels; lane += n_channels) body(lane);
  }

  int64_t group_channels() const { return per_lane ? view.n_channels : 1; }
  int64_t tile_elements() const { return outer * piece_length * group_channels(); }

  Tile tile(int64_t group, int64_t index) const {
    const int64_t first = index / pieces * outer, count = std::min(outer, view.n_outer - first);
    if (per_lane) return rows(first, count);
    Tile tile = piece(first * view.n_channels + group, index % pieces, count);
    tile.runs.stride = view.n_channels * view.n_inner;
    tile.runs.mask_stride = view.n_channels * view.mask_row_bytes();
    tile.runs.prefetch = prefetch;
    return tile;
  }

  // Tiles of elementwise work alone, in the order of memory.
  int64_t ordered_tiles() const {
    return per_lane ? ceil_div(view.n_outer, ordered)
                    : view.n_outer * ceil_div(view.n_channels, ordered) * pieces;
  }
  int64_t ordered_tile_elements() const { return ordered * piece_length * group_channels(); }

  Tile ordered_tile(int64_t index) const {
    const int64_t n_blocks = ceil_div(view.n_channels, ordered), planes_of = index / pieces;
    const int64_t channel = planes_of % n_blocks * ordered, row = index * ordered;
    Tile tile = per_lane ? rows(row, std::min(ordered, view.n_outer - row))
                         : planes(planes_of / n_blocks, channel,
                                  std::min(ordered, view.n_channels - channel), index % pieces);
    tile.runs.streams = ordered_streams;
    return tile;
  }

  // A piece of one plane of each of `count` channels.
  Tile planes(int64_t outer, int64_t channel, int64_t count, int64_t index = 0) const {
    Tile tile = piece(outer * view.n_channels + channel, index, count);
    tile.runs.channel_stride = 1;
    return tile;
  }

  Tile rows(int64_t first, int64_t count) const {
    return {.runs = {.count = count,
                     .length = view.n_channels,
                     .stride = view.n_channels,
                     .mask_stride = view.mask_row_bytes(),
                     .streams = streams,
                     .per_lane = true},
            .channel = 0,
            .offset = first * view.n_channels,
            .mask_offset = first * view.mask_row_bytes()};
  }

  // `count` runs of one piece of a plane each; the first plane is `row`.
  Tile piece(int64_t row, int64_t index, int64_t count) const {
    const int64_t begin = index * piece_length;
    return {.runs = {.count = count,
                     .length = std::min(piece_length, view.n_inner - begin),
                     .stride = view.n_inner,
                     .mask_stride = view.mask_row_bytes(),
                     .streams = streams},
            .channel = row % view.n_channels,
            .offset = row * view.n_inner + begin,
            .mask_offset = row * view.mask_row_bytes() + begin / 8};
  }

  // Elements a channel in tile `index`.
  int64_t count(int64_t index) const {
    const Runs runs = tile(0, index).runs;
    return per_lane ? runs.count : runs.count * runs.length;
  }
};

// finish(first channel, last channel), then apply(tile) for all tiles.
template <typename Finish, typename Apply>
void one_stage(const Tiling& tiling, const Finish& finish, const Apply& apply) {
  parallel_for(tiling.n_channels, 16, finish);
  parallel_for(tiling.ordered_tiles(), tiling.ordered_tile_elements(),
               [&](int64_t begin, int64_t end) {
                 for (int64_t index = begin; index < end; ++index)
                   apply(tiling.ordered_tile(index));
               });
}

// reduce(group, tile) for all tiles, finish(first channel, last channel), then apply(tile) from the
// last to the first.
template <typename Reduce, typename Finish, typename Apply>
void two_stages(const Tiling& tiling, const Reduce& reduce, const Finish& finish,
                const Apply& apply) {
  const int64_t tiles = tiling.tiles, width = tiling.per_lane ? tiling.n_channels : 1;
  const auto apply_backwards = [&](int64_t group, int64_t index) {
    const Tile tile = tiling.tile(group, index);
    // Not row by row: of channels-last bf16, forward would take twice as long.
    apply(tiling.per_lane ? tile : tile.reversed());
  };
  const auto apply_block_backwards = [&](int64_t channel, int64_t count) {
    for (int64_t outer = tiling.view.n_outer; outer-- > 0;) {
      Tile planes = tiling.planes(outer, channel, count);
      if (outer > 0) planes.runs.prefetch = -tiling.view.n_channels * tiling.view.n_inner;
      apply(planes);
    }
  };
  if (tiling.groups >= num_threads()) {
    parallel_for(tiling.groups, tiles * tiling.tile_elements(), [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += tiling.block) {
        const int64_t last = std::min(first + tiling.block, end);
        for (int64_t group = first; group < last; ++group)
          for (int64_t tile = 0; tile < tiles; ++tile) reduce(group, tile);
        finish(first * width, last * width);
        if (tiling.block > 1)
          apply_block_backwards(first, last - first);
        else
          for (int64_t tile = tiles; tile-- > 0;) apply_backwards(first, tile);
      }
    });
    return;
  }
  const int64_t items = tiling.groups * tiles;
  parallel_for(items, tiling.tile_elements(), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) reduce(item / tiles, item % tiles);
  });
  parallel_for(tiling.n_channels, 16 * tiles, finish);
  parallel_for(items, tiling.tile_elements(), [&](int64_t begin, int64_t end) {
    for (int64_t item = end; item-- > begin;) apply_backwards(item / tiles, item % tiles);
  });
}

}  // namespace fusedskip::cpu

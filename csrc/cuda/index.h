// Where the elements of a tensor fall: octets, tiles, programs. Plain arithmetic, without CUDA, so
// that tests/cuda_index.cpp walks over it on the host.
//
// A thread takes an octet at a time: up to eight neighbours in a row of memory, and with them one
// byte of mask, which therefore has one writer. Rows are padded to whole octets.
//
// A block is 256 threads, `columns` octets wide and `depth` positions deep. Channels-last, a
// position is a row and a thread keeps its eight channels. Channels-first, a block keeps to one
// channel, is one octet wide, and a position is an octet of one of the channel's planes. The
// positions of a channel block are dealt to its programs, a block's depth at a time, in turn: all
// programs work near one place in memory, and a backward walk begins where a forward walk ended.

#pragma once

#include <algorithm>

#include "../args.h"

namespace fusedskip::cuda {

inline constexpr int kOctet = 8;
inline constexpr int kThreads = 256;

// Three blocks of up to 80 registers a thread fit an SM, and an H100 has 132 SMs: the whole grid
// is resident at once. A constant, so that sums do not depend on the GPU. Of a dual norm two fit,
// of up to 128 registers: channels-last, a thread holds 64 coefficients of its eight channels.
inline constexpr int kBlocksPerSM = 3, kDualBlocksPerSM = 2;
inline constexpr int kBlocks = 128 * kBlocksPerSM, kDualBlocks = 128 * kDualBlocksPerSM;

// Eight octets are a line of 128 bytes in 16 bits. Rows of at most eight are cut at four: twice
// the channel blocks, half the splits for a block of the second stage to merge.
inline constexpr int kMaxColumns = 8;

// The greatest number of elements, up to an octet, that divides a row and whose accesses, of 16
// bytes where they fill them, are aligned for all pointers; `addresses` is their bitwise or.
constexpr int vector_width(int64_t row_length, Dtype dtype, uintptr_t addresses) {
  for (const int width : {8, 4}) {
    const int64_t access = std::min<int64_t>(16, width * bytes(dtype));
    if (row_length % width == 0 && addresses % access == 0) return width;
  }
  return 1;
}

// One octet of a tensor.
struct Place {
  int64_t element;  // the offset of its first element
  int64_t byte;     // the offset of its mask
  int elements;     // how many of the eight exist; 0 past the end
  int64_t result;   // the offset of its first element in out, which may be part of a wider tensor
};

// The channels of one thread.
struct Channels {
  int64_t first;
  int count;  // may be 0
};

// How a tensor is cut up, from its shape alone.
struct Tiling {
  View view;
  bool channels_last;
  int64_t octets;            // a row
  int columns, column_bits;  // a power of two: division would be twenty instructions
  int64_t channel_blocks;
  int programs;  // for each channel block; in a reduction, the splits

  // From one position of a thread to its next, and what an outer index is worth in elements of the
  // tensor and in bytes of the mask.
  int64_t step_outer, step_octets;
  int64_t outer_elements, outer_bytes;
  int64_t outer_results;  // in elements of out

  // `resident` blocks channels-last, or a few less.
  constexpr explicit Tiling(const View& v, int64_t resident = kBlocks)
      : view(v), channels_last(v.n_inner == 1), octets(v.mask_row_bytes()), column_bits(0) {
    if (channels_last)
      while ((1 << column_bits) < std::min<int64_t>(octets > 8 ? kMaxColumns : 4, octets))
        ++column_bits;
    columns = 1 << column_bits;
    channel_blocks = channels_last ? ceil_div(octets, columns) : v.n_channels;
    // Channels come in any number and have partials of one number only: with several blocks for
    // every place on the GPU, its last round is a small part of the whole.
    const int64_t blocks = channels_last ? resident : 4 * kBlocks;
    const int64_t most = std::max<int64_t>(1, blocks / channel_blocks);
    const int64_t tiles = ceil_div(v.n_outer * (channels_last ? 1 : octets), depth());
    programs = int(ceil_div(tiles, ceil_div(tiles, most)));  // within one tile of each other
    const int64_t step = int64_t{programs} * depth();
    step_outer = channels_last ? step : step / octets;
    step_octets = channels_last ? 0 : step % octets;
    outer_elements = outer_results = v.n_channels * v.n_inner;
    outer_bytes = (channels_last ? 1 : v.n_channels) * octets;
  }

  constexpr int depth() const { return kThreads >> column_bits; }
  constexpr int column(int thread) const { return thread & (columns - 1); }
  constexpr int position(int thread) const { return thread >> column_bits; }

  // Channels-last, those of a thread's octet.
  constexpr Channels channels(int64_t channel_block, int thread) const {
    if (!channels_last) return {channel_block, 1};
    const int64_t first = (channel_block * columns + column(thread)) * kOctet;
    return {first, int(std::clamp<int64_t>(view.n_channels - first, 0, kOctet))};
  }

  // What is done once a channel is done by one thread for each: its own channel, or -1.
  constexpr int64_t own_channel(int64_t channel_block, int thread) const {
    const int n_channels = channels_last ? columns * kOctet : 1;
    const int64_t channel = channel_block * n_channels + thread;
    return thread < n_channels && channel < view.n_channels ? channel : -1;
  }

  // Partial results are rows of one number a channel, padded to whole octets.
  constexpr int64_t pitch() const { return channels_last ? octets * kOctet : view.n_channels; }

  // Two rows for each program and norm, and one number for each block.
  constexpr int64_t workspace_size(int norms) const {
    return programs * (2 * norms * pitch() + channel_blocks);
  }
};

// The grid of stats takes the tensors of all norms side by side; the other stages, in one walk.
constexpr Tiling stats_tiling(const View& view, int norms) { return Tiling(view, kBlocks / norms); }
constexpr Tiling stage_tiling(const View& view, int norms) {
  return Tiling(view, norms == 1 ? kBlocks : kDualBlocks);
}

// The octets of one thread, in turn. Backwards, the outermost dimension is mirrored: the second
// stage of a pair begins with what the first has left in L2. Offsets are moved, not computed:
// 64-bit products would be a third of the instructions of stats. kWidth elements at a time exist:
// where that is an octet, nothing has to be counted.
template <bool kChannelsLast, int kWidth>
class Walk {
 public:
  constexpr Walk(const Tiling& tiling, int64_t channel_block, int program, int thread,
                 bool backwards)
      : tiling_(tiling), sign_(backwards ? -1 : 1) {
    const View& view = tiling.view;
    const int64_t position = int64_t{program} * tiling.depth() + tiling.position(thread);
    int64_t row = 0;  // of the octets at an outer index
    if constexpr (kChannelsLast) {
      octet_ = channel_block * tiling.columns + tiling.column(thread);
      outer_ = octet_ < tiling.octets ? position : view.n_outer;
    } else {
      octet_ = position % tiling.octets;
      outer_ = position / tiling.octets;
      row = channel_block;
    }
    const int64_t outer = backwards ? view.n_outer - 1 - outer_ : outer_;
    const int64_t inner = row * view.n_inner + octet_ * kOctet;
    next_.element = outer * tiling.outer_elements + inner;
    next_.result = outer * tiling.outer_results + inner;
    next_.byte = outer * tiling.outer_bytes + row * tiling.octets + octet_;
    next_.elements = elements();
  }

  constexpr bool done() const { return outer_ >= tiling_.view.n_outer; }

  // Past the end, places without elements.
  constexpr Place next() {
    const Place place{next_.element, next_.byte, done() ? 0 : next_.elements, next_.result};
    move(tiling_.step_outer, tiling_.step_octets);
    if constexpr (!kChannelsLast) {
      if (octet_ >= tiling_.octets) move(1, -tiling_.octets);
      next_.elements = elements();
    }
    return place;
  }

 private:
  constexpr int elements() const {
    if constexpr (kWidth == kOctet) return kOctet;
    const int64_t length = kChannelsLast ? tiling_.view.n_channels : tiling_.view.n_inner;
    return int(std::min<int64_t>(kOctet, length - octet_ * kOctet));
  }

  constexpr void move(int64_t outer, int64_t octets) {
    outer_ += outer;
    octet_ += octets;
    next_.element += sign_ * outer * tiling_.outer_elements + octets * kOctet;
    next_.result += sign_ * outer * tiling_.outer_results + octets * kOctet;
    next_.byte += sign_ * outer * tiling_.outer_bytes + octets;
  }

  const Tiling& tiling_;
  int64_t sign_;
  int64_t outer_, octet_;
  Place next_;
};

}  // namespace fusedskip::cuda

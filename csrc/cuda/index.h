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
// programs work near one place in memory, and a walk backwards begins where one forwards ended. A
// round is what a thread goes through between two steps: one octet.

#pragma once

#include <algorithm>
#include <array>
#include <optional>

#include "../args.h"

namespace fusedskip::cuda {

inline constexpr int kOctet = 8;
inline constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;

// Three blocks of up to 80 registers a thread fit an SM, and an H100 has 132 SMs: the whole grid
// is resident at once. A constant, so that sums do not depend on the GPU. Of a dual norm two fit,
// of up to 128 registers: channels-last, a thread holds 64 coefficients of its eight channels.
inline constexpr int kBlocksPerSM = 3, kDualBlocksPerSM = 2;
inline constexpr int kGrid = 128 * kBlocksPerSM, kDualGrid = 128 * kDualBlocksPerSM;

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

// A distance, or a place: in elements of a tensor, bytes of its mask, elements of out, which may be
// part of a wider tensor, and octets.
struct Step {
  int64_t element, byte, result, octet;

  constexpr Step& operator+=(const Step& s) {
    element += s.element, byte += s.byte, result += s.result, octet += s.octet;
    return *this;
  }
  constexpr Step& operator-=(const Step& s) {
    element -= s.element, byte -= s.byte, result -= s.result, octet -= s.octet;
    return *this;
  }
  friend constexpr Step operator+(Step a, const Step& b) { return a += b; }
  friend constexpr Step operator*(int64_t n, const Step& s) {
    return {n * s.element, n * s.byte, n * s.result, n * s.octet};
  }
};

// The channels of one thread.
struct Channels {
  int64_t first;
  int count;  // may be 0
};

// So many programs or a few less, that tiles are dealt to within one round of each other.
constexpr int64_t even_programs(int64_t tiles, int64_t most) {
  return ceil_div(tiles, ceil_div(tiles, most));
}

// How a tensor is cut up, from its shape alone.
struct Tiling {
  View view;
  bool channels_last;
  int64_t octets;            // a row
  int columns, column_bits;  // a power of two: division would be twenty instructions
  int64_t channel_blocks;
  int programs;  // for each channel block; in a reduction, the splits

  // Rounds that all programs have, and the positions that are left for one more.
  int whole_rounds;
  int64_t rest;

  // From a thread's octet to that of its next round; and if that is past the end of a row, to the
  // next outer index. Worked out once: a product would hold two registers.
  Step round, carry;

  // So many blocks or a few less; one for each channel block, if these are more.
  constexpr Tiling(const View& v, int64_t blocks, int most_columns = kMaxColumns)
      : view(v), channels_last(v.n_inner == 1), octets(v.mask_row_bytes()), column_bits(0) {
    if (octets <= 8) most_columns = std::min(most_columns, 4);
    if (channels_last)
      while ((1 << column_bits) < std::min<int64_t>(most_columns, octets)) ++column_bits;
    columns = 1 << column_bits;
    channel_blocks = channels_last ? ceil_div(octets, columns) : v.n_channels;
    const int64_t most = std::max<int64_t>(1, blocks / channel_blocks);
    const int64_t positions = v.n_outer * (channels_last ? 1 : octets);
    const int64_t tiles = ceil_div(positions, depth());
    programs = int(even_programs(tiles, most));
    const int64_t step = first_position(programs);
    whole_rounds = int(positions / step);
    rest = positions % step;
    set_steps(v.n_channels * v.n_inner);
  }

  // Of out, where that is part of a wider tensor: the elements from one outer index to the next.
  constexpr Tiling with_pitch(int64_t out_pitch) const {
    Tiling tiling = *this;
    tiling.set_steps(out_pitch);
    return tiling;
  }

  constexpr int depth() const { return kThreads >> column_bits; }
  constexpr int64_t first_position(int program) const { return int64_t{program} * depth(); }
  // In the last one some threads may find nothing.
  constexpr int rounds(int program) const {
    return whole_rounds + (first_position(program) < rest);
  }
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

  // The start of an octet of row `row` at an outer index.
  constexpr Step place(int64_t outer, int64_t row, int64_t octet) const {
    const int64_t inner = row * view.n_inner + octet * kOctet;
    return outer * outer_ + Step{inner, row * octets + octet, inner, octet};
  }

 private:
  constexpr void set_steps(int64_t out_pitch) {
    const int64_t step = first_position(programs);
    outer_ = {view.n_channels * view.n_inner, view.n_rows() / view.n_outer * octets, out_pitch, 0};
    round = channels_last ? place(step, 0, 0) : place(step / octets, 0, step % octets);
    carry = place(1, 0, -octets);
  }

  Step outer_;  // what an outer index is worth
};

// Channels-first, blocks come in any number and have partials of one number only: with several for
// every place on the GPU, its last round is a small part of the whole.
constexpr int64_t launch_blocks(const View& view, int64_t resident) {
  return view.n_inner == 1 ? resident : 4 * kGrid;
}

// The grid of stats takes the tensors of all norms side by side; the other stages, in one walk.
constexpr Tiling stats_tiling(const View& view, int norms) {
  return Tiling(view, launch_blocks(view, kGrid / norms));
}
constexpr Tiling stage_tiling(const View& view, int norms) {
  return Tiling(view, launch_blocks(view, norms == 1 ? kGrid : kDualGrid));
}

// The most blocks that are a cluster anywhere, and how many clusters of each size a GPU holds at
// once: each lies within a group of SMs, of which some have a few less than others.
inline constexpr int kMaxCluster = 16;
using ClustersAtOnce = std::array<int, kMaxCluster + 1>;

// The programs of each channel block as a cluster that keeps all of its octets, or one that does so
// alone, a program having room for `rounds`: however many channel blocks there are, each is read
// once. They are cut as wide as fits, down to 32 bytes of 16-bit elements, the least that is
// fetched whole. Nothing where the last of few clusters would leave more than half of the GPU's
// places empty: half of them still have 24 KB an SM in flight, where 18 KB saturate an H100.
constexpr std::optional<Tiling> cluster_tiling(const View& view, const ClustersAtOnce& at_once,
                                               int rounds) {
  if (rounds == 0) return std::nullopt;
  for (int columns = kMaxColumns; columns >= (view.n_inner == 1 ? 2 : kMaxColumns); columns /= 2) {
    const Tiling alone(view, 1, columns);
    const int64_t tiles = alone.rounds(0), clusters = alone.channel_blocks;
    const int64_t most = std::min<int64_t>(kMaxCluster, tiles);
    int64_t n = ceil_div(tiles, rounds);
    while (n < most && clusters <= at_once[n + 1]) ++n;
    for (; n <= most; ++n) {
      const int64_t programs = even_programs(tiles, n), held = at_once[programs];
      const int64_t last = clusters % std::max<int64_t>(1, held);
      const bool fills = last == 0 || 2 * last >= held || clusters >= 4 * held;
      if (held > 0 && fills) return Tiling(view, programs * clusters, columns);
    }
  }
  return std::nullopt;
}

// The octets of one thread, from its first or, backwards, from its last: the second stage of a pair
// begins with what the first has left in L2, and finds what the same thread has kept on the chip.
// Forwards, it may take batches of kBatch rounds of which the last is whole: then the first begins
// before the first round. Offsets are moved, not computed: 64-bit products would be a third of the
// instructions of stats. kWidth elements at a time exist: where that is an octet, nothing has to be
// counted.
template <bool kChannelsLast, int kWidth, bool kBackwards, int kBatch = 0>
class Walk {
 public:
  constexpr Walk(const Tiling& tiling, int64_t channel_block, int program, int thread)
      : tiling_(tiling), rounds_(tiling.rounds(program)), round_(kBackwards ? rounds_ - 1 : 0) {
    const int64_t position = round_ * tiling.first_position(tiling.programs) +
                             tiling.first_position(program) + tiling.position(thread);
    if constexpr (kChannelsLast) {
      const int64_t octet = channel_block * tiling.columns + tiling.column(thread);
      next_ = tiling.place(position, 0, octet);
      end_ = octet < tiling.octets ? numel() : 0;
    } else {
      next_ = tiling.place(position / tiling.octets, channel_block, position % tiling.octets);
      end_ = numel();
    }
    if constexpr (!kBackwards && kBatch > 1)
      for (int missing = (kBatch - rounds_ % kBatch) % kBatch; missing > 0; --missing) step_back();
  }

  // The same for all threads of a block.
  constexpr bool done() const { return kBackwards ? round_ < 0 : round_ >= rounds_; }
  constexpr int round() const { return round_; }

  // Where nothing is, and when it is done, places without elements.
  constexpr Place next() {
    const bool exists = uint64_t(next_.element) < uint64_t(end_);  // nor below 0
    const Place place{next_.element, next_.byte, exists ? elements() : 0, next_.result};
    if constexpr (kBackwards) {
      step_back();
    } else {
      ++round_;
      next_ += tiling_.round;
      if (!kChannelsLast && next_.octet >= tiling_.octets) next_ += tiling_.carry;
    }
    return place;
  }

 private:
  constexpr void step_back() {
    --round_;
    next_ -= tiling_.round;
    if (!kChannelsLast && next_.octet < 0) next_ -= tiling_.carry;
  }

  constexpr int64_t numel() const {
    return tiling_.view.n_outer * tiling_.view.n_channels * tiling_.view.n_inner;
  }

  constexpr int elements() const {
    if constexpr (kWidth == kOctet) return kOctet;
    const int64_t length = kChannelsLast ? tiling_.view.n_channels : tiling_.view.n_inner;
    return int(std::min<int64_t>(kOctet, length - next_.octet * kOctet));
  }

  const Tiling& tiling_;
  int rounds_, round_;
  Step next_;
  int64_t end_;  // of the elements that there are for this thread
};

}  // namespace fusedskip::cuda

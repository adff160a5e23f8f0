// Walks over tensors with the arithmetic of csrc/cuda/index.h, thread by thread as the kernels do,
// and stops at the first thing that is wrong. Built and run by test_cuda_index.py.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../csrc/cuda/choice.h"
#include "../csrc/cuda/index.h"
#include "../csrc/cuda/measured.h"

using namespace fusedskip;
using namespace fusedskip::cuda;

namespace {

View current;
int clustered = 0;

#define CHECK(condition)                                                                        \
  if (!(condition)) {                                                                           \
    std::printf("line %d, view (%lld, %lld, %lld): %s\n", __LINE__, (long long)current.n_outer, \
                (long long)current.n_channels, (long long)current.n_inner, #condition);         \
    std::exit(1);                                                                               \
  }

int64_t numel(const View& v) { return v.n_outer * v.n_channels * v.n_inner; }
int64_t channel_of(const View& v, int64_t element) { return element / v.n_inner % v.n_channels; }

// Calls body(channel_block, program, thread, place) for all octets that the grid takes.
template <bool kChannelsLast, int kWidth, bool kBackwards, typename Body>
void for_each_place(const Tiling& t, Body body) {
  for (int64_t block = 0; block < t.channel_blocks; ++block)
    for (int program = 0; program < t.programs; ++program)
      for (int thread = 0; thread < kThreads; ++thread)
        for (Walk<kChannelsLast, kWidth, kBackwards> walk(t, block, program, thread); !walk.done();)
          if (const Place place = walk.next(); place.elements > 0)
            body(block, program, thread, place);
}

// No more blocks than are meant, and programs within one round of each other.
void check_grid(const Tiling& t, int64_t blocks) {
  const int64_t positions = t.view.n_outer * (t.channels_last ? 1 : t.octets);
  const int64_t tiles = ceil_div(positions, t.depth());
  CHECK(t.columns >= 1 && t.columns <= kMaxColumns && kThreads % t.columns == 0);
  CHECK(t.programs >= 1 && t.programs <= tiles && t.programs <= 65535);
  CHECK(t.programs == 1 || t.programs * t.channel_blocks <= blocks);
  CHECK((t.programs - 1) * ceil_div(tiles, t.programs) < tiles);
  int64_t rounds = 0;
  for (int program = 0; program < t.programs; ++program) {
    CHECK(t.rounds(program) >= 1 && t.rounds(program) <= t.rounds(0));
    rounds += t.rounds(program);
  }
  CHECK(rounds == tiles);
}

// Every element, and every byte of the mask, belongs to one thread; so does every element of a
// channel to one program, that a channel's partial results are summed over. Accesses are aligned
// and stay within their row.
template <bool kChannelsLast, int kWidth, bool kBackwards>
void check_cover(const Tiling& t, int64_t out_pitch = 0) {
  const View& v = t.view;
  if (v.row_length() % kWidth != 0) return;
  std::vector<uint8_t> elements(numel(v)), bytes(v.n_rows() * v.mask_row_bytes());
  const auto check_place = [&](int64_t block, int, int thread, const Place& p) {
    CHECK(p.elements >= 1 && p.elements <= kOctet);
    CHECK(p.element >= 0 && p.element + p.elements <= numel(v));
    CHECK(p.element % kWidth == 0 && p.elements % kWidth == 0);
    const int64_t row = p.element / v.row_length(), column = p.element % v.row_length();
    CHECK(column % kOctet == 0 && column + p.elements <= v.row_length());
    CHECK(p.elements == kOctet || column + p.elements == v.row_length());
    CHECK(p.byte == row * v.mask_row_bytes() + column / kOctet);
    const int64_t dense = v.n_channels * v.n_inner, outer = p.element / dense;
    CHECK(p.result == p.element + outer * (out_pitch ? out_pitch - dense : 0));
    ++bytes[p.byte];
    for (int i = 0; i < p.elements; ++i) {
      ++elements[p.element + i];
      CHECK(channel_of(v, p.element + i) ==
            t.channels(block, thread).first + (kChannelsLast ? i : 0));
    }
  };
  for_each_place<kChannelsLast, kWidth, kBackwards>(t, check_place);
  for (const uint8_t times : elements) CHECK(times == 1);
  for (const uint8_t times : bytes) CHECK(times == 1);
}

// A thread walks in batches whose last is whole, the places before its first being none.
template <bool kChannelsLast, int kBatch>
void check_batches(const Tiling& t) {
  for (const int64_t block : {int64_t{0}, t.channel_blocks - 1})
    for (int program = 0; program < t.programs; ++program)
      for (const int thread : {0, 5, 100, kThreads - 1}) {
        Walk<kChannelsLast, 1, false> one_by_one(t, block, program, thread);
        Walk<kChannelsLast, 1, false, kBatch> walk(t, block, program, thread);
        CHECK(walk.round() > -kBatch && walk.round() <= 0);
        CHECK((t.rounds(program) - walk.round()) % kBatch == 0);
        while (walk.round() < 0) CHECK(walk.next().elements == 0);
        while (!walk.done()) {
          CHECK(walk.round() == one_by_one.round());
          const Place p = walk.next(), q = one_by_one.next();
          CHECK(p.element == q.element && p.byte == q.byte && p.elements == q.elements);
        }
        CHECK(one_by_one.done());
      }
}

// A thread walks back over its own places, round for round, from the last. Before them and behind
// them nothing exists, as far as an unrolled loop may look.
template <bool kChannelsLast>
void check_return(const Tiling& t) {
  constexpr int kUnroll = 6;
  for (const int64_t block : {int64_t{0}, t.channel_blocks - 1})
    for (int program = 0; program < t.programs; ++program)
      for (const int thread : {0, 5, 8, 100, kThreads - 1}) {
        std::vector<Place> places;
        Walk<kChannelsLast, 1, false> there(t, block, program, thread);
        for (; !there.done(); places.push_back(there.next()))
          CHECK(there.round() == int(places.size()));
        CHECK(int(places.size()) == t.rounds(program));
        for (size_t round = 0; round + 1 < places.size(); ++round)
          CHECK(places[round].elements > 0 || t.channels(block, thread).count == 0);
        Walk<kChannelsLast, 1, true> back(t, block, program, thread);
        for (; !back.done(); places.pop_back()) {
          CHECK(back.round() + 1 == int(places.size()));
          const Place p = back.next(), q = places.back();
          CHECK(p.element == q.element && p.byte == q.byte && p.elements == q.elements);
        }
        CHECK(places.empty());
        for (int u = 0; u < kUnroll; ++u) CHECK(there.next().elements + back.next().elements == 0);
      }
}

// The threads of a column agree on their channels, whose partial results are theirs alone; and each
// channel is one thread's own, in the order of the columns and their lanes.
void check_channels(const Tiling& t) {
  const int lanes = t.channels_last ? kOctet : 1;
  std::vector<int> owners(t.view.n_channels), own(t.view.n_channels);
  for (int64_t block = 0; block < t.channel_blocks; ++block)
    for (int thread = 0; thread < kThreads; ++thread) {
      const int64_t channel = t.own_channel(block, thread);
      CHECK(channel < t.view.n_channels);
      if (channel >= 0) {
        CHECK(channel == t.channels(block, thread / lanes).first + thread % lanes);
        ++own[channel];
      }
      const Channels channels = t.channels(block, thread);
      CHECK(channels.first == t.channels(block, thread % t.columns).first);
      if (channels.count == 0) continue;
      CHECK(channels.first % lanes == 0 && channels.count <= lanes);
      CHECK(channels.first + lanes <= t.pitch());
      if (thread < t.columns)
        for (int i = 0; i < channels.count; ++i) ++owners[channels.first + i];
    }
  for (const int times : owners) CHECK(times == 1);
  for (const int times : own) CHECK(times == 1);
  CHECK(t.workspace_size(1) == t.programs * (2 * t.pitch() + t.channel_blocks));
  CHECK(t.workspace_size(2) == t.programs * (4 * t.pitch() + t.channel_blocks));
}

// The arithmetic of stats.cu and moments.cuh in double: threads about their own first element,
// merged to blocks, merged to channels, with a mean far from 0 and an outlier.
template <bool kChannelsLast>
void check_moments(const Tiling& t) {
  struct Part {
    double n = 0, pivot = 0, sum = 0, squares = 0;
  };
  const View& v = t.view;
  const double n = double(v.n_outer * v.n_inner);
  std::minstd_rand random(7);
  std::vector<double> x(numel(v));
  for (double& value : x) value = 1000 + double(random()) / double(random.max());
  x[random() % x.size()] = -5e4;

  std::vector<std::vector<Part>> threads(v.n_channels * t.programs);
  for (auto& parts : threads) parts.resize(kThreads);
  const auto take = [&](int64_t, int program, int thread, const Place& p) {
    for (int i = 0; i < p.elements; ++i) {
      const int64_t c = channel_of(v, p.element + i);
      Part& part = threads[c * t.programs + program][thread];
      if (part.n++ == 0) part.pivot = x[p.element + i];
      const double deviation = x[p.element + i] - part.pivot;
      part.sum += deviation;
      part.squares += deviation * deviation;
    }
  };
  for_each_place<kChannelsLast, 1, false>(t, take);
  for (int64_t c = 0; c < v.n_channels; ++c) {
    const double origin = x[c * v.n_inner];
    struct Moments {
      double n = 0, mean = 0, m2 = 0;
    };
    std::vector<Moments> programs(t.programs);
    Moments whole;
    for (int program = 0; program < t.programs; ++program) {
      Moments& block = programs[program];
      for (const Part& part : threads[c * t.programs + program]) {
        block.n += part.n;
        block.mean += part.n * (part.pivot - origin) + part.sum;
      }
      CHECK(block.n > 0);
      whole.mean += block.mean;
      whole.n += block.n;
      block.mean /= block.n;
      for (const Part& part : threads[c * t.programs + program]) {
        if (part.n == 0) continue;
        const double deviation = part.pivot - origin + part.sum / part.n - block.mean;
        block.m2 += part.squares - part.sum * part.sum / part.n + part.n * deviation * deviation;
      }
    }
    CHECK(whole.n == n);
    whole.mean /= n;
    for (const Moments& block : programs)
      whole.m2 += block.m2 + block.n * (block.mean - whole.mean) * (block.mean - whole.mean);

    double mean = 0, m2 = 0;
    for (int64_t i = 0; i < numel(v); ++i)
      if (channel_of(v, i) == c) mean += x[i] / n;
    for (int64_t i = 0; i < numel(v); ++i)
      if (channel_of(v, i) == c) m2 += (x[i] - mean) * (x[i] - mean);
    CHECK(std::fabs(origin + whole.mean - mean) <= 1e-9 * std::fabs(mean));
    CHECK(std::fabs(whole.m2 - m2) <= 1e-7 * m2 + 1e-7);
  }
}

// A GPU of groups of so many places for blocks: how many clusters of each size it holds at once.
ClustersAtOnce at_once(std::initializer_list<int> groups, int most = kMaxCluster) {
  ClustersAtOnce clusters = {};
  for (int size = 1; size <= most; ++size)
    for (const int places : groups) clusters[size] += places / size;
  return clusters;
}

// An H100 as it may be: 132 SMs of three blocks each, in groups of 18, of 16 and of 10.
const ClustersAtOnce kH100 = at_once({54, 54, 54, 54, 54, 48, 48, 30});

// Clusters of which each program keeps all that is its own, as many as a GPU has places for; a GPU
// of an H100's size, forward and backward, and a small one.
template <bool kChannelsLast>
void check_clusters(const View& v) {
  struct Gpu {
    ClustersAtOnce clusters;
    int rounds;
  };
  for (const auto& [clusters, rounds] :
       {Gpu{kH100, 21}, Gpu{kH100, 10}, Gpu{at_once({12}, /*most=*/4), 2}}) {
    const auto tiling = cluster_tiling(v, clusters, rounds);
    if (!tiling) continue;
    const int64_t blocks = tiling->programs * tiling->channel_blocks;
    const int held = clusters[tiling->programs];
    CHECK(held > 0 && 2 * tiling->channel_blocks >= held);
    CHECK(tiling->rounds(0) <= rounds);
    CHECK(!kChannelsLast || tiling->columns >= std::min<int64_t>(2, tiling->octets));
    check_grid(*tiling, blocks);
    check_channels(*tiling);
    check_cover<kChannelsLast, 1, true>(*tiling);
    check_return<kChannelsLast>(*tiling);
    check_batches<kChannelsLast, 4>(*tiling);
    ++clustered;
  }
}

template <bool kChannelsLast>
void check_shape(const View& v) {
  current = v;
  const Tiling t = stage_tiling(v, 1), stats = stats_tiling(v, 2), stages = stage_tiling(v, 2);
  CHECK(t.channels_last == kChannelsLast);
  check_grid(t, kChannelsLast ? kGrid : 4 * kGrid);
  check_grid(stats, kChannelsLast ? kGrid / 2 : 4 * kGrid);
  check_grid(stages, kChannelsLast ? kDualGrid : 4 * kGrid);
  // What stats leaves to apply does not hang on how many programs either has.
  CHECK(stats.columns == stages.columns && stats.channel_blocks == stages.channel_blocks);
  check_channels(t);
  check_cover<kChannelsLast, 1, false>(t);
  check_cover<kChannelsLast, kOctet, true>(t);
  check_cover<kChannelsLast, kOctet, false>(stats);
  check_cover<kChannelsLast, 1, true>(stages);
  check_return<kChannelsLast>(t);
  const int64_t out_pitch = v.n_channels * v.n_inner + 24;
  check_cover<kChannelsLast, kOctet, true>(t.with_pitch(out_pitch), out_pitch);
  // One launch, on a GPU that holds fewer blocks.
  for (const int64_t blocks : {5, 128, 320}) {
    const Tiling together(v, blocks);
    check_grid(together, blocks);
    check_cover<kChannelsLast, 1, true>(together);
    check_return<kChannelsLast>(together);
    check_batches<kChannelsLast, 2>(together);
    check_batches<kChannelsLast, 4>(together);
  }
  check_clusters<kChannelsLast>(v);
  if (numel(v) * v.n_channels < 200'000) check_moments<kChannelsLast>(t);
}

void check(const View& v) { v.n_inner == 1 ? check_shape<true>(v) : check_shape<false>(v); }

// Too large to walk over: a few threads of it, their places computed once more in 128 bits.
template <bool kChannelsLast>
void check_large(const View& v) {
  using Wide = __int128;
  const Tiling t(current = v, kGrid);
  check_grid(t, kGrid);
  Wide furthest = 0;
  for (const int64_t block : {int64_t{0}, t.channel_blocks / 2, t.channel_blocks - 1})
    for (const int program : {0, t.programs / 3, t.programs - 1})
      for (const int thread : {0, 1, 16, 77, kThreads - 1}) {
        Wide position = Wide(program) * t.depth() + thread / t.columns;
        Walk<kChannelsLast, 1, false> walk(t, block, program, thread);
        for (; !walk.done(); position += Wide(t.programs) * t.depth()) {
          const Place p = walk.next();
          if (p.elements == 0) break;
          Wide row = position, octet = Wide(block) * t.columns + thread % t.columns;
          if (!kChannelsLast) {
            row = position / t.octets * v.n_channels + block;
            octet = position % t.octets;
          }
          CHECK(p.element == row * v.row_length() + octet * kOctet);
          CHECK(p.byte == row * t.octets + octet);
          furthest = std::max(furthest, Wide(p.element) + p.elements);
        }
        CHECK(position >= Wide(v.n_outer) * (kChannelsLast ? 1 : t.octets) ||
              t.channels(block, thread).count == 0);
      }
  CHECK(furthest > Wide(numel(v)) * 9 / 10);
}

void check_widths() {
  CHECK(vector_width(64, Dtype::kBFloat16, 0x7f00) == 8);
  CHECK(vector_width(64, Dtype::kBFloat16, 0x7f08) == 4);
  CHECK(vector_width(196, Dtype::kFloat16, 0x7f00) == 4);
  CHECK(vector_width(196, Dtype::kFloat32, 0x7f10) == 4);
  CHECK(vector_width(64, Dtype::kFloat32, 0x7f10) == 8);
  CHECK(vector_width(64, Dtype::kFloat32, 0x7f08) == 1);
  CHECK(vector_width(49, Dtype::kBFloat16, 0) == 1);
  CHECK(vector_width(50, Dtype::kBFloat16, 0) == 1);
}

// One launch where it has been faster at the nearest shape, by the same kind of pass.
void check_choice() {
  uint8_t byte;
  BatchNormForward forward{.view = {64, 256, 3136}, .dtype = Dtype::kBFloat16};
  BatchNormBackward backward{.view = {200704, 256, 1}, .dtype = Dtype::kFloat32, .relu = true};
  CHECK((pass_of(forward, 90) == Pass{90, false, Tail::kNothing, false, 2}));
  CHECK((pass_of(backward, 80) == Pass{80, true, Tail::kNothing, true, 4}));
  forward.residual = backward.mask = &byte;
  CHECK(pass_of(forward, 90).tail == Tail::kTensor && pass_of(backward, 90).tail == Tail::kTensor);
  backward.relu = false, backward.mask = nullptr;
  CHECK(pass_of(backward, 90).tail == Tail::kTensor);
  forward.residual_norm.mean.data = backward.residual_norm.mean.data = &byte;
  CHECK(pass_of(forward, 90).tail == Tail::kNorm && pass_of(backward, 90).tail == Tail::kNorm);

  const Pass pass{90, false, Tail::kTensor, true, 2};
  Pass fp32 = pass, other_gpu = pass;
  fp32.itemsize = 4, other_gpu.architecture = 80;
  const Measured measured[] = {
      {pass, 256, 200704, 0.9}, {pass, 2048, 3136, 1.3}, {fp32, 512, 50176, 1.1}};
  const auto faster = [&](const Pass& p, const View& v) {
    return one_launch_is_faster(measured, p, v);
  };
  CHECK(!faster(pass, {200704, 256, 1}) && faster(pass, {3136, 2048, 1}));
  CHECK(faster(pass, {3136, 1024, 1}) && faster(pass, {12544, 1024, 1}));
  CHECK(!faster(pass, {100352, 512, 1}) && !faster(pass, {64, 256, 3136}));
  CHECK(faster(fp32, {200704, 256, 1}) && !faster(other_gpu, {3136, 2048, 1}));
  for (const Measured& m : kMeasured) CHECK(m.speed > 0 && m.n_channels > 0 && m.n_positions > 0);
}

}  // namespace

int main() {
  check_widths();
  check_choice();
  int shapes = 0;
  for (const int64_t n : {1, 2, 3, 5, 64, 257})
    for (int64_t c = 1; c <= 80; c += c < 24 ? 1 : 7)
      for (const int64_t spatial : {1, 2, 3, 7, 8, 9, 15, 16, 49, 196, 225, 784}) {
        if (n * c * spatial > 120'000) continue;
        check({n, c, spatial});
        check({n * spatial, c, 1});
        shapes += 2;
      }
  for (const View& v :
       {View{3136, 2048, 1}, View{64, 2048, 49}, View{12544, 1024, 1}, View{40'000, 64, 1},
        View{4, 64, 3136}, View{1, 1, 1'000'003}, View{1, 3, 300'000}, View{2, 3001, 7},
        View{77, 1001, 1}, View{300'000, 1, 1}, View{1, 300'001, 1}, View{5, 123, 123},
        View{16, 256, 784}, View{1568, 2048, 1}}) {
    check(v);
    ++shapes;
  }
  for (const View& v : {View{256 * 3136, 256, 1}, View{int64_t{1} << 33, 3, 1},
                        View{(int64_t{1} << 27) + 5, 67, 1}, View{3, 1'500'000'001, 1}}) {
    check_large<true>(v);
    ++shapes;
  }
  for (const View& v : {View{256, 256, 3136}, View{2, 1, (int64_t{1} << 32) + 3},
                        View{(int64_t{1} << 24) + 1, 7, 49}, View{1, 3, (int64_t{1} << 33) + 8}}) {
    check_large<false>(v);
    ++shapes;
  }
  // As the comment beside cluster_tiling has it: ResNet-50 at batch 64, in 16 bits.
  CHECK(cluster_tiling({64, 256, 3136}, kH100, 21)->programs == 6);
  CHECK(cluster_tiling({12544, 1024, 1}, kH100, 21)->columns == 4);
  CHECK(cluster_tiling({12544, 1024, 1}, kH100, 10)->columns == 2);
  CHECK(!cluster_tiling({200704, 256, 1}, kH100, 21));
  CHECK(cluster_tiling({64, 1024, 196}, kH100, 21)->programs == 1);
  std::printf("%d shapes, %d in clusters\n", shapes, clustered);
}

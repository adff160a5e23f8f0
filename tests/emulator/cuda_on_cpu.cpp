// The fibers behind launch: made by makecontext, and switched by the compiler's own setjmp, which
// unlike swapcontext makes no system call, and unlike libc's keeps three words.

#include "cuda_on_cpu.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <utility>
#include <vector>

// Of libtsan, where it is loaded: to its eyes a fiber is a thread, and what is not ordered by a
// barrier is a race, in whatever order the fibers ran.
extern "C" {
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_destroy_fiber(void*);
[[gnu::weak]] void __tsan_switch_to_fiber(void*, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void*);
[[gnu::weak]] void __tsan_release(void*);
}

namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;

// A GPU that holds few blocks at once, and keeps little of them: 20 KB for each of three an SM.
constexpr int kMultiprocessors = 4;
constexpr int kSharedOfSM = 66 << 10, kSharedOfBlock = 48 << 10, kReserved = 1 << 10;
constexpr int kDeclared = 1000;  // shared memory of a kernel's own; how much it is, is not known
constexpr int kCluster = 4, kPortableCluster = 2;

enum class State { kReady, kAtWarp, kAtBlock, kAtCluster, kAtGrid, kDone };

using Place = void* [5];  // of __builtin_setjmp

struct Fiber {
  ucontext_t context;
  Place place;
  State state;
  bool started = false;
  void* to_tsan = nullptr;
  // By the parity of the exchange: a lane may be one ahead of those that have yet to read.
  uint64_t given[2];
  int exchanges;
  int waits_for_warp, waits_for_block, waits_for_cluster, waits_for_grid;
  bool arrived;  // at the cluster's barrier
};

// From the system, so that tsan forgets who had it before.
class Memory {
 public:
  explicit Memory(size_t size) : size_(size) {
    data_ = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) std::abort();
  }
  Memory(const Memory&) = delete;
  ~Memory() { munmap(data_, size_); }
  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_;
  size_t size_;
};

struct Block {
  explicit Block(int threads)
      : fibers(threads),
        stacks(threads * kStack),
        shared(kSharedOfBlock),
        barriers(4 + 2 * threads / kWarp) {}
  ~Block() {
    if (__tsan_destroy_fiber)
      for (Fiber& fiber : fibers) __tsan_destroy_fiber(fiber.to_tsan);
  }

  uint3 index;
  std::vector<Fiber> fibers;
  Memory stacks, shared;
  // To tsan: two of the block, of the first in a cluster two of that, and two of each warp.
  Memory barriers;
  int used_of_shared;
  std::vector<std::pair<const void*, void*>> variables;  // by name
};

Block* block;
std::vector<Block*> together;  // those that wait for each other, by their number in a cluster
Fiber* current;
Place scheduler;
void* scheduler_to_tsan;
char grid_barriers[2], end_of_launch;
const std::function<void()>* body;

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z, message);
  std::abort();
}

// Without an order: that a fiber runs after another means nothing.
void tell_tsan_of_switch(void* to) {
  constexpr unsigned kNoOrder = 1;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to, kNoOrder);
}

// Not where a place is saved, which the compiler's own setjmp does not allow.
[[noreturn, gnu::noinline]] void jump(Place& place) { __builtin_longjmp(place, 1); }

[[gnu::noinline]] void resume(int thread) {
  current = &block->fibers[thread];
  threadIdx = {unsigned(thread), 0, 0};
  if (__builtin_setjmp(scheduler)) return;
  tell_tsan_of_switch(current->to_tsan);
  if (current->started) jump(current->place);
  current->started = true;
  setcontext(&current->context);
}

[[gnu::noinline]] void wait(State state) {
  current->state = state;
  if (__builtin_setjmp(current->place)) return;
  tell_tsan_of_switch(scheduler_to_tsan);
  jump(scheduler);
}

// What was done before the barrier by those who meet there comes before what any does after it.
// Every other time it is the other object: a fiber may be at the next barrier before the last one
// has left this one.
void meet(State state, char& barrier) {
  if (__tsan_release) __tsan_release(&barrier);
  wait(state);
  if (__tsan_acquire) __tsan_acquire(&barrier);
}

// A fiber that is done begins the next kernel: to make one takes system calls.
void run() {
  while (true) {
    (*body)();
    if (__tsan_release) __tsan_release(&end_of_launch);
    wait(State::kDone);
  }
}

// Where all threads from begin to end are; a barrier that only some of them reach is an error.
State common_state(int begin, int end) {
  for (int thread = begin + 1; thread < end; ++thread)
    if (block->fibers[thread].state != block->fibers[begin].state)
      fail("threads part at a barrier");
  return block->fibers[begin].state;
}

// What nobody has written in shared memory is NaN, and so is what a block has left behind.
void forget(Block& b) { std::memset(b.shared.data(), 0xff, kSharedOfBlock); }

void start(Block& b, dim3 index, int shared_bytes) {
  b.index = {index.x, index.y, index.z};
  b.used_of_shared = shared_bytes;
  b.variables.clear();
  forget(b);
  for (size_t thread = 0; thread < b.fibers.size(); ++thread) {
    Fiber& fiber = b.fibers[thread];
    fiber.state = State::kReady;
    fiber.exchanges = fiber.waits_for_warp = fiber.waits_for_block = 0;
    fiber.waits_for_cluster = fiber.waits_for_grid = 0;
    fiber.arrived = false;
    if (fiber.started) continue;
    if (__tsan_create_fiber) fiber.to_tsan = __tsan_create_fiber(0);
    getcontext(&fiber.context);
    fiber.context.uc_stack = {
        .ss_sp = b.stacks.data() + thread * kStack, .ss_flags = 0, .ss_size = kStack};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run, 0);
  }
}

// Up to a wait for other blocks, or to the end.
State run_on(Block& b) {
  const int threads = int(b.fibers.size());
  block = &b;
  blockIdx = b.index;
  do {
    for (int warp = 0; warp < threads; warp += kWarp) do {
        for (int lane = 0; lane < kWarp; ++lane) resume(warp + lane);
      } while (common_state(warp, warp + kWarp) == State::kAtWarp);
  } while (common_state(0, threads) == State::kAtBlock);
  if (b.fibers[0].state == State::kDone) forget(b);
  return b.fibers[0].state;
}

// What is lent, what it holds while it is hidden, and whether the block that runs has seen it.
struct Lent {
  char* memory = nullptr;
  std::vector<char> hidden;
  bool is_hidden = false;

  void hide() {
    // To tsan, every fiber that waits would write it.
    if (__tsan_create_fiber) return;
    std::memcpy(hidden.data(), memory, hidden.size());
    std::memset(memory, 0xff, hidden.size());
    is_hidden = true;
  }
  void show() {
    if (std::exchange(is_hidden, false)) std::memcpy(memory, hidden.data(), hidden.size());
  }
} lent;

// By kernel: bytes of dynamic shared memory, and blocks of a cluster.
std::map<const void*, int> granted, granted_cluster;
int largest_cluster(const void* kernel) {
  return std::max(kPortableCluster, granted_cluster[kernel]);
}

// What the kernels were compiled for, as if: below 90, they would wait neither for a cluster nor
// for the kernel before them.
int ptx_version() {
  const char* version = std::getenv("EMULATED_PTX_VERSION");
  return version ? std::atoi(version) : 90;
}

int blocks_an_sm(int dynamic_bytes) {
  const int unit = 128, bytes = kReserved + kDeclared + dynamic_bytes;
  return kSharedOfSM / ((bytes + unit - 1) / unit * unit);
}

template <typename Body>
void for_each_block(dim3 grid, Body body) {
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) body(dim3(x, y, z));
}

// Counts the launch, which what follows comes after.
class Launch {
 public:
  explicit Launch(const std::function<void()>& kernel) {
    ++launches;
    body = &kernel;
    if (__tsan_get_current_fiber) scheduler_to_tsan = __tsan_get_current_fiber();
  }
  ~Launch() {
    if (__tsan_acquire) __tsan_acquire(&end_of_launch);
  }
};

// Blocks to run, one of them or as many as run together: those of the last launch, but not where
// tsan looks, to which their fibers would be the same threads.
std::deque<Block>& blocks_of(int threads, size_t count) {
  static std::deque<Block> blocks;
  if (__tsan_create_fiber) blocks.clear();
  while (blocks.size() < count) blocks.emplace_back(threads);
  return blocks;
}

void launch_in_turn(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel,
                    bool starts_early) {
  const Launch launch(kernel);
  for_each_block(grid, [&](dim3 index) {
    Block& only = blocks_of(threads, 1).front();
    start(only, index, shared_bytes);
    if (starts_early) lent.hide();
    if (run_on(only) != State::kDone) fail("waits for blocks that may not have started");
    if (lent.is_hidden) fail("does not wait for the kernel before it");
  });
}

// From wait to wait the blocks run the other way round: none is to rely on the one before it.
void run_together(const std::vector<dim3>& indices, int threads, int shared_bytes, State waits) {
  std::deque<Block>& blocks = blocks_of(threads, indices.size());
  together.clear();
  for (size_t b = 0; b < indices.size(); ++b) {
    start(blocks[b], indices[b], shared_bytes);
    together.push_back(&blocks[b]);
  }
  std::vector<Block*> turn = together;
  State state = State::kReady;
  while (state != State::kDone) {
    state = run_on(*turn.front());
    if (state != waits && state != State::kDone)
      fail("waits for blocks that it did not start with");
    for (size_t b = 1; b < turn.size(); ++b)
      if (run_on(*turn[b]) != state) fail("blocks part at a wait for each other");
    std::reverse(turn.begin(), turn.end());
  }
}

void launch_together(dim3 grid, int threads, int shared_bytes,
                     const std::function<void()>& kernel) {
  const Launch launch(kernel);
  std::vector<dim3> indices;
  for_each_block(grid, [&](dim3 index) { indices.push_back(index); });
  run_together(indices, threads, shared_bytes, State::kAtGrid);
}

void launch_clusters(dim3 grid, int threads, int shared_bytes,
                     const std::function<void()>& kernel) {
  const Launch launch(kernel);
  for (unsigned x = 0; x < grid.x; ++x) {
    std::vector<dim3> indices;
    for (unsigned y = 0; y < grid.y; ++y) indices.push_back(dim3(x, y));
    run_together(indices, threads, shared_bytes, State::kAtCluster);
  }
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& call) {
  const int threads = int(config.blockDim.x), shared_bytes = int(config.dynamicSmemBytes);
  if (shared_bytes > granted[kernel]) return cudaErrorInvalidValue;
  const dim3& grid = config.gridDim;
  const auto attribute = config.numAttrs ? config.attrs[0] : cudaLaunchAttribute{};
  const bool is_shared = std::getenv("EMULATED_GPU_IS_SHARED");  // as if another process had a part
  const bool overlaps = attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                        attribute.val.programmaticStreamSerializationAllowed;
  if (ptx_version() < 90 && (overlaps || attribute.id == cudaLaunchAttributeClusterDimension))
    fail("a kernel that does not wait is to wait");
  if (attribute.id == cudaLaunchAttributeClusterDimension) {
    const auto& [x, y, z] = attribute.val.clusterDim;
    const unsigned most = is_shared ? 1 : largest_cluster(kernel);
    if (x != 1 || y != grid.y || z != 1 || y > most) return cudaErrorInvalidClusterSize;
    launch_clusters(grid, threads, shared_bytes, call);
    return cudaSuccess;
  }
  if (attribute.id != cudaLaunchAttributeCooperative || !attribute.val.cooperative) {
    launch_in_turn(grid, threads, shared_bytes, call, overlaps);
    return cudaSuccess;
  }
  if (is_shared || int(grid.x * grid.y * grid.z) > kMultiprocessors * blocks_an_sm(shared_bytes))
    return cudaErrorCooperativeLaunchTooLarge;
  launch_together(grid, threads, shared_bytes, call);
  return cudaSuccess;
}

void lend(void* memory, size_t size) {
  lent.memory = static_cast<char*>(memory);
  lent.hidden.resize(size);
}

void wait_for_previous() { lent.show(); }

void sync_warp() {
  char* of_warp = block->barriers.data() + 4 + threadIdx.x / kWarp * 2;
  meet(State::kAtWarp, of_warp[current->waits_for_warp++ % 2]);
}

void sync_threads() {
  meet(State::kAtBlock, block->barriers.data()[current->waits_for_block++ % 2]);
}

void sync_grid() { meet(State::kAtGrid, grid_barriers[current->waits_for_grid++ % 2]); }

static char* cluster_barrier() {
  return together.front()->barriers.data() + 2 + current->waits_for_cluster % 2;
}

void arrive_at_cluster() {
  if (std::exchange(current->arrived, true)) fail("arrives twice at the cluster's barrier");
  if (__tsan_release) __tsan_release(cluster_barrier());
}

void wait_for_cluster() {
  if (!std::exchange(current->arrived, false)) fail("waits where it has not arrived");
  wait(State::kAtCluster);
  if (__tsan_acquire) __tsan_acquire(cluster_barrier());
  ++current->waits_for_cluster;
}

void* shared_of(void* own, int rank) {
  return together.at(rank)->shared.data() + (static_cast<char*>(own) - block->shared.data());
}

uint4* dynamic_shared() { return reinterpret_cast<uint4*>(block->shared.data()); }

void* shared_variable(const void* name, int size) {
  for (const auto& [other, at] : block->variables)
    if (other == name) return at;
  void* at = block->shared.data() + block->used_of_shared;
  block->used_of_shared += (size + 15) / 16 * 16;
  if (block->used_of_shared > kSharedOfBlock) fail("more shared memory than a block has");
  block->variables.push_back({name, at});
  return at;
}

uint64_t exchange(uint64_t value, int mask) {
  const int thread = int(threadIdx.x), parity = current->exchanges++ % 2;
  current->given[parity] = value;
  wait(State::kAtWarp);
  return block->fibers[thread ^ mask].given[parity];
}

}  // namespace emulator

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using namespace emulator;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      return *value = 9, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = 0, cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      return *value = kMultiprocessors, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return *value = kSharedOfSM, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = kSharedOfBlock, cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return *value = kReserved, cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrClusterLaunch:
      return *value = 1, cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  if (std::getenv("EMULATED_GPU_IS_FULL")) return cudaErrorMemoryAllocation;
  if (std::getenv("EMULATED_GPU_IS_ANOTHER")) return cudaErrorNoKernelImageForDevice;
  attributes->sharedSizeBytes = emulator::kDeclared;
  attributes->ptxVersion = emulator::ptx_version();
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value + emulator::kDeclared > emulator::kSharedOfBlock) return cudaErrorInvalidValue;
    emulator::granted[kernel] = value;
  }
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed)
    emulator::granted_cluster[kernel] = emulator::kCluster;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int,
                                                          size_t shared_bytes) {
  *blocks = emulator::blocks_an_sm(int(shared_bytes));
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  using namespace emulator;
  const int size = int(config->attrs[0].val.clusterDim.y), bytes = int(config->dynamicSmemBytes);
  if (bytes > granted[kernel]) return cudaErrorInvalidValue;
  if (size > largest_cluster(kernel)) return cudaErrorInvalidClusterSize;
  *clusters = kMultiprocessors * blocks_an_sm(bytes) / size;
  return cudaSuccess;
}

}  // extern "C"

// The fibers behind launch: made by makecontext, and switched by the compiler's own setjmp, which
// unlike swapcontext makes no system call, and unlike libc's keeps three words.

#include "cuda_on_cpu.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

enum class State { kReady, kAtWarp, kAtBlock, kAtGrid, kDone };

using Place = void* [5];  // of __builtin_setjmp

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;
  Place place;
  State state;
  bool started = false;
  // By the parity of the exchange: a lane may be one ahead of those that have yet to read.
  uint64_t given[2];
  int exchanges;
};

struct Block {
  uint3 index;
  std::vector<Fiber> fibers;
  std::vector<uint4> shared;
};

Block* block;
Fiber* current;
Place scheduler;
const std::function<void()>* body;

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z, message);
  std::abort();
}

// Not where a place is saved, which the compiler's own setjmp does not allow.
[[noreturn, gnu::noinline]] void jump(Place& place) { __builtin_longjmp(place, 1); }

[[gnu::noinline]] void resume(int thread) {
  current = &block->fibers[thread];
  threadIdx = {unsigned(thread), 0, 0};
  if (__builtin_setjmp(scheduler)) return;
  if (current->started) jump(current->place);
  current->started = true;
  setcontext(&current->context);
}

[[gnu::noinline]] void wait(State state) {
  current->state = state;
  if (!__builtin_setjmp(current->place)) jump(scheduler);
}

// A fiber that is done begins the next kernel: to make one takes system calls.
void run() {
  while (true) {
    (*body)();
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

void start(Block& b, dim3 index, int threads, int shared_bytes) {
  b.index = {index.x, index.y, index.z};
  b.fibers.resize(threads);
  b.shared.resize(shared_bytes / sizeof(uint4));
  for (Fiber& fiber : b.fibers) {
    fiber.state = State::kReady;
    fiber.exchanges = 0;
    if (fiber.started) continue;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {.ss_sp = fiber.stack.get(), .ss_flags = 0, .ss_size = kStack};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run, 0);
  }
}

// Up to a wait for the grid, or to the end.
State run_on(Block& b) {
  const int threads = int(b.fibers.size());
  block = &b;
  blockIdx = b.index;
  do {
    for (int warp = 0; warp < threads; warp += kWarp) do {
        for (int lane = 0; lane < kWarp; ++lane) resume(warp + lane);
      } while (common_state(warp, warp + kWarp) == State::kAtWarp);
  } while (common_state(0, threads) == State::kAtBlock);
  return b.fibers[0].state;
}

// A GPU that holds few blocks at once, and keeps little of them: 20 KB for each of three an SM.
constexpr int kMultiprocessors = 4;
constexpr int kSharedOfSM = 66 << 10, kSharedOfBlock = 48 << 10, kReserved = 1 << 10;
constexpr int kDeclared = 1000;  // shared memory of a kernel's own; how much it is, is not known

std::map<const void*, int> granted;  // dynamic shared memory, by kernel

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

void launch_in_turn(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  static Block only;
  ++launches;
  body = &kernel;
  for_each_block(grid, [&](dim3 index) {
    start(only, index, threads, shared_bytes);
    if (run_on(only) != State::kDone) fail("waits for blocks that may not have started");
  });
}

// From wait to wait the blocks run the other way round: none is to rely on the one before it.
void launch_together(dim3 grid, int threads, int shared_bytes,
                     const std::function<void()>& kernel) {
  ++launches;
  body = &kernel;
  static std::vector<Block> blocks;
  const size_t count = grid.x * grid.y * grid.z;
  blocks.resize(std::max(blocks.size(), count));
  size_t started = 0;
  for_each_block(grid, [&](dim3 index) { start(blocks[started++], index, threads, shared_bytes); });
  State state = State::kReady;
  while (state != State::kDone) {
    state = run_on(blocks.front());
    for (size_t b = 1; b < count; ++b)
      if (run_on(blocks[b]) != state) fail("blocks part at a wait for the grid");
    std::reverse(blocks.begin(), blocks.begin() + count);
  }
}

}  // namespace

void launch(dim3 grid, int threads, const std::function<void()>& kernel) {
  launch_in_turn(grid, threads, 0, kernel);
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& call) {
  const int threads = int(config.blockDim.x), shared_bytes = int(config.dynamicSmemBytes);
  if (shared_bytes > granted[kernel]) return cudaErrorInvalidValue;
  if (!config.attrs[0].val.cooperative) {
    launch_in_turn(config.gridDim, threads, shared_bytes, call);
    return cudaSuccess;
  }
  const dim3& grid = config.gridDim;
  // As if another process had a part of the GPU: tests set it.
  if (std::getenv("EMULATED_GPU_IS_SHARED")) return cudaErrorCooperativeLaunchTooLarge;
  if (int(grid.x * grid.y * grid.z) > kMultiprocessors * blocks_an_sm(shared_bytes))
    return cudaErrorCooperativeLaunchTooLarge;
  launch_together(grid, threads, shared_bytes, call);
  return cudaSuccess;
}

void sync_threads() { wait(State::kAtBlock); }

void sync_grid() { wait(State::kAtGrid); }

uint4* dynamic_shared() { return block->shared.data(); }

uint64_t exchange(uint64_t value, int mask) {
  const int thread = int(threadIdx.x), parity = current->exchanges++ % 2;
  current->given[parity] = value;
  wait(State::kAtWarp);
  return block->fibers[thread ^ mask].given[parity];
}

}  // namespace emulator

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using namespace emulator;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return *value = kMultiprocessors, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return *value = kSharedOfSM, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = kSharedOfBlock, cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return *value = kReserved, cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      return *value = 1, cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = emulator::kDeclared;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value + emulator::kDeclared > emulator::kSharedOfBlock) return cudaErrorInvalidValue;
    emulator::granted[kernel] = value;
  }
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int,
                                                          size_t shared_bytes) {
  *blocks = emulator::blocks_an_sm(int(shared_bytes));
  return cudaSuccess;
}

}  // extern "C"

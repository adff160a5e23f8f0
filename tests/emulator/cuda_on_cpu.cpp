// The fibers behind launch: made by makecontext, and switched by setjmp, which unlike swapcontext
// makes no system call.

#include "cuda_on_cpu.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;
  jmp_buf place;
  State state;
  bool started;
  // By the parity of the exchange: a lane may be one ahead of those that have yet to read.
  uint64_t given[2];
  int exchanges;
};

std::vector<Fiber> fibers;
Fiber* current;
jmp_buf scheduler;
ucontext_t origin;
const std::function<void()>* body;

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z, message);
  std::abort();
}

void run() {
  (*body)();
  current->state = State::kDone;
  _longjmp(scheduler, 1);
}

void resume(int thread) {
  current = &fibers[thread];
  threadIdx = {unsigned(thread), 0, 0};
  if (_setjmp(scheduler)) return;
  if (current->started) _longjmp(current->place, 1);
  current->started = true;
  setcontext(&current->context);
}

void wait(State state) {
  current->state = state;
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

// Where all threads from begin to end are; a barrier that only some of them reach is an error.
State common_state(int begin, int end) {
  for (int thread = begin + 1; thread < end; ++thread)
    if (fibers[thread].state != fibers[begin].state) fail("threads part at a barrier");
  return fibers[begin].state;
}

void run_block(int threads) {
  for (Fiber& fiber : fibers) {
    fiber.state = State::kReady;
    fiber.started = false;
    fiber.exchanges = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {.ss_sp = fiber.stack.get(), .ss_flags = 0, .ss_size = kStack};
    fiber.context.uc_link = &origin;
    makecontext(&fiber.context, run, 0);
  }
  do {
    for (int warp = 0; warp < threads; warp += kWarp) do {
        for (int lane = 0; lane < kWarp; ++lane) resume(warp + lane);
      } while (common_state(warp, warp + kWarp) == State::kAtWarp);
  } while (common_state(0, threads) == State::kAtBlock);
}

}  // namespace

void launch(dim3 grid, int threads, const std::function<void()>& kernel) {
  ++launches;
  body = &kernel;
  fibers.resize(threads);
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads);
}

void sync_threads() { wait(State::kAtBlock); }

uint64_t exchange(uint64_t value, int mask) {
  const int thread = int(threadIdx.x), parity = current->exchanges++ % 2;
  current->given[parity] = value;
  wait(State::kAtWarp);
  return fibers[thread ^ mask].given[parity];
}

}  // namespace emulator

extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }

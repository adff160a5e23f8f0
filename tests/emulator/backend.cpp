// The functions of csrc/cpu, by the emulated kernels of csrc/cuda: so csrc/bindings/cpu.cpp makes
// an extension of them that takes CPU tensors. What it lends the kernels is full of NaN, and
// guarded.

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../cpu/batch_norm.h"
#include "../cuda/batch_norm.h"

namespace fusedskip::cpu {
namespace {

constexpr int64_t kGuard = 512;  // bytes

void check(bool holds, const char* complaint) {
  if (holds) return;
  std::fprintf(stderr, "emulated CUDA: %s\n", complaint);
  std::abort();
}

// Lends what `launch` asks for, and looks at what became of it.
template <typename Launch>
void with_workspace(Dtype dtype, Launch launch) {
  std::vector<uint8_t> memory;
  const cuda::Allocate allocate = [&](int64_t numbers) {
    const int64_t size = numbers * (dtype == Dtype::kFloat64 ? 8 : 4);
    memory.assign(kGuard + size + kGuard, 0xff);
    emulator::lend(memory.data() + kGuard, size);
    return memory.data() + kGuard;
  };
  emulator::launches = 0;
  check(launch(allocate) == cudaSuccess, "a launch failed");
  check(emulator::launches <= 2, "more than two launches");
  if (memory.empty()) return;
  for (int64_t i = 0; i < kGuard; ++i)
    check(memory[i] == 0xff && memory.rbegin()[i] == 0xff, "outside of the workspace");
}

}  // namespace

void add_relu(Dtype dtype, int64_t numel, bool relu_first, const void* x, const void* residual,
              void* out, uint8_t* mask) {
  cuda::add_relu(dtype, numel, relu_first, x, residual, out, mask, nullptr);
}

void add_relu_backward(Dtype dtype, int64_t numel, const void* dout, const uint8_t* mask,
                       void* dx) {
  cuda::add_relu_backward(dtype, numel, dout, mask, dx, nullptr);
}

void batch_norm(const BatchNormForward& args) {
  with_workspace(args.dtype, [&](const cuda::Allocate& allocate) {
    return cuda::batch_norm(args, allocate, nullptr);
  });
}

void batch_norm_backward(const BatchNormBackward& args) {
  with_workspace(args.dtype, [&](const cuda::Allocate& allocate) {
    return cuda::batch_norm_backward(args, allocate, nullptr);
  });
}

void batch_norm_stats(const BatchNormStats& args) {
  with_workspace(args.dtype, [&](const cuda::Allocate& allocate) {
    return cuda::batch_norm_stats(args, allocate, nullptr);
  });
}

void batch_norm_merge(const BatchNormMerge& args) {
  with_workspace(args.dtype,
                 [&](const cuda::Allocate&) { return cuda::batch_norm_merge(args, nullptr); });
}

// For tests to see: how many launches the last operation took.
const char* instruction_set() {
  static std::string name;
  name = "CUDA, emulated: " + std::to_string(emulator::launches);
  return name.c_str();
}

}  // namespace fusedskip::cpu

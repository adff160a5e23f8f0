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

// Calls launch(workspace) with `numbers` numbers of it.
template <typename Launch>
void with_workspace(int64_t numbers, Dtype dtype, Launch launch) {
  const int64_t size = numbers * (dtype == Dtype::kFloat64 ? 8 : 4);
  std::vector<uint8_t> memory(kGuard + size + kGuard, 0xff);
  emulator::launches = 0;
  check(launch(memory.data() + kGuard) == cudaSuccess, "a launch failed");
  check(emulator::launches <= 2, "more than two launches");
  for (int64_t i = 0; i < kGuard; ++i)
    check(memory[i] == 0xff && memory[kGuard + size + i] == 0xff, "outside of the workspace");
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
  with_workspace(cuda::workspace_size(args), args.dtype,
                 [&](void* workspace) { return cuda::batch_norm(args, workspace, nullptr); });
}

void batch_norm_backward(const BatchNormBackward& args) {
  with_workspace(cuda::workspace_size(args), args.dtype, [&](void* workspace) {
    return cuda::batch_norm_backward(args, workspace, nullptr);
  });
}

void batch_norm_stats(const BatchNormStats& args) {
  with_workspace(cuda::workspace_size(args), args.dtype,
                 [&](void* workspace) { return cuda::batch_norm_stats(args, workspace, nullptr); });
}

void batch_norm_merge(const BatchNormMerge& args) {
  with_workspace(0, args.dtype, [&](void*) { return cuda::batch_norm_merge(args, nullptr); });
}

// For tests to see: how many launches the last operation took.
const char* instruction_set() {
  static std::string name;
  name = "CUDA, emulated: " + std::to_string(emulator::launches);
  return name.c_str();
}

}  // namespace fusedskip::cpu

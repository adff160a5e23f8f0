// What the kernels of csrc/cuda use of CUDA C++, for a host compiler: included ahead of every file.
//
// A block's threads are fibers, which run one after the other from one barrier to the next. Blocks
// follow one another, from the first to the last; those that wait for each other, of a cluster or
// of the whole grid, take turns, from one such wait to the next.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __device__
#undef __global__
#undef __grid_constant__
#undef __launch_bounds__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __builtin_assume(...)

inline uint3 blockIdx, threadIdx;

namespace emulator {

// Launches since the last time that somebody set it to 0.
inline int launches = 0;

// An error where the GPU could not do as it is asked, or has not been told of so much shared
// memory.
cudaError_t launch(const cudaLaunchConfig_t&, const void* kernel,
                   const std::function<void()>& call);
// What the first kernel of a pair leaves to the second, which may start while the first still runs:
// until that waits, this is NaN.
void lend(void* memory, size_t size);
void wait_for_previous();
void sync_warp();
void sync_threads();
void sync_grid();
void arrive_at_cluster();
void wait_for_cluster();
// Where block `rank` of the cluster has what this one has at `own`.
void* shared_of(void* own, int rank);
// The block's own.
uint4* dynamic_shared();
void* shared_variable(const void* name, int size);

// A variable in shared memory, known by the type of `name`.
template <typename T, typename Name>
T& shared(Name) {
  static const char name = 0;
  return *static_cast<T*>(shared_variable(&name, sizeof(T)));
}

// `value` of the lane whose number differs by `mask`.
uint64_t exchange(uint64_t value, int mask);

template <typename To, typename From>
To bits(From from) {
  To to = {};
  std::memcpy(&to, &from, std::min(sizeof(To), sizeof(From)));
  return to;
}

}  // namespace emulator

inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void cudaGridDependencySynchronize() { emulator::wait_for_previous(); }
inline void __syncwarp() { emulator::sync_warp(); }
inline void __syncthreads() { emulator::sync_threads(); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::bits<T>(emulator::exchange(emulator::bits<uint64_t>(value), mask));
}

template <typename T>
T __ldcs(const T* p) {
  return *p;
}
inline float __uint_as_float(uint32_t u) { return emulator::bits<float>(u); }
inline uint32_t __float_as_uint(float f) { return emulator::bits<uint32_t>(f); }
inline double __hiloint2double(int high, int low) {
  return emulator::bits<double>(uint64_t(uint32_t(high)) << 32 | uint32_t(low));
}
inline int __double2loint(double d) { return int(emulator::bits<uint64_t>(d)); }
inline int __double2hiint(double d) { return int(emulator::bits<uint64_t>(d) >> 32); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __frsqrt_rn(float x) { return float(1 / std::sqrt(double(x))); }
using std::abs;
using std::sqrt;

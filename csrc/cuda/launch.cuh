// Launches with an attribute: of blocks that wait for each other (on_chip.cuh), and of the second
// kernel of a pair, which may start while the first is still running.
//
// There its blocks take their places as those of the first leave theirs, and wait for all of them
// (Partials::wait_for_programs). What that hides is the way from one kernel to the next: predicted
// 1 us a pair, where the two of a pass over (64, 512, 7, 7) in 16 bits take 4 by their bytes.

#pragma once

#include <cuda_runtime.h>

#include <mutex>

namespace fusedskip::cuda {

// By the first of a pair. Of code for less than sm_90, the second starts when the first has ended.
__device__ inline void let_next_start() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Until what it has written is there to be read.
__device__ inline void wait_for_previous() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

template <typename... Parameters, typename... Args>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                   cudaStream_t stream, cudaLaunchAttribute attribute, const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it
  return error;
}

// What find(device) says of the current device, asked once for each. A lambda: it is known by its
// type.
template <typename Find>
auto once_a_device(Find find) {
  constexpr int kMaxDevices = 64;
  static std::once_flag found[kMaxDevices];
  static decltype(find(0)) results[kMaxDevices];
  int device;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return decltype(find(0)){};
  std::call_once(found[device], [&] { results[device] = find(device); });
  return results[device];
}

// 90 of sm_90.
inline int architecture() {
  return once_a_device([](int device) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return 10 * major + minor;
  });
}

// Whether a kernel waits for the one before it: compiled for less than sm_90 it would not, though
// the device could.
template <auto kKernel>
bool waits() {
  return once_a_device([](int) {
    cudaFuncAttributes kernel{};
    return architecture() >= 90 &&
           cudaFuncGetAttributes(&kernel, reinterpret_cast<const void*>(kKernel)) == cudaSuccess &&
           kernel.ptxVersion >= 90;
  });
}

// With or without a stage before it whose partial results it waits for. In a graph, stages are
// captured as any two kernels are: others have seen captured overlaps fail on sm_120 (sglang
// #18596), and no GPU has tried ours.
template <auto kKernel, typename... Args>
cudaError_t launch_stage(bool is_second, dim3 grid, int threads, cudaStream_t stream,
                         const Args&... args) {
  cudaStreamCaptureStatus capture;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed =
      is_second && waits<kKernel>() && cudaStreamIsCapturing(stream, &capture) == cudaSuccess &&
      capture == cudaStreamCaptureStatusNone;
  return launch(kKernel, grid, threads, /*shared_bytes=*/0, stream, overlap, args...);
}

}  // namespace fusedskip::cuda

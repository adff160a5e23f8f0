// Launches: of a kernel by itself; with an attribute, of blocks that wait for each other
// (on_chip.cuh); and of the second kernel of a pair, which may start while the first still runs.
//
// Its blocks take their places as those of the first leave theirs, and wait for all of them
// (Partials::wait_for_programs). What that hides is the way from one kernel to the next: predicted
// 1 us a pair, where the two of a pass over (64, 512, 7, 7) in 16 bits take 4 by their bytes. What
// another thread launches between them on the same stream waits for the first and is waited for;
// only if it too may start early, and never waits, would it undo that.

#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <map>
#include <mutex>
#include <optional>
#include <type_traits>

#include "index.h"

namespace fusedskip::cuda {

// By the first of a pair, at its start: it says nothing of the kernel's memory, as the second waits
// for its end. Of code for less than sm_90, the second starts when the first has ended.
__device__ inline void let_next_start() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Waits until the writes of the kernel before this one are visible.
__device__ inline void wait_for_previous() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Clears CUDA's last error, so that the next launch does not report this one, and returns it.
inline cudaError_t cleared(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}
inline bool succeeds(cudaError_t error) { return cleared(error) == cudaSuccess; }

// How the last operation of two stages was launched, by whatever thread.
inline std::atomic<const char*> launched = "";

template <typename... Parameters, typename... Args>
cudaError_t launch_with(cudaLaunchAttribute attribute, int shared_bytes,
                        void (*kernel)(Parameters...), dim3 grid, cudaStream_t stream,
                        const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = attribute.id != cudaLaunchAttributeIgnore;
  return cleared(cudaLaunchKernelEx(&config, kernel, args...));
}

// Not kernel<<<>>>(): what cudaGetLastError returns behind that may be an error that another
// library has left there.
template <typename... Parameters, typename... Args>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, cudaStream_t stream,
                   const Args&... args) {
  return launch_with(cudaLaunchAttribute{}, /*shared_bytes=*/0, kernel, grid, stream, args...);
}

// Caches find(device) for each device. Nothing, as where no memory was left to load the kernel that
// is asked about, is not cached, and stands for a default value. Each lambda's type has a cache of
// its own.
template <typename Find, typename Found = typename std::invoke_result_t<Find, int>::value_type>
Found once_a_device(Find find) {
  static std::mutex mutex;
  static std::map<int, Found> results;
  int device;
  if (!succeeds(cudaGetDevice(&device))) return Found();
  const std::lock_guard lock(mutex);
  if (const auto known = results.find(device); known != results.end()) return known->second;
  const std::optional<Found> found = find(device);
  if (found) results.emplace(device, *found);
  return found.value_or(Found());
}

// 90 of sm_90.
inline int architecture() {
  return once_a_device([](int device) -> std::optional<int> {
    int major, minor;
    if (!succeeds(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) ||
        !succeeds(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)))
      return std::nullopt;
    return 10 * major + minor;
  });
}

// Whether a kernel waits for the one before it: compiled for less than sm_90 it would not, though
// the device could.
template <auto kKernel>
bool waits() {
  return once_a_device([](int) -> std::optional<bool> {
    cudaFuncAttributes kernel;
    if (!succeeds(cudaFuncGetAttributes(&kernel, reinterpret_cast<const void*>(kKernel))))
      return std::nullopt;
    return architecture() >= 90 && kernel.ptxVersion >= 90;
  });
}

// With or without a stage before it whose partial results it waits for. In a graph, stages are
// captured as any two kernels are: others have seen captured overlaps fail on sm_120 (sglang
// #18596), and no GPU has tried ours.
template <auto kKernel, typename... Args>
cudaError_t launch_stage(bool is_second, dim3 grid, cudaStream_t stream, const Args&... args) {
  cudaStreamCaptureStatus capture;
  const bool overlaps = is_second && succeeds(cudaStreamIsCapturing(stream, &capture)) &&
                        capture == cudaStreamCaptureStatusNone && waits<kKernel>();
  if (is_second) launched = overlaps ? "two launches, overlapping" : "two launches";
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = overlaps;
  return launch_with(overlap, /*shared_bytes=*/0, kKernel, grid, stream, args...);
}

}  // namespace fusedskip::cuda

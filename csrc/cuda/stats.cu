// The first launch of forward: stats of x, and of the residual where it has a norm too.

#include "batch_norm.h"
#include "dispatch.cuh"
#include "launch.cuh"
#include "stages.h"
#include "stats.cuh"

namespace fusedskip::cuda {
namespace {

template <typename T, bool kChannelsLast, int kWidth, typename S = StatisticsOf<T>>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, kChannelsLast, kWidth>)
    batch_norm_stats_kernel(const __grid_constant__ Tiling tiling, const T* x, const T* residual,
                            const __grid_constant__ Partials<S> partials) {
  const int norm = blockIdx.z;
  // Chosen once: left to itself, nvcc 13.0 chooses again at every load.
  const T* tensor = norm == 0 ? x : residual;
  asm("" : "+l"(tensor));
  __builtin_assume(__isGlobal(tensor));
  let_next_start();
  NothingKept<T> kept;
  stats_of_program<kChannelsLast, kWidth>(tiling, tensor, norm, partials, kept);
}

}  // namespace

// All were compiled for the same devices. That this one could not be loaded, for want of memory or
// because of a capture, says nothing of that, and passes.
cudaError_t find_kernels() {
  cudaFuncAttributes kernel;
  const auto any = batch_norm_stats_kernel<float, /*kChannelsLast=*/true, kOctet>;
  const cudaError_t error =
      cleared(cudaFuncGetAttributes(&kernel, reinterpret_cast<const void*>(any)));
  const bool passes =
      error == cudaErrorMemoryAllocation || error == cudaErrorStreamCaptureUnsupported;
  return passes ? cudaSuccess : error;
}

cudaError_t stats(const View& view, Dtype dtype, const void* x, const void* residual,
                  void* workspace, cudaStream_t stream) {
  const int norms = residual ? 2 : 1;
  const Tiling tiling = stats_tiling(view, norms);
  const int width = vector_width(view.row_length(), dtype, addresses(x, residual));
  return dispatch(dtype, tiling.channels_last, width, [&](auto instance) {
    using I = decltype(instance);
    using T = typename I::T;
    const dim3 grid(tiling.channel_blocks, tiling.programs, norms);
    return launch(batch_norm_stats_kernel<T, I::kChannelsLast, I::kWidth>, grid, stream, tiling,
                  static_cast<const T*>(x), static_cast<const T*>(residual),
                  Partials<StatisticsOf<T>>(workspace, tiling, norms));
  });
}

}  // namespace fusedskip::cuda

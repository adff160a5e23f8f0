// The first launch of backward.

#include "bwd_reduce.cuh"
#include "stages.h"

namespace fusedskip::cuda {
namespace {

template <typename T, bool kChannelsLast, int kWidth, Kind kKind, typename S = StatisticsOf<T>>
__global__ void __launch_bounds__(kThreads,
                                  kResidentBlocks<T, kChannelsLast, kWidth, kNorms<kKind>>)
    batch_norm_bwd_reduce_kernel(const __grid_constant__ Tiling tiling,
                                 const __grid_constant__ BatchNormBackward args,
                                 const __grid_constant__ Partials<S> partials) {
  let_next_start();
  NothingKept<T> kept;
  bwd_reduce_of_program<kChannelsLast, kWidth, kKind, T>(tiling, args, partials, kept);
}

}  // namespace

cudaError_t bwd_reduce(const BatchNormBackward& args, void* workspace, cudaStream_t stream) {
  return dispatch(args, [&](auto instance, auto kind) {
    using I = decltype(instance);
    using T = typename I::T;
    const Tiling tiling = stage_tiling(args.view, kNorms<kind>);
    const Partials<StatisticsOf<T>> partials(workspace, tiling, kNorms<kind>);
    const dim3 grid(tiling.channel_blocks, tiling.programs);
    return launch(batch_norm_bwd_reduce_kernel<T, I::kChannelsLast, I::kWidth, kind>, grid, stream,
                  tiling, args, partials);
  });
}

}  // namespace fusedskip::cuda

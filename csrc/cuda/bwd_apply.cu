// The second launch of backward, or the only one where nothing is to be reduced.

#include "bwd_apply.cuh"
#include "stages.h"

namespace fusedskip::cuda {
namespace {

template <typename T, bool kChannelsLast, int kWidth, Kind kKind, typename S = StatisticsOf<T>>
__global__ void __launch_bounds__(kThreads,
                                  kResidentBlocks<T, kChannelsLast, kWidth, kNorms<kKind>>)
    batch_norm_bwd_apply_kernel(const __grid_constant__ Tiling tiling,
                                const __grid_constant__ BatchNormBackward args,
                                const __grid_constant__ Partials<S> partials) {
  partials.wait_for_programs();
  bwd_apply_to_program<kChannelsLast, kWidth, kKind, T>(tiling, args, partials, NothingKept<T>());
}

}  // namespace

cudaError_t bwd_apply(const BatchNormBackward& args, void* workspace, cudaStream_t stream) {
  return dispatch(args, [&](auto instance, auto kind) {
    using I = decltype(instance);
    using T = typename I::T;
    const Tiling tiling = stage_tiling(args.view, kNorms<kind>);
    const Partials<StatisticsOf<T>> partials(workspace, tiling, kNorms<kind>);
    const dim3 grid(tiling.channel_blocks, args.dx || args.dresidual ? tiling.programs : 1);
    return launch_stage<batch_norm_bwd_apply_kernel<T, I::kChannelsLast, I::kWidth, kind>>(
        /*is_second=*/workspace != nullptr, grid, stream, tiling, args, partials);
  });
}

}  // namespace fusedskip::cuda

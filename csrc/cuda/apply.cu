// The second launch of forward, or the only one where nothing is to be reduced.

#include "apply.cuh"
#include "dispatch.cuh"
#include "stages.h"

namespace fusedskip::cuda {
namespace {

template <typename T, bool kChannelsLast, int kWidth, int kNorms, typename S = StatisticsOf<T>>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, kChannelsLast, kWidth, kNorms>)
    batch_norm_apply_kernel(const __grid_constant__ Tiling tiling,
                            const __grid_constant__ BatchNormForward args,
                            const __grid_constant__ Partials<S> partials) {
  partials.wait_for_programs();
  apply_to_program<kChannelsLast, kWidth, kNorms, T>(tiling, args, partials, NothingKept<T>());
}

}  // namespace

cudaError_t apply(const BatchNormForward& args, void* workspace, cudaStream_t stream) {
  return dispatch(args, [&](auto instance, auto norms) {
    using I = decltype(instance);
    using T = typename I::T;
    const Tiling tiling = stage_tiling(args.view, norms).with_pitch(args.out_pitch);
    const Partials<StatisticsOf<T>> partials(workspace, stats_tiling(args.view, norms), norms);
    const dim3 grid(tiling.channel_blocks, tiling.programs);
    return launch_stage<batch_norm_apply_kernel<T, I::kChannelsLast, I::kWidth, norms>>(
        /*is_second=*/workspace != nullptr, grid, stream, tiling, args, partials);
  });
}

}  // namespace fusedskip::cuda

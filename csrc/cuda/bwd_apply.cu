// The second launch of backward, or the only one where nothing is to be reduced.

#include "bwd_apply.cuh"
#include "dispatch.cuh"
#include "stages.h"

namespace fusedskip::cuda {
namespace {

template <typename T, bool kChannelsLast, int kWidth, Kind kKind, typename S = StatisticsOf<T>>
__global__ void __launch_bounds__(kThreads,
                                  kResidentBlocks<T, kChannelsLast, kWidth, kNorms<kKind>>)
    batch_norm_bwd_apply_kernel(const __grid_constant__ Tiling tiling,
                                const __grid_constant__ BatchNormBackward args,
                                const __grid_constant__ Partials<S> partials) {
  bwd_apply_to_program<kChannelsLast, kWidth, kKind, T>(tiling, args, partials, NothingKept<T>());
}

}  // namespace

cudaError_t bwd_apply(const BatchNormBackward& args, void* workspace, cudaStream_t stream) {
  const int norms = norm_count(args);
  const Tiling tiling = stage_tiling(args.view, norms);
  const int width =
      vector_width(args.view.row_length(), args.dtype,
                   addresses(args.dout, args.x, args.residual, args.dx, args.dresidual));
  return dispatch(args.dtype, tiling.channels_last, width, [&](auto instance) {
    using I = decltype(instance);
    using T = typename I::T;
    const Kind kind = kind_of(args);
    const auto kernel =
        kind == Kind::kDual
            ? batch_norm_bwd_apply_kernel<T, I::kChannelsLast, I::kWidth, Kind::kDual>
        : kind == Kind::kRecomputed
            ? batch_norm_bwd_apply_kernel<T, I::kChannelsLast, I::kWidth, Kind::kRecomputed>
            : batch_norm_bwd_apply_kernel<T, I::kChannelsLast, I::kWidth, Kind::kSaved>;
    const dim3 grid(tiling.channel_blocks, args.dx || args.dresidual ? tiling.programs : 1);
    kernel<<<grid, kThreads, 0, stream>>>(tiling, args,
                                          Partials<StatisticsOf<T>>(workspace, tiling, norms));
    return cudaGetLastError();
  });
}

}  // namespace fusedskip::cuda

// stats and apply in one launch.

#include "apply.cuh"
#include "on_chip.cuh"
#include "stats.cuh"

namespace fusedskip::cuda {
namespace {

template <typename T, int kNorms>
using Kept = KeptOnChip<T, kNorms, /*kMask=*/false, kStatsBatch<T>>;

template <typename T, bool kChannelsLast, int kWidth, int kNorms, typename S = StatisticsOf<T>>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, kChannelsLast, kWidth, kNorms>)
    batch_norm_on_chip_kernel(const __grid_constant__ OnChip plan,
                              const __grid_constant__ BatchNormForward args,
                              const __grid_constant__ Partials<S> in_memory) {
  const Tiling& tiling = plan.tiling;
  Kept<T, kNorms> kept(plan.rounds);
  const PartialsOnChip<S, kChannelsLast, 2 * kNorms> partials(in_memory, plan.in_clusters);
  stats_of_program<kChannelsLast, kWidth>(tiling, static_cast<const T*>(args.x), 0, partials, kept);
  if constexpr (kNorms == 2)
    stats_of_program<kChannelsLast, kWidth>(tiling, static_cast<const T*>(args.residual), 1,
                                            partials, kept);
  partials.wait_for_programs();
  apply_to_program<kChannelsLast, kWidth, kNorms, T>(tiling, args, partials, kept);
  partials.wait_for_readers();
}

}  // namespace

std::optional<OnChip> plan_on_chip(const BatchNormForward& args) {
  std::optional<OnChip> plan;
  dispatch(args, [&](auto instance, auto norms) {
    using I = decltype(instance);
    using T = typename I::T;
    if constexpr (kHasOnChip<I>)
      plan = plan_on_chip<Kept<T, norms>,
                          batch_norm_on_chip_kernel<T, I::kChannelsLast, I::kWidth, norms>,
                          kResidentBlocks<T, I::kChannelsLast, I::kWidth, norms>>(args.view);
    return cudaSuccess;
  });
  return plan;
}

cudaError_t launch_on_chip(const BatchNormForward& args, const OnChip& plan, void* workspace,
                           cudaStream_t stream) {
  return dispatch(args, [&](auto instance, auto norms) {
    using I = decltype(instance);
    using T = typename I::T;
    if constexpr (kHasOnChip<I>) {
      OnChip with_pitch = plan;
      with_pitch.tiling = plan.tiling.with_pitch(args.out_pitch);
      return launch_kernel_on_chip<
          Kept<T, norms>, batch_norm_on_chip_kernel<T, I::kChannelsLast, I::kWidth, norms>>(
          with_pitch, stream, args, Partials<StatisticsOf<T>>(workspace, plan.tiling, norms));
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace fusedskip::cuda

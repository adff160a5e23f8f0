// stats and apply in one launch.

#include "apply.cuh"
#include "on_chip.cuh"
#include "stats.cuh"

namespace fusedskip::cuda {
namespace {

template <typename T, int kNorms>
using Kept = KeptOnChip<T, kNorms, /*kMask=*/false>;

template <typename T, bool kChannelsLast, int kWidth, int kNorms, typename S = StatisticsOf<T>>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, kChannelsLast, kWidth, kNorms>)
    batch_norm_on_chip_kernel(const __grid_constant__ Tiling tiling,
                              const __grid_constant__ BatchNormForward args,
                              const __grid_constant__ Partials<S> partials, int rounds) {
  const Kept<T, kNorms> kept(rounds);
  stats_of_program<kChannelsLast, kWidth>(tiling, static_cast<const T*>(args.x), 0, partials, kept);
  if constexpr (kNorms == 2)
    stats_of_program<kChannelsLast, kWidth>(tiling, static_cast<const T*>(args.residual), 1,
                                            partials, kept);
  wait_for_programs(tiling);
  apply_to_program<kChannelsLast, kWidth, kNorms, T>(tiling, args, partials, kept);
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

cudaError_t forward_on_chip(const BatchNormForward& args, const OnChip& plan, void* workspace,
                            cudaStream_t stream) {
  return dispatch(args, [&](auto instance, auto norms) {
    using I = decltype(instance);
    using T = typename I::T;
    if constexpr (kHasOnChip<I>) {
      const Tiling tiling = plan.tiling.with_pitch(args.out_pitch);
      const Partials<StatisticsOf<T>> partials(workspace, tiling, norms);
      return launch_together<batch_norm_on_chip_kernel<T, I::kChannelsLast, I::kWidth, norms>>(
          tiling, plan.rounds * Kept<T, norms>::kBytesARound, stream, tiling, args, partials,
          plan.rounds);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace fusedskip::cuda

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

// Calls body(an Instance, the number of norms as a constant) where there is a kernel for them.
template <typename Body>
void with_kernel(const BatchNormForward& args, Body body) {
  const uintptr_t pitch = args.out_pitch * bytes(args.dtype);
  const int width = vector_width(args.view.row_length(), args.dtype,
                                 addresses(args.x, args.residual, args.out) | pitch);
  dispatch(args.dtype, args.view.n_inner == 1, width, [&](auto instance) {
    if constexpr (kHasOnChip<decltype(instance)>) {
      if (norm_count(args) == 2) {
        body(instance, std::integral_constant<int, 2>());
      } else {
        body(instance, std::integral_constant<int, 1>());
      }
    }
    return cudaSuccess;
  });
}

}  // namespace

std::optional<OnChip> plan_on_chip(const BatchNormForward& args) {
  std::optional<OnChip> plan;
  with_kernel(args, [&](auto instance, auto norms) {
    using I = decltype(instance);
    using T = typename I::T;
    plan = plan_on_chip<Kept<T, norms>,
                        batch_norm_on_chip_kernel<T, I::kChannelsLast, I::kWidth, norms>,
                        kResidentBlocks<T, I::kChannelsLast, I::kWidth, norms>>(args.view);
  });
  return plan;
}

cudaError_t forward_on_chip(const BatchNormForward& args, const OnChip& plan, void* workspace,
                            cudaStream_t stream) {
  const Tiling tiling = plan.tiling.with_pitch(args.out_pitch);
  cudaError_t error = cudaSuccess;
  with_kernel(args, [&](auto instance, auto norms) {
    using I = decltype(instance);
    using T = typename I::T;
    error = launch_together<batch_norm_on_chip_kernel<T, I::kChannelsLast, I::kWidth, norms>>(
        tiling, plan.rounds * Kept<T, norms>::kBytesARound, stream, tiling, args,
        Partials<StatisticsOf<T>>(workspace, tiling, norms), plan.rounds);
  });
  return error;
}

}  // namespace fusedskip::cuda

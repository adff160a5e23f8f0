// bwd_reduce and bwd_apply in one launch.

#include "bwd_apply.cuh"
#include "bwd_reduce.cuh"
#include "on_chip.cuh"

namespace fusedskip::cuda {
namespace {

// Rounds in registers: channels-last, five coefficients of eight channels leave no room for any.
template <typename T, bool kChannelsLast, Kind kKind>
inline constexpr int kHeld =
    kChannelsLast && kKind == Kind::kRecomputed ? 0 : kReduceBatch<T, kChannelsLast, kNorms<kKind>>;

template <typename T, bool kChannelsLast, Kind kKind>
using Kept = KeptOnChip<T, 1 + kNorms<kKind>, /*kMask=*/kKind != Kind::kRecomputed,
                        kHeld<T, kChannelsLast, kKind>>;

template <typename T, bool kChannelsLast, int kWidth, Kind kKind, typename S = StatisticsOf<T>>
__global__ void __launch_bounds__(kThreads,
                                  kResidentBlocks<T, kChannelsLast, kWidth, kNorms<kKind>>)
    batch_norm_bwd_on_chip_kernel(const __grid_constant__ OnChip plan,
                                  const __grid_constant__ BatchNormBackward args,
                                  const __grid_constant__ Partials<S> in_memory) {
  const Tiling& tiling = plan.tiling;
  Kept<T, kChannelsLast, kKind> kept(plan.rounds);
  const PartialsOnChip<S, kChannelsLast, 1 + kNorms<kKind>> partials(in_memory, plan.in_clusters);
  bwd_reduce_of_program<kChannelsLast, kWidth, kKind, T>(tiling, args, partials, kept);
  partials.wait_for_programs();
  bwd_apply_to_program<kChannelsLast, kWidth, kKind, T>(tiling, args, partials, kept);
  partials.wait_for_readers();
}

}  // namespace

// Without elements to write there is nothing to keep; and bwd_apply_to_program would return before
// its have_been_read, which wait_for_readers waits for.
std::optional<OnChip> plan_on_chip(const BatchNormBackward& args) {
  std::optional<OnChip> plan;
  if (!args.dx && !args.dresidual) return plan;
  dispatch(args, [&](auto instance, auto kind) {
    using I = decltype(instance);
    using T = typename I::T;
    if constexpr (kHasOnChip<I>)
      plan = plan_on_chip<Kept<T, I::kChannelsLast, kind>,
                          batch_norm_bwd_on_chip_kernel<T, I::kChannelsLast, I::kWidth, kind>,
                          kResidentBlocks<T, I::kChannelsLast, I::kWidth, kNorms<kind>>>(args.view);
    return cudaSuccess;
  });
  return plan;
}

cudaError_t launch_on_chip(const BatchNormBackward& args, const OnChip& plan, void* workspace,
                           cudaStream_t stream) {
  return dispatch(args, [&](auto instance, auto kind) {
    using I = decltype(instance);
    using T = typename I::T;
    if constexpr (kHasOnChip<I>) {
      return launch_kernel_on_chip<
          Kept<T, I::kChannelsLast, kind>,
          batch_norm_bwd_on_chip_kernel<T, I::kChannelsLast, I::kWidth, kind>>(
          plan, stream, args, Partials<StatisticsOf<T>>(workspace, plan.tiling, kNorms<kind>));
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace fusedskip::cuda

// An operation is two launches at most: a stage that reduces, if anything is to be reduced, and one
// that finishes the sums channel by channel and goes through the elements again. Where one launch
// can do both, and is allowed to, it does.

#include <atomic>

#include "batch_norm.h"
#include "stages.h"

namespace fusedskip::cuda {
namespace {

std::atomic<bool> on_chip_allowed = false;

template <typename Args>
std::optional<OnChip> on_chip(const Args& args) {
  return on_chip_allowed ? plan_on_chip(args) : std::nullopt;
}

// Of one launch, and of the two that may have to stand in for it.
template <typename Args>
int64_t workspace_size(const Args& args, const Tiling& two_launches) {
  const auto plan = on_chip(args);
  const int norms = norm_count(args);
  return std::max(two_launches.workspace_size(norms),
                  plan ? plan->tiling.workspace_size(norms) : 0);
}

// Whether the driver did not have the room after all, as where processes share a GPU.
bool refused(cudaError_t error) {
  if (error != cudaErrorCooperativeLaunchTooLarge) return false;
  cudaGetLastError();  // or the next launch would report it
  return true;
}

}  // namespace

bool allow_on_chip(bool allowed) { return on_chip_allowed.exchange(allowed); }

int64_t workspace_size(const BatchNormForward& args) {
  if (!args.training) return 0;
  return workspace_size(args, stats_tiling(args.view, norm_count(args)));
}

int64_t workspace_size(const BatchNormBackward& args) {
  if (!args.reduces()) return 0;
  return workspace_size(args, stage_tiling(args.view, norm_count(args)));
}

int64_t workspace_size(const BatchNormStats& args) {
  return stats_tiling(args.view, 1).workspace_size(1);
}

cudaError_t batch_norm(const BatchNormForward& args, void* workspace, cudaStream_t stream) {
  if (args.training) {
    if (const auto plan = on_chip(args)) {
      const cudaError_t error = forward_on_chip(args, *plan, workspace, stream);
      if (!refused(error)) return error;
    }
    const void* normalised_residual = args.residual_norm.present() ? args.residual : nullptr;
    const cudaError_t error =
        stats(args.view, args.dtype, args.x, normalised_residual, workspace, stream);
    if (error != cudaSuccess) return error;
  }
  return apply(args, workspace, stream);
}

cudaError_t batch_norm_backward(const BatchNormBackward& args, void* workspace,
                                cudaStream_t stream) {
  if (args.reduces()) {
    if (const auto plan = on_chip(args)) {
      const cudaError_t error = backward_on_chip(args, *plan, workspace, stream);
      if (!refused(error)) return error;
    }
    const cudaError_t error = bwd_reduce(args, workspace, stream);
    if (error != cudaSuccess) return error;
  }
  return args.reduces() || args.dx || args.dresidual ? bwd_apply(args, workspace, stream)
                                                     : cudaSuccess;
}

cudaError_t batch_norm_stats(const BatchNormStats& args, void* workspace, cudaStream_t stream) {
  const cudaError_t error = stats(args.view, args.dtype, args.x, nullptr, workspace, stream);
  return error != cudaSuccess ? error : moments(args, workspace, stream);
}

}  // namespace fusedskip::cuda

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

// Whether the driver did not have the room after all, as where processes share a GPU.
bool refused(cudaError_t error) {
  if (error != cudaErrorCooperativeLaunchTooLarge) return false;
  cudaGetLastError();  // or the next launch would report it
  return true;
}

}  // namespace

bool allow_on_chip(bool allowed) { return on_chip_allowed.exchange(allowed); }

cudaError_t batch_norm(const BatchNormForward& args, const Allocate& allocate,
                       cudaStream_t stream) {
  if (!args.training) return apply(args, nullptr, stream);
  const int norms = norm_count(args);
  if (const auto plan = on_chip(args)) {
    void* workspace = allocate(plan->workspace_size(norms));
    const cudaError_t error = forward_on_chip(args, *plan, workspace, stream);
    if (!refused(error)) return error;
  }
  void* workspace = allocate(stats_tiling(args.view, norms).workspace_size(norms));
  const void* normalised_residual = args.residual_norm.present() ? args.residual : nullptr;
  const cudaError_t error =
      stats(args.view, args.dtype, args.x, normalised_residual, workspace, stream);
  return error != cudaSuccess ? error : apply(args, workspace, stream);
}

cudaError_t batch_norm_backward(const BatchNormBackward& args, const Allocate& allocate,
                                cudaStream_t stream) {
  if (!args.reduces())
    return args.dx || args.dresidual ? bwd_apply(args, nullptr, stream) : cudaSuccess;
  const int norms = norm_count(args);
  if (const auto plan = on_chip(args)) {
    void* workspace = allocate(plan->workspace_size(norms));
    const cudaError_t error = backward_on_chip(args, *plan, workspace, stream);
    if (!refused(error)) return error;
  }
  void* workspace = allocate(stage_tiling(args.view, norms).workspace_size(norms));
  const cudaError_t error = bwd_reduce(args, workspace, stream);
  return error != cudaSuccess ? error : bwd_apply(args, workspace, stream);
}

cudaError_t batch_norm_stats(const BatchNormStats& args, const Allocate& allocate,
                             cudaStream_t stream) {
  void* workspace = allocate(stats_tiling(args.view, 1).workspace_size(1));
  const cudaError_t error = stats(args.view, args.dtype, args.x, nullptr, workspace, stream);
  return error != cudaSuccess ? error : moments(args, workspace, stream);
}

}  // namespace fusedskip::cuda

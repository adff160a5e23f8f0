// An operation is two launches at most: a stage that reduces, if anything is to be reduced, and one
// that finishes the sums channel by channel and goes through the elements again. Where one launch
// can do both, and has been measured to be faster, it does.

#include <atomic>

#include "batch_norm.h"
#include "launch.cuh"
#include "measured.h"
#include "stages.h"

namespace fusedskip::cuda {
namespace {

std::atomic<Launches> launches = Launches::kMeasured;

template <typename Args>
bool prefers_one_launch(const Args& args) {
  if (launches != Launches::kMeasured) return launches == Launches::kOne;
  return one_launch_is_faster(kMeasured, pass_of(args, architecture()), args.view);
}

// Tries both stages in one launch. Nothing if two are preferred, or the device has no room for one,
// or the driver finds that it has none after all, as where processes share a GPU.
template <typename Args>
std::optional<cudaError_t> one_launch(const Args& args, const Allocate& allocate,
                                      cudaStream_t stream) {
  if (!prefers_one_launch(args)) return std::nullopt;
  const auto plan = plan_on_chip(args);
  if (!plan) return std::nullopt;
  void* workspace = allocate(plan->workspace_size(norm_count(args)));
  const cudaError_t error = launch_on_chip(args, *plan, workspace, stream);
  const bool refused =
      error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorInvalidClusterSize;
  return refused ? std::nullopt : std::optional(error);
}

}  // namespace

Launches set_launches(Launches preferred) { return launches.exchange(preferred); }

const char* last_launched() { return launched; }

cudaError_t batch_norm(const BatchNormForward& args, const Allocate& allocate,
                       cudaStream_t stream) {
  if (!args.training) return apply(args, nullptr, stream);
  if (const auto done = one_launch(args, allocate, stream)) return *done;
  const int norms = norm_count(args);
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
  if (const auto done = one_launch(args, allocate, stream)) return *done;
  const int norms = norm_count(args);
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

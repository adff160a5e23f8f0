// The operators on CUDA devices, in a build that has them.

#ifdef USE_CUDA

#include <torch/csrc/stable/accelerator.h>

#include "../cuda/batch_norm.h"
#include "ops.h"

namespace fusedskip {
namespace {

// Makes the device of x current for the call, and launches on its current stream.
class Cuda {
 public:
  explicit Cuda(const Tensor& x) : x_(checked(x)), guard_(x.get_device_index()) {
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  void add_relu(Dtype dtype, int64_t numel, bool relu_first, const void* x, const void* residual,
                void* out, uint8_t* mask) const {
    check(cuda::add_relu(dtype, numel, relu_first, x, residual, out, mask, stream_));
  }
  void add_relu_backward(Dtype dtype, int64_t numel, const void* dout, const uint8_t* mask,
                         void* dx) const {
    check(cuda::add_relu_backward(dtype, numel, dout, mask, dx, stream_));
  }
  void batch_norm(const BatchNormForward& args) const {
    Tensor workspace;
    check(cuda::batch_norm(args, allocate(workspace), stream_));
  }
  void batch_norm_backward(const BatchNormBackward& args) const {
    Tensor workspace;
    check(cuda::batch_norm_backward(args, allocate(workspace), stream_));
  }
  void batch_norm_stats(const BatchNormStats& args) const {
    Tensor workspace;
    check(cuda::batch_norm_stats(args, allocate(workspace), stream_));
  }
  void batch_norm_merge(const BatchNormMerge& args) const {
    check(cuda::batch_norm_merge(args, stream_));
  }

 private:
  static const Tensor& checked(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda() && x.numel() > 0, "x: expected elements on a CUDA device");
    return x;
  }

  // From torch's allocator, which knows of streams and of graph capture.
  cuda::Allocate allocate(Tensor& workspace) const {
    return [this, &workspace](int64_t numbers) -> void* {
      if (numbers == 0) return nullptr;
      workspace = empty_vector(x_, numbers, raw_statistics_dtype(x_));
      return workspace.data_ptr();
    };
  }

  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
  }

  const Tensor& x_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

STABLE_TORCH_LIBRARY_IMPL(fusedskip, CUDA, m) { implement<Cuda>(m); }

}  // namespace
}  // namespace fusedskip

#endif  // USE_CUDA

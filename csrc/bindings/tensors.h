// Torch's tensors as the kernels know them: checked, allocated, taken apart into sizes and
// pointers.
//
// What is checked here is all that memory safety needs and all that fusedskip.functional leaves to
// the kernels to find out, which says more clearly what is wrong.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "../args.h"

namespace fusedskip {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "expected a floating point tensor");
  }
}

// That there is no room is all that this ABI says before 2.13, without torch's own error: asked for
// these bytes again, fusedskip.backends has torch raise it.
[[noreturn]] inline void fail_to_allocate(const Tensor& like, int64_t dim, const int64_t* sizes,
                                          int32_t dtype) {
  int64_t n = dtype == aoti_torch_dtype_uint8()     ? 1
              : dtype == aoti_torch_dtype_float64() ? 8
              : dtype == aoti_torch_dtype_float32() ? 4
                                                    : 2;
  for (int64_t d = 0; d < dim; ++d) n *= sizes[d];
  STD_TORCH_CHECK(false, like.is_cpu() ? "CPU" : "CUDA", " out of memory. Tried to allocate ", n,
                  " bytes");
}

// On a CPU results come straight from the allocator: a trip through the dispatcher, as on a GPU,
// costs a microsecond each.
inline Tensor empty_strided(const Tensor& like, int64_t dim, const int64_t* sizes,
                            const int64_t* strides, int32_t dtype) {
  int32_t device_type;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  if (aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, like.get_device_index(),
                               &handle) != TORCH_SUCCESS)
    fail_to_allocate(like, dim, sizes, dtype);
  return Tensor(handle);
}

inline int32_t raw_dtype(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

inline Tensor empty_like(const Tensor& x) {
  return empty_strided(x, x.dim(), x.sizes().data(), x.strides().data(), raw_dtype(x));
}

inline Tensor empty_vector(const Tensor& like, int64_t size, int32_t dtype) {
  const int64_t stride = 1;
  return empty_strided(like, 1, &size, &stride, dtype);
}

inline Tensor not_asked_for(const Tensor& x) { return empty_vector(x, 0, raw_dtype(x)); }

inline Tensor empty_mask(const Tensor& x, bool wanted, const View& view) {
  if (!wanted) return empty_vector(x, 0, aoti_torch_dtype_uint8());
  const int64_t sizes[] = {view.n_rows(), view.mask_row_bytes()}, strides[] = {sizes[1], 1};
  return empty_strided(x, 2, sizes, strides, aoti_torch_dtype_uint8());
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline uint8_t* mask_data(const Tensor& mask, const Tensor& x, const View& view) {
  if (mask.numel() == 0) return nullptr;
  // By its rows: as many bytes may be those of another memory layout.
  STD_TORCH_CHECK(mask.dim() == 2 && mask.size(0) == view.n_rows() &&
                      mask.size(1) == view.mask_row_bytes() && same_device(mask, x) &&
                      mask.scalar_type() == ScalarType::Byte && mask.is_contiguous(),
                  "mask: not the one that forward returned");
  return static_cast<uint8_t*>(mask.data_ptr());
}

// A tensor without regard to its dimensions, whose elements fill its memory.
inline View flat_view_of(const Tensor& x) {
  int64_t extent = 1;
  for (int64_t d = 0; d < x.dim(); ++d) extent += (x.size(d) - 1) * x.stride(d);
  STD_TORCH_CHECK(extent == x.numel(), "x: expected a dense tensor");
  return {1, 1, x.numel()};
}

// See fusedskip.ops.memory_view.
inline View view_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "x: expected a dense (N, C, *) or (N, *, C) tensor");
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t spatial = 1;
  for (int64_t d = 2; d < x.dim(); ++d) spatial *= sizes[d];
  if (x.is_contiguous()) return {sizes[0], sizes[1], spatial};
  int64_t expected = sizes[1];
  bool channels_last = sizes[1] == 1 || strides[1] == 1;
  for (int64_t d = x.dim() - 1; d >= 0; d -= d == 2 ? 2 : 1) {
    channels_last &= sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
  }
  STD_TORCH_CHECK(channels_last, "x: expected a dense (N, C, *) or (N, *, C) tensor");
  return {sizes[0] * spatial, sizes[1], 1};
}

inline const void* data_like(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(
      tensor.dim() == x.dim() && tensor.scalar_type() == x.scalar_type() && same_device(tensor, x),
      name, ": expected the shape, dtype, device and memory layout of x");
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(
        tensor.size(d) == x.size(d) && (x.size(d) == 1 || tensor.stride(d) == x.stride(d)), name,
        ": expected the shape, dtype, device and memory layout of x");
  return tensor.data_ptr();
}

// Statistics and sums are fp64 for fp64, else fp32.
inline Dtype statistics_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}

inline int32_t raw_statistics_dtype(const Tensor& x) {
  return dtype_of(x) == Dtype::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// `like` is x, or the moments of one.
inline ChannelVector channels(const OptionalTensor& tensor, int64_t n_channels, const Tensor& like,
                              const char* name) {
  if (!tensor) return {};
  const Dtype dtype = dtype_of(*tensor);
  STD_TORCH_CHECK(tensor->numel() == n_channels && tensor->dim() == 1 && tensor->is_contiguous() &&
                      same_device(*tensor, like),
                  name, ": expected one number a channel, contiguous, on the device of x");
  STD_TORCH_CHECK(statistics_of(dtype) == statistics_of(dtype_of(like)), name,
                  ": expected float64 where x is, and only there");
  return {tensor->data_ptr(), dtype};
}

inline ChannelVector channels(const OptionalTensor& tensor, const Tensor& x, const char* name) {
  const ChannelVector vector = channels(tensor, x.size(1), x, name);
  const Dtype dtype = dtype_of(x);
  STD_TORCH_CHECK(!tensor || vector.dtype == dtype || vector.dtype == statistics_of(dtype), name,
                  ": expected the dtype of x or float32");
  return vector;
}

// Mean and rstd of x, (2, C), or of each of several norms, (norms, 2, C). Another tensor to make,
// to save and to pass would be 2 us more, of 55 forward and backward.
inline Tensor empty_statistics(const Tensor& x, int64_t norms) {
  const int64_t sizes[] = {norms, 2, x.size(1)}, strides[] = {2 * sizes[2], sizes[2], 1};
  const int64_t dim = norms == 1 ? 2 : 3;
  return empty_strided(x, dim, sizes + 3 - dim, strides + 3 - dim, raw_statistics_dtype(x));
}

// The data of such a tensor, which has `rows` at least.
inline char* statistics_data(const Tensor& tensor, int64_t rows, const Tensor& x,
                             const char* complaint) {
  STD_TORCH_CHECK(dtype_of(tensor) == statistics_of(dtype_of(x)) && tensor.is_contiguous() &&
                      tensor.numel() >= rows * x.size(1) && same_device(tensor, x),
                  complaint);
  return static_cast<char*>(tensor.data_ptr());
}

// Norm `norm` of a call.
inline Norm norm_of(const OptionalTensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& running_mean, const OptionalTensor& running_var,
                    double momentum, double eps, const Tensor& statistics, int64_t norm,
                    const Tensor& x) {
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(),
                  "running_mean, running_var: expected both or neither");
  const Dtype dtype = statistics_of(dtype_of(x));
  const int64_t row = x.size(1) * bytes(dtype);
  char* mean = 2 * norm * row + statistics_data(statistics, 2 * (norm + 1), x,
                                                "statistics: not those that forward returned");
  return {
      .weight = channels(weight, x, "weight"),
      .bias = channels(bias, x, "bias"),
      .running_mean = channels(running_mean, x, "running_mean"),
      .running_var = channels(running_var, x, "running_var"),
      .mean = {mean, dtype},
      .rstd = {mean + row, dtype},
      .momentum = momentum,
      .eps = eps,
  };
}

inline Tensor empty_gradient(const OptionalTensor& parameter, const Tensor& x, bool wanted) {
  return parameter && wanted ? empty_vector(x, x.size(1), raw_dtype(*parameter)) : not_asked_for(x);
}

inline ChannelVector gradient_data(const Tensor& gradient, const Tensor& x, const char* name) {
  return gradient.numel() ? channels(gradient, x, name) : ChannelVector{};
}

// The distance in `out`, which may be part of a wider tensor, from one image, channels-last from
// one pixel, to the next. Within them it must be laid out like x.
inline int64_t pitch_of(const Tensor& out, const Tensor& x, const View& view) {
  bool fits = out.dim() == x.dim() && out.scalar_type() == x.scalar_type() && same_device(out, x);
  const bool planes = x.is_contiguous();
  int64_t pitch = 0, inner = 1;  // elements of a plane, or pixels, inside dimension d
  for (int64_t d = x.dim() - 1; fits && d >= 0; d -= d == 2 ? 2 : 1) {
    fits = out.size(d) == x.size(d);
    if (x.size(d) > 1) {
      const int64_t stride = out.stride(d), step = planes && d == 0 ? 1 : inner;
      if (planes && d > 0) {
        fits &= stride == inner;
      } else if (pitch == 0) {
        pitch = stride / step;
        fits &= stride % step == 0;
      } else {
        fits &= stride == pitch * step;
      }
    }
    inner *= x.size(d);
  }
  fits = fits && out.size(1) == x.size(1);
  fits = fits && (x.size(1) == 1 || out.stride(1) == (planes ? view.n_inner : 1));
  const int64_t dense = view.n_channels * view.n_inner;
  STD_TORCH_CHECK(
      fits && (pitch == 0 || pitch >= dense),
      "out: expected the shape, dtype and device of x, and its layout but for a distance "
      "between images, or channels-last between pixels");
  return pitch == 0 ? dense : pitch;
}

}  // namespace fusedskip

// From run-time properties of a tensor to the template arguments of a kernel.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <type_traits>

#include "index.h"

namespace fusedskip::cuda {

template <typename T_, bool kChannelsLast_, int kWidth_>
struct Instance {
  using T = T_;
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr int kWidth = kWidth_;
};

// Calls launch(Instance()). fp64 is there for gradcheck and has accesses of one element alone.
template <typename Launch>
cudaError_t dispatch(Dtype dtype, bool channels_last, int width, Launch launch) {
  const auto with_width = [&]<typename T, bool kChannelsLast>() {
    if constexpr (sizeof(T) < sizeof(double)) {
      if (width == 8) return launch(Instance<T, kChannelsLast, 8>());
      if (width == 4) return launch(Instance<T, kChannelsLast, 4>());
    }
    return launch(Instance<T, kChannelsLast, 1>());
  };
  const auto with_layout = [&]<typename T>() {
    return channels_last ? with_width.template operator()<T, true>()
                         : with_width.template operator()<T, false>();
  };
  switch (dtype) {
    case Dtype::kFloat64:
      return with_layout.template operator()<double>();
    case Dtype::kFloat32:
      return with_layout.template operator()<float>();
    case Dtype::kBFloat16:
      return with_layout.template operator()<__nv_bfloat16>();
    case Dtype::kFloat16:
      return with_layout.template operator()<__half>();
  }
  return cudaErrorInvalidValue;
}

template <typename... Pointers>
uintptr_t addresses(Pointers... pointers) {
  return (reinterpret_cast<uintptr_t>(pointers) | ...);
}

// Calls launch(Instance(), the number of norms as a constant).
template <typename Launch>
cudaError_t dispatch(const BatchNormForward& args, Launch launch) {
  const View& view = args.view;
  const uintptr_t pitch = args.out_pitch * bytes(args.dtype);
  const int width = vector_width(view.row_length(), args.dtype,
                                 addresses(args.x, args.residual, args.out) | pitch);
  return dispatch(args.dtype, view.n_inner == 1, width, [&](auto instance) {
    return args.residual_norm.present() ? launch(instance, std::integral_constant<int, 2>())
                                        : launch(instance, std::integral_constant<int, 1>());
  });
}

}  // namespace fusedskip::cuda

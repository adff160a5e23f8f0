// add_relu: out = relu(x + residual) or relu(x) + residual, and ReLU's gradient: elementwise in the
// order of memory, which is one row. Forward reads x and residual and writes out and the 1-bit
// mask: 3N + m; backward reads dout and the mask and writes dx: 2N + m. A block takes kUnroll times
// 256 octets.

#include "batch_norm.h"
#include "dispatch.cuh"
#include "launch.cuh"
#include "octet.cuh"

namespace fusedskip::cuda {
namespace {

constexpr int kUnroll = 2;

__device__ Place flat_place(int64_t numel, int u) {
  const int64_t octet = (int64_t{blockIdx.x} * kUnroll + u) * kThreads + threadIdx.x;
  const int64_t left = numel - octet * kOctet;
  return {octet * kOctet, octet, int(std::clamp<int64_t>(left, 0, kOctet))};
}

// The last octet of all may be short, whatever the width of the others.
template <int kWidth, typename T>
__device__ Octet<T> load_flat(const T* p, const Place& place) {
  return place.elements == kOctet ? load<kWidth>(p, place) : load<1>(p, place);
}

template <int kWidth, typename T>
__device__ void store_flat(T* p, const Place& place, const Octet<T>& octet) {
  if (kWidth == 1 || place.elements == kOctet) {
    store<kWidth>(p, place, octet);
  } else {
    store_alone<1>(p, place, octet);
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    add_relu_kernel(int64_t numel, bool relu_first, const T* x, const T* residual, T* out,
                    uint8_t* mask) {
  Octet<T> octets[kUnroll], residuals[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Place place = flat_place(numel, u);
    octets[u] = load_flat<kWidth>(x, place);
    residuals[u] = load_flat<kWidth>(residual, place);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Place place = flat_place(numel, u);
    auto values = widen<T>(octets[u]);
    const auto added = widen<T>(residuals[u]);
#pragma unroll
    for (int i = 0; i < kOctet; ++i)
      if (!relu_first) values[i] += added[i];
    const uint32_t bits = relu_passes<T>(values);
    values = keep(values, bits);
#pragma unroll
    for (int i = 0; i < kOctet; ++i)
      if (relu_first) values[i] += added[i];
    if (mask && place.elements > 0) mask[place.byte] = padded(bits, place);
    store_flat<kWidth>(out, place, narrow<T>(values));
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    add_relu_backward_kernel(int64_t numel, const T* dout, const uint8_t* mask, T* dx) {
  Octet<T> octets[kUnroll];
  uint32_t bits[kUnroll] = {};
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Place place = flat_place(numel, u);
    octets[u] = load_flat<kWidth>(dout, place);
    if (place.elements > 0) bits[u] = mask[place.byte];
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
    store_flat<kWidth>(dx, flat_place(numel, u), narrow<T>(keep(widen<T>(octets[u]), bits[u])));
}

int flat_width(Dtype dtype, uintptr_t addresses) { return vector_width(kOctet, dtype, addresses); }

unsigned flat_grid(int64_t numel) { return unsigned(ceil_div(numel, kUnroll * kThreads * kOctet)); }

}  // namespace

cudaError_t add_relu(Dtype dtype, int64_t numel, bool relu_first, const void* x,
                     const void* residual, void* out, uint8_t* mask, cudaStream_t stream) {
  const int width = flat_width(dtype, addresses(x, residual, out));
  return dispatch(dtype, /*channels_last=*/false, width, [&](auto instance) {
    using T = typename decltype(instance)::T;
    return launch(add_relu_kernel<T, decltype(instance)::kWidth>, flat_grid(numel), stream, numel,
                  relu_first, static_cast<const T*>(x), static_cast<const T*>(residual),
                  static_cast<T*>(out), mask);
  });
}

cudaError_t add_relu_backward(Dtype dtype, int64_t numel, const void* dout, const uint8_t* mask,
                              void* dx, cudaStream_t stream) {
  const int width = flat_width(dtype, addresses(dout, dx));
  return dispatch(dtype, /*channels_last=*/false, width, [&](auto instance) {
    using T = typename decltype(instance)::T;
    return launch(add_relu_backward_kernel<T, decltype(instance)::kWidth>, flat_grid(numel), stream,
                  numel, static_cast<const T*>(dout), mask, static_cast<T*>(dx));
  });
}

}  // namespace fusedskip::cuda

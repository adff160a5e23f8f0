// A sum and a ReLU: apply and bwd_apply without a norm, for which the layout does not matter.

#include "batch_norm.h"
#include "tiling.h"

namespace fusedskip::cpu {
namespace {

template <typename Apply>
void for_each_tile(int64_t numel, Dtype dtype, const Apply& apply) {
  one_stage(Tiling({1, 1, numel}, dtype), /*finish=*/[](int64_t, int64_t) {}, apply);
}

}  // namespace

void add_relu(Dtype dtype, int64_t numel, bool relu_first, const void* x, const void* residual,
              void* out, uint8_t* mask) {
  for_each_tile(numel, dtype, [&](const Tile& tile) {
    kernels(dtype).apply({.runs = tile.runs,
                          .x = advance(x, tile.offset, dtype),
                          .residual = advance(residual, tile.offset, dtype),
                          .out = advance(out, tile.offset, dtype),
                          .out_stride = tile.runs.stride,
                          .mask = advance_mask(mask, tile.mask_offset),
                          .relu = relu_first ? Relu::kFirst : Relu::kLast});
  });
}

void add_relu_backward(Dtype dtype, int64_t numel, const void* dout, const uint8_t* mask,
                       void* dx) {
  for_each_tile(numel, dtype, [&](const Tile& tile) {
    kernels(dtype).bwd_apply({{.runs = tile.runs,
                               .dout = advance(dout, tile.offset, dtype),
                               .mask = mask + tile.mask_offset,
                               .gate = Gate::kMask},
                              /*dx=*/nullptr,
                              /*dresidual=*/advance(dx, tile.offset, dtype)});
  });
}

}  // namespace fusedskip::cpu

"""bwd_reduce: dout, x and the threshold → partial sums of g and g * (x - mean) per channel.

g is dout where ReLU passed, else 0. Where the residual is normalised, of g * (residual - mean')
too. Reads dout and x (2N), the residual, and the mask if there is one. Tile
[BLOCK_POSITIONS, BLOCK_CHANNELS], grid (channel blocks, splits); bwd_apply adds the splits up,
always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import SIZES, Plan, View
from .tile import (
    in_octets,
    load_channels,
    load_statistics,
    mask_offsets,
    normalise,
    relu_passes,
    tile_offsets,
    unpack_bits,
    whole_vectors,
)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_bwd_reduce_kernel(
    dout_ptr, x_ptr, residual_ptr, mask_ptr,
    weight_ptr, bias_ptr, statistics_ptr, partials_ptr,
    n_outer, n_channels, n_inner,
    RELU: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_DTYPE: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Fills partials, [2 or 3, n_splits, n_channels]: sums of g, g * (x - mean), and the other."""
    n_channels, n_inner = whole_vectors(n_channels, n_inner, VEC, CHANNELS_LAST)
    channels = tl.program_id(0).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    split, n_splits = tl.program_id(1), tl.num_programs(1)
    mean = load_statistics(statistics_ptr, 0, channels, n_channels, ACC_DTYPE)
    rstd = load_statistics(statistics_ptr, 1, channels, n_channels, ACC_DTYPE)
    scale = load_channels(weight_ptr, channels, n_channels, 1.0, ACC_DTYPE) * rstd
    bias = load_channels(bias_ptr, channels, n_channels, 0.0, ACC_DTYPE)

    sum_g = tl.zeros([BLOCK_POSITIONS, BLOCK_CHANNELS], ACC_DTYPE)
    sum_gx = tl.zeros([BLOCK_POSITIONS, BLOCK_CHANNELS], ACC_DTYPE)
    if residual_ptr is not None:
        residual_mean = load_statistics(statistics_ptr, 2, channels, n_channels, ACC_DTYPE)
        sum_gr = tl.zeros([BLOCK_POSITIONS, BLOCK_CHANNELS], ACC_DTYPE)
    pitch = n_inner if mask_ptr is None or CHANNELS_LAST else in_octets(n_inner, INDEX_DTYPE)
    n_tiles = tl.cdiv(tl.cast(n_outer, INDEX_DTYPE) * pitch, BLOCK_POSITIONS)
    for tile in range(split, n_tiles, n_splits):
        offsets, valid = tile_offsets(
            tile, channels, n_outer, n_channels, n_inner, pitch, BLOCK_POSITIONS, CHANNELS_LAST
        )
        g = tl.load(dout_ptr + offsets, mask=valid, other=0.0)
        x = tl.load(x_ptr + offsets, mask=valid, other=0.0)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offsets, mask=valid, other=0.0)
        if RELU:
            passes = load_gate(
                mask_ptr, x, mean, scale, bias, tile, n_outer, n_channels, n_inner,
                BLOCK_POSITIONS, BLOCK_CHANNELS, CHANNELS_LAST,
            )  # fmt: skip
            g = tl.where(passes, g, 0.0)
        g = g.to(ACC_DTYPE)
        if residual_ptr is not None:  # before the others: after them, ptxas spills in fp16
            sum_gr += g * (residual.to(ACC_DTYPE) - residual_mean[None, :])
        sum_g += g
        sum_gx += g * (x.to(ACC_DTYPE) - mean[None, :])

    partials_ptr += split * n_channels + channels
    tl.store(partials_ptr, tl.sum(sum_g, axis=0), mask=channels < n_channels)
    partials_ptr += n_splits * n_channels
    tl.store(partials_ptr, tl.sum(sum_gx, axis=0), mask=channels < n_channels)
    if residual_ptr is not None:
        partials_ptr += n_splits * n_channels
        tl.store(partials_ptr, tl.sum(sum_gr, axis=0), mask=channels < n_channels)


@triton.jit
def load_gate(
    mask_ptr, x, mean, scale, bias, tile, n_outer, n_channels, n_inner,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Where forward's ReLU passed, bool, shape of the tile x: from the mask, or else from x."""
    if mask_ptr is not None:
        offsets, valid = mask_offsets(
            tile, n_outer, n_channels, n_inner, BLOCK_POSITIONS, BLOCK_CHANNELS, CHANNELS_LAST
        )
        octets = tl.load(mask_ptr + offsets, mask=valid, other=0)
        return unpack_bits(octets, BLOCK_POSITIONS, BLOCK_CHANNELS)
    else:
        return relu_passes(normalise(x.to(mean.dtype), mean, scale, bias), x.dtype)


def bwd_reduce(
    dout: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    statistics: torch.Tensor,
    partials: torch.Tensor,
    view: View,
    plan: Plan,
    relu: bool,
) -> None:
    """Fill partials, (2, n_splits, n_channels) in the statistics dtype.

    With a residual it is (3, n_splits, n_channels), and statistics are (2, 2, n_channels).
    """
    batch_norm_bwd_reduce_kernel[plan.channel_blocks, plan.bwd_splits](
        dout, x, residual, mask,
        weight, bias, statistics, partials,
        *view, RELU=relu, **plan.constants(x), maxnreg=plan.max_registers,
    )  # fmt: skip

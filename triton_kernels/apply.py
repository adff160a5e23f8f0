"""apply: out = relu((x - mean) * scale + bias + residual), with scale = weight * rstd.

Only x is always there. The residual may have a norm of its own, of the same form. Reads x and
residual, writes out and the 1-bit mask: 2N, or 3N + m. Tile [BLOCK_POSITIONS, BLOCK_CHANNELS], grid
(channel blocks, programs). Without a norm this is the whole of add_relu.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import SIZES, Plan, View, padded
from .stats import merge_moments
from .tile import (
    divide,
    in_octets,
    load_channels,
    load_last,
    mask_offsets,
    normalise,
    pack_bits,
    relu_passes,
    tile_offsets,
    uniform,
    update_running,
    whole_vectors,
)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_apply_kernel(
    x_ptr, residual_ptr, out_ptr, mask_ptr,
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr,
    momentum: tl.float64, eps: tl.float64,
    residual_weight_ptr, residual_bias_ptr, residual_running_mean_ptr, residual_running_var_ptr,
    residual_momentum: tl.float64, residual_eps: tl.float64,
    partials_ptr, statistics_ptr,
    n_splits, n_outer, n_channels, n_inner, out_gap,
    RELU: tl.constexpr, RELU_FIRST: tl.constexpr, DUAL: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INDEX_DTYPE: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    STATS_POSITIONS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Absent tensors are None, which the compiler knows: they need no flags of their own.

    RELU is of the sum, RELU_FIRST of x alone; DUAL says that the residual has a norm too. out_gap
    is what lies between two outer indices of out where that is part of a wider tensor.
    """
    n_channels, n_inner = whole_vectors(n_channels, n_inner, VEC, CHANNELS_LAST)
    channels = tl.program_id(0).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    program, n_programs = tl.program_id(1), tl.num_programs(1)

    n_positions = tl.cast(n_outer, INDEX_DTYPE) * n_inner
    if statistics_ptr is not None:
        mean, scale, bias = finish_statistics(
            0, x_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, momentum, eps,
            partials_ptr, statistics_ptr, channels, n_splits, n_channels, n_inner, n_positions,
            ACC_DTYPE, STATS_POSITIONS, BLOCK_SPLITS,
        )  # fmt: skip
        # In bf16 channels-first 40 registers, else 70; of two norms 40, else 122.
        mean, scale = uniform(mean), uniform(scale)
    if DUAL:
        residual_mean, residual_scale, residual_bias = finish_statistics(
            1, residual_ptr, residual_weight_ptr, residual_bias_ptr,
            residual_running_mean_ptr, residual_running_var_ptr, residual_momentum, residual_eps,
            partials_ptr, statistics_ptr, channels, n_splits, n_channels, n_inner, n_positions,
            ACC_DTYPE, STATS_POSITIONS, BLOCK_SPLITS,
        )  # fmt: skip
        residual_mean, residual_scale = uniform(residual_mean), uniform(residual_scale)

    # Where there is a mask, planes are padded to whole bytes of it. Tiles are taken from the last
    # to the first: the end of what stats read is still in L2. What is read for the last time leaves
    # it first, to make room for out and not in place of what is yet to be read.
    pitch = n_inner if mask_ptr is None or CHANNELS_LAST else in_octets(n_inner, INDEX_DTYPE)
    n_tiles = tl.cdiv(tl.cast(n_outer, INDEX_DTYPE) * pitch, BLOCK_POSITIONS)
    for step in range(program, n_tiles, n_programs):
        tile = n_tiles - 1 - step
        offsets, valid = tile_offsets(
            tile, channels, n_outer, n_channels, n_inner, pitch, BLOCK_POSITIONS, CHANNELS_LAST
        )
        out = load_last(x_ptr + offsets, valid).to(ACC_DTYPE)
        if residual_ptr is not None:
            residual = load_last(residual_ptr + offsets, valid).to(ACC_DTYPE)
        if statistics_ptr is not None:
            out = normalise(out, mean, scale, bias)
        if RELU_FIRST:
            passes = relu_passes(out, out_ptr.dtype.element_ty)
            out = tl.where(passes, out, 0.0)
        if DUAL:
            residual = normalise(residual, residual_mean, residual_scale, residual_bias)
        if residual_ptr is not None:
            out += residual
        if RELU:
            passes = relu_passes(out, out_ptr.dtype.element_ty)
            out = tl.where(passes, out, 0.0)
        if out_gap is not None:
            position = tile * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
            outer = position if CHANNELS_LAST else position // pitch
            offsets += outer.to(tl.int64)[:, None] * out_gap
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=valid)
        if mask_ptr is not None:
            offsets, byte_valid = mask_offsets(
                tile, n_outer, n_channels, n_inner, BLOCK_POSITIONS, BLOCK_CHANNELS, CHANNELS_LAST
            )
            tl.store(mask_ptr + offsets, pack_bits(passes & valid, CHANNELS_LAST), mask=byte_valid)


@triton.jit
def finish_statistics(
    norm: tl.constexpr, x_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr,
    momentum, eps, partials_ptr, statistics_ptr,
    channels, n_splits, n_channels, n_inner, n_positions,
    dtype: tl.constexpr, STATS_POSITIONS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Mean, scale and bias of channels; the first program stores statistics and running buffers."""
    rows = n_channels.to(tl.int64) * 2 * norm  # of the norms before this one
    if partials_ptr is not None:
        partials_ptr += rows * n_splits
        mean, m2 = merge_moments(
            x_ptr, partials_ptr, channels, n_splits, n_channels, n_inner, n_positions,
            dtype, STATS_POSITIONS, BLOCK_SPLITS,
        )  # fmt: skip
        var = divide(m2, n_positions.to(dtype))
    else:
        mean = load_channels(running_mean_ptr, channels, n_channels, 0.0, dtype)
        var = load_channels(running_var_ptr, channels, n_channels, 1.0, dtype)
    rstd = tl.rsqrt(var + eps).to(dtype)  # in fp64, as eps is
    if tl.program_id(1) == 0:
        if partials_ptr is not None and running_mean_ptr is not None:
            unbiased = divide(m2, (n_positions - 1).to(dtype))
            update_running(running_mean_ptr, mean, momentum, channels, n_channels)
            update_running(running_var_ptr, unbiased, momentum, channels, n_channels)
        statistics_ptr += rows
        tl.store(statistics_ptr + channels, mean, mask=channels < n_channels)
        tl.store(statistics_ptr + n_channels + channels, rstd, mask=channels < n_channels)
    scale = load_channels(weight_ptr, channels, n_channels, 1.0, dtype) * rstd
    return mean, scale, load_channels(bias_ptr, channels, n_channels, 0.0, dtype)


class Norm(NamedTuple):
    """What a batch norm is given, in the order of the kernel's arguments."""

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    running_mean: torch.Tensor | None = None
    running_var: torch.Tensor | None = None
    momentum: float = 0.0
    eps: float = 0.0


ABSENT = Norm()


def apply(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    mask: torch.Tensor | None,
    view: View,
    plan: Plan,
    relu: bool,
    relu_first: bool = False,
    norm: Norm = ABSENT,
    residual_norm: Norm | None = None,
    partials: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
) -> None:
    """Fill out and mask; with a norm, that is with statistics, those and the running buffers.

    They are those of the batch if partials are given, else the running ones: (2, n_channels), mean
    and rstd. With a norm of the residual, both have a leading dimension of two: x, residual.
    """
    batch_norm_apply_kernel[plan.channel_blocks, plan.n_programs](
        x, residual, out, mask,
        *norm, *(residual_norm or ABSENT), partials, statistics,
        plan.stats_splits, *view, view.gap(out),
        RELU=relu, RELU_FIRST=relu_first, DUAL=residual_norm is not None,
        STATS_POSITIONS=plan.stats_positions, BLOCK_SPLITS=padded(plan.stats_splits),
        **plan.constants(x), maxnreg=plan.max_registers,
    )  # fmt: skip

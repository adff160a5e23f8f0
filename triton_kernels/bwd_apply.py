"""bwd_apply: dx = scale * g + k2 * (x - mean) + k3 and dresidual = g; also dweight and dbias.

g is dout where ReLU passed, else 0. Where the residual is normalised, dresidual has the form of dx.
Reads dout, the mask, and x in training or to find the threshold again, so too a normalised
residual; writes what is asked for: 3N, 4N + m, or 5N + m. Tile [BLOCK_POSITIONS, BLOCK_CHANNELS],
grid (channel blocks, programs). Asked for dresidual alone it is the whole of add_relu's backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .bwd_reduce import load_gate
from .launch import SIZES, Plan, View, padded
from .tile import (
    divide,
    in_octets,
    load_channels,
    load_last,
    load_partials,
    load_statistics,
    tile_offsets,
    uniform,
    whole_vectors,
)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_bwd_apply_kernel(
    dout_ptr, x_ptr, residual_ptr, mask_ptr, dx_ptr, dresidual_ptr, partials_ptr, means_ptr,
    statistics_ptr, weight_ptr, bias_ptr, residual_weight_ptr,
    dweight_ptr, dbias_ptr, residual_dweight_ptr, residual_dbias_ptr,
    n_splits, n_outer, n_channels, n_inner,
    RELU: tl.constexpr, TRAINING: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INDEX_DTYPE: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Outputs that are not wanted are None, and so is what only they would need.

    The residual is given where it is normalised, and the means, of g and g * (x - mean) * rstd of
    each channel, where they are not those of the partials.
    """
    n_channels, n_inner = whole_vectors(n_channels, n_inner, VEC, CHANNELS_LAST)
    channels = tl.program_id(0).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    program, n_programs = tl.program_id(1), tl.num_programs(1)

    mean = load_statistics(statistics_ptr, 0, channels, n_channels, ACC_DTYPE)
    rstd = load_statistics(statistics_ptr, 1, channels, n_channels, ACC_DTYPE)
    scale = load_channels(weight_ptr, channels, n_channels, 1.0, ACC_DTYPE) * rstd
    bias = load_channels(bias_ptr, channels, n_channels, 0.0, ACC_DTYPE)
    if residual_ptr is not None:
        residual_mean = load_statistics(statistics_ptr, 2, channels, n_channels, ACC_DTYPE)
        residual_rstd = load_statistics(statistics_ptr, 3, channels, n_channels, ACC_DTYPE)
        residual_scale = load_channels(residual_weight_ptr, channels, n_channels, 1.0, ACC_DTYPE)
        residual_scale *= residual_rstd
    if partials_ptr is not None:
        n_positions = (tl.cast(n_outer, INDEX_DTYPE) * n_inner).to(ACC_DTYPE)
        sum_g = sum_partials(partials_ptr, 0, channels, n_splits, n_channels, BLOCK_SPLITS)
        sum_gx = sum_partials(partials_ptr, 1, channels, n_splits, n_channels, BLOCK_SPLITS)
        k2, k3 = finish_sums(
            sum_g, sum_gx, scale, rstd, dweight_ptr, dbias_ptr, channels, n_channels, n_positions
        )
        # In bf16 channels-first 37 registers, else 69; of two norms 50, else 120.
        k2, k3 = uniform(k2), uniform(k3)
        if residual_ptr is not None:
            sum_gr = sum_partials(partials_ptr, 2, channels, n_splits, n_channels, BLOCK_SPLITS)
            residual_k2, residual_k3 = finish_sums(
                sum_g, sum_gr, residual_scale, residual_rstd,
                residual_dweight_ptr, residual_dbias_ptr, channels, n_channels, n_positions,
            )  # fmt: skip
            residual_k2, residual_k3 = uniform(residual_k2), uniform(residual_k3)
    if means_ptr is not None:
        mean_g = load_channels(means_ptr, channels, n_channels, 0.0, ACC_DTYPE)
        mean_gx = load_channels(means_ptr + n_channels, channels, n_channels, 0.0, ACC_DTYPE)
        k2, k3 = -scale * rstd * mean_gx, -scale * mean_g

    if dx_ptr is not None or dresidual_ptr is not None:
        # From the last tile to the first: the end of what bwd_reduce read is still in L2.
        pitch = n_inner if mask_ptr is None or CHANNELS_LAST else in_octets(n_inner, INDEX_DTYPE)
        n_tiles = tl.cdiv(tl.cast(n_outer, INDEX_DTYPE) * pitch, BLOCK_POSITIONS)
        for step in range(program, n_tiles, n_programs):
            tile = n_tiles - 1 - step
            offsets, valid = tile_offsets(
                tile, channels, n_outer, n_channels, n_inner, pitch, BLOCK_POSITIONS, CHANNELS_LAST
            )
            g = load_last(dout_ptr + offsets, valid)
            x = g if x_ptr is None else load_last(x_ptr + offsets, valid)
            if residual_ptr is not None:
                residual = load_last(residual_ptr + offsets, valid)
            if RELU:
                passes = load_gate(
                    mask_ptr, x, mean, scale, bias, tile, n_outer, n_channels, n_inner,
                    BLOCK_POSITIONS, BLOCK_CHANNELS, CHANNELS_LAST,
                )  # fmt: skip
                g = tl.where(passes, g, 0.0)
            if dresidual_ptr is not None:
                dresidual = g
                if residual_ptr is not None:
                    dresidual = residual_scale[None, :] * g.to(ACC_DTYPE)
                    if TRAINING:
                        deviation = residual.to(ACC_DTYPE) - residual_mean[None, :]
                        dresidual += residual_k2[None, :] * deviation + residual_k3[None, :]
                dresidual = dresidual.to(dresidual_ptr.dtype.element_ty)
                tl.store(dresidual_ptr + offsets, dresidual, mask=valid)
            if dx_ptr is not None:
                dx = scale[None, :] * g.to(ACC_DTYPE)
                if TRAINING:
                    dx += k2[None, :] * (x.to(ACC_DTYPE) - mean[None, :]) + k3[None, :]
                tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=valid)


@triton.jit
def sum_partials(partials_ptr, plane, channels, n_splits, n_channels, BLOCK_SPLITS: tl.constexpr):
    """A sum over all positions of channels."""
    partials = load_partials(partials_ptr, plane, channels, n_splits, n_channels, BLOCK_SPLITS)
    return tl.sum(partials, axis=0)


@triton.jit
def finish_sums(
    dbias, sum_gx, scale, rstd, dweight_ptr, dbias_ptr, channels, n_channels, n_positions
):
    """k2 and k3 of channels; the first program stores dweight and dbias."""
    dweight = rstd * sum_gx
    if tl.program_id(1) == 0:
        if dweight_ptr is not None:
            tl.store(dweight_ptr + channels, dweight, mask=channels < n_channels)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + channels, dbias, mask=channels < n_channels)
    return divide(-scale * rstd * dweight, n_positions), divide(-scale * dbias, n_positions)


def bwd_apply(
    dout: torch.Tensor,
    x: torch.Tensor | None,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    dx: torch.Tensor | None,
    dresidual: torch.Tensor | None,
    view: View,
    plan: Plan,
    relu: bool,
    training: bool = False,
    partials: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
    parameters: Sequence[torch.Tensor | None] = (None, None),
    dparameters: Sequence[torch.Tensor | None] = (None, None),
    means: torch.Tensor | None = None,
) -> None:
    """Fill those of dx, dresidual and dparameters that are given.

    Partials are needed for dparameters, and in training they or means for dx. Parameters are weight
    and bias, and with a residual those of its norm; statistics are then (2, 2, n_channels).
    """
    n_programs = plan.n_programs if dx is not None or dresidual is not None else 1
    # The bias of the residual's norm decided on the mask alone, and there is one.
    weight, bias, residual_weight = (*parameters, None)[:3]
    batch_norm_bwd_apply_kernel[plan.channel_blocks, n_programs](
        dout, x, residual, mask, dx, dresidual, partials, means,
        statistics, weight, bias, residual_weight, *(*dparameters, None, None)[:4],
        plan.bwd_splits, *view,
        RELU=relu, TRAINING=training, BLOCK_SPLITS=padded(plan.bwd_splits),
        **plan.constants(dout), maxnreg=plan.max_registers,
    )  # fmt: skip

"""bwd_apply: dx = a * g + k2 * (x - mean) + k3 and dresidual = g; also dweight and dbias.

g is dout where ReLU passed, else 0. Reads dout, the mask, and x in training or to find the
threshold again; writes what is asked for: 3N, or 4N + m. Tile [BLOCK_POSITIONS, BLOCK_CHANNELS],
grid (channel blocks, programs). Asked for dresidual alone it is the whole of add_relu's backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .bwd_reduce import load_threshold
from .launch import SIZES, Plan, View
from .tile import load_channels, load_partials, tile_offsets, whole_vectors


@triton.jit(do_not_specialize=SIZES)
def batch_norm_bwd_apply_kernel(
    dout_ptr, x_ptr, mask_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, partials_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    n_splits, n_outer, n_channels, n_inner,
    RELU: tl.constexpr, TRAINING: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INDEX_DTYPE: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Outputs that are not wanted are None, and so is what only they would need."""
    n_channels, n_inner = whole_vectors(n_channels, n_inner, VEC, CHANNELS_LAST)
    channels = tl.program_id(0).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    program, n_programs = tl.program_id(1), tl.num_programs(1)

    mean = load_channels(mean_ptr, channels, n_channels, 0.0, ACC_DTYPE)
    rstd = load_channels(rstd_ptr, channels, n_channels, 1.0, ACC_DTYPE)
    a = load_channels(weight_ptr, channels, n_channels, 1.0, ACC_DTYPE) * rstd
    bias = load_channels(bias_ptr, channels, n_channels, 0.0, ACC_DTYPE)
    if partials_ptr is not None:
        sums_g = load_partials(partials_ptr, 0, channels, n_splits, n_channels, BLOCK_SPLITS)
        sums_gx = load_partials(partials_ptr, 1, channels, n_splits, n_channels, BLOCK_SPLITS)
        dbias = tl.sum(sums_g, axis=0)
        dweight = rstd * tl.sum(sums_gx, axis=0)
        if program == 0:
            if dweight_ptr is not None:
                tl.store(dweight_ptr + channels, dweight, mask=channels < n_channels)
            if dbias_ptr is not None:
                tl.store(dbias_ptr + channels, dbias, mask=channels < n_channels)
        if TRAINING and dx_ptr is not None:
            n_positions = (tl.cast(n_outer, INDEX_DTYPE) * n_inner).to(ACC_DTYPE)
            k2 = -a * rstd * dweight / n_positions
            k3 = -a * dbias / n_positions

    if dx_ptr is not None or dresidual_ptr is not None:
        # From the last tile to the first: the end of what bwd_reduce read is still in L2.
        pitch = n_inner if mask_ptr is None or CHANNELS_LAST else tl.cdiv(n_inner, 8) * 8
        n_tiles = tl.cdiv(tl.cast(n_outer, INDEX_DTYPE) * pitch, BLOCK_POSITIONS)
        for step in range(program, n_tiles, n_programs):
            tile = n_tiles - 1 - step
            offsets, valid = tile_offsets(
                tile, channels, n_outer, n_channels, n_inner, pitch, BLOCK_POSITIONS, CHANNELS_LAST
            )
            g = tl.load(dout_ptr + offsets, mask=valid, other=0.0)
            x = g if x_ptr is None else tl.load(x_ptr + offsets, mask=valid, other=0.0)
            if RELU:
                passes = load_threshold(
                    mask_ptr, x, mean, a, bias, tile, n_outer, n_channels, n_inner,
                    BLOCK_POSITIONS, BLOCK_CHANNELS, CHANNELS_LAST,
                )  # fmt: skip
                g = tl.where(passes, g, 0.0)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + offsets, g, mask=valid)
            if dx_ptr is not None:
                dx = a[None, :] * g.to(ACC_DTYPE)
                if TRAINING:
                    dx += k2[None, :] * (x.to(ACC_DTYPE) - mean[None, :]) + k3[None, :]
                tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=valid)


def bwd_apply(
    dout: torch.Tensor,
    x: torch.Tensor | None,
    mask: torch.Tensor | None,
    dx: torch.Tensor | None,
    dresidual: torch.Tensor | None,
    view: View,
    plan: Plan,
    relu: bool,
    training: bool = False,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    rstd: torch.Tensor | None = None,
    partials: torch.Tensor | None = None,
    dweight: torch.Tensor | None = None,
    dbias: torch.Tensor | None = None,
) -> None:
    """Fill those of dx, dresidual, dweight and dbias that are given.

    Partials are needed for dweight and dbias, and in training for dx.
    """
    n_programs = plan.n_programs if dx is not None or dresidual is not None else 1
    batch_norm_bwd_apply_kernel[plan.channel_blocks, n_programs](
        dout, x, mask, weight, bias, mean, rstd, partials,
        dx, dresidual, dweight, dbias,
        plan.n_splits, *view,
        RELU=relu, TRAINING=training, BLOCK_SPLITS=plan.block_splits, **plan.constants(dout),
    )  # fmt: skip

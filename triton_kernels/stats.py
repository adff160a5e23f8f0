"""stats: x → partial moments per channel. Reads x once; tile [BLOCK_POSITIONS, BLOCK_CHANNELS].

Grid (channel blocks, tensors, splits): the residual too where that is normalised, both at the same
pace, so that the ends of both are in L2 for apply. A split leaves the mean, relative to
load_origin, and the sum of squared deviations M2 of its own positions; whoever needs the moments of
whole channels merges them with merge_moments, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import SIZES, Plan, View
from .tile import divide, load_partials, tile_offsets, whole_vectors


@triton.jit(do_not_specialize=SIZES)
def batch_norm_stats_kernel(
    x_ptr, residual_ptr, partials_ptr, n_outer, n_channels, n_inner,
    ACC_DTYPE: tl.constexpr, INDEX_DTYPE: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Fills partials, [tensors, 2, n_splits, n_channels]: means and M2."""
    n_channels, n_inner = whole_vectors(n_channels, n_inner, VEC, CHANNELS_LAST)
    channels = tl.program_id(0).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    split, n_splits = tl.program_id(2), tl.num_programs(2)
    if residual_ptr is not None:
        tensor = tl.program_id(1)
        x_ptr = tl.where(tensor == 0, x_ptr, residual_ptr)
        partials_ptr += tensor.to(tl.int64) * 2 * n_splits * n_channels
    n_positions = tl.cast(n_outer, INDEX_DTYPE) * n_inner
    n_tiles = tl.cdiv(n_positions, BLOCK_POSITIONS)

    # Sums are taken about the mean of the split's first tile. As that tile is part of the split,
    # (mean - pivot)^2 <= var * (tiles - 1): the subtraction at the end loses at most log2(tiles)
    # bits of M2, whatever the data.
    offsets, valid = tile_offsets(
        split, channels, n_outer, n_channels, n_inner, n_inner, BLOCK_POSITIONS, CHANNELS_LAST
    )
    x = tl.load(x_ptr + offsets, mask=valid, other=0.0).to(ACC_DTYPE)
    first_count = tl.minimum(n_positions - split * BLOCK_POSITIONS, BLOCK_POSITIONS).to(ACC_DTYPE)
    pivot = finite_or_zero(divide(tl.sum(x, axis=0), first_count))
    deviation = tl.where(valid, x - pivot[None, :], 0.0)
    total = deviation
    squares = deviation * deviation
    for tile in range(split + n_splits, n_tiles, n_splits):
        offsets, valid = tile_offsets(
            tile, channels, n_outer, n_channels, n_inner, n_inner, BLOCK_POSITIONS, CHANNELS_LAST
        )
        x = tl.load(x_ptr + offsets, mask=valid, other=0.0).to(ACC_DTYPE)
        deviation = tl.where(valid, x - pivot[None, :], 0.0)
        total += deviation
        squares += deviation * deviation

    count = split_counts(split, n_splits, n_positions, BLOCK_POSITIONS).to(ACC_DTYPE)
    total = tl.sum(total, axis=0)
    from_pivot = divide(total, count)
    m2 = tl.sum(squares, axis=0) - total * from_pivot
    m2 = tl.where(m2 < 0, 0.0, m2)
    origin = load_origin(x_ptr, channels, n_channels, n_inner, ACC_DTYPE)
    partials_ptr += split * n_channels + channels
    tl.store(partials_ptr, pivot - origin + from_pivot, mask=channels < n_channels)
    tl.store(partials_ptr + n_splits * n_channels, m2, mask=channels < n_channels)


@triton.jit
def merge_moments(
    x_ptr, partials_ptr, channels, n_splits, n_channels, n_inner, n_positions, dtype: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Mean and M2 of whole channels, [len(channels)]: Chan's formula, for all splits at once."""
    means = load_partials(partials_ptr, 0, channels, n_splits, n_channels, BLOCK_SPLITS)
    splits = tl.arange(0, BLOCK_SPLITS)
    counts = split_counts(splits, n_splits, n_positions, BLOCK_POSITIONS)
    counts = tl.where(splits < n_splits, counts, 0).to(dtype)[:, None]
    mean = divide(tl.sum(counts * means, axis=0), n_positions.to(dtype))
    deviation = means - mean[None, :]
    m2s = load_partials(partials_ptr, 1, channels, n_splits, n_channels, BLOCK_SPLITS)
    m2 = tl.sum(m2s + counts * deviation * deviation, axis=0)
    return load_origin(x_ptr, channels, n_channels, n_inner, dtype) + mean, m2


@triton.jit
def load_origin(x_ptr, channels, n_channels, n_inner, dtype: tl.constexpr):
    """The point that splits give their means relative to: the first x of each channel.

    With mean >> std, absolute means would be rounded by more than they differ.
    """
    return finite_or_zero(
        tl.load(x_ptr + channels * n_inner, mask=channels < n_channels, other=0.0).to(dtype)
    )


@triton.jit
def split_counts(split, n_splits, n_positions, BLOCK_POSITIONS: tl.constexpr):
    """Positions that a split saw: whole tiles, less what the last tile of all lacks."""
    n_tiles = tl.cdiv(n_positions, BLOCK_POSITIONS)
    missing = tl.where(
        split == (n_tiles - 1) % n_splits, n_tiles * BLOCK_POSITIONS - n_positions, 0
    )
    return tl.cdiv(n_tiles - split, n_splits) * BLOCK_POSITIONS - missing


@triton.jit
def finite_or_zero(x):
    """A point that can be subtracted: about an infinite one, the mean of ±Inf would be NaN."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


def stats(
    x: torch.Tensor, residual: torch.Tensor | None, partials: torch.Tensor, view: View, plan: Plan
) -> None:
    """Fill partials, (2, n_splits, n_channels) in the statistics dtype.

    With a residual it is (2, 2, n_splits, n_channels), those of x first.
    """
    n_tensors = 1 if residual is None else 2
    batch_norm_stats_kernel[plan.channel_blocks, n_tensors, plan.stats_splits](
        x, residual, partials, *view,
        **plan.constants(x) | {"BLOCK_POSITIONS": plan.stats_positions},
    )  # fmt: skip

"""The moments of a synchronised norm: the rows that ranks exchange, and the statistics from them.

A row is (2 * n_channels + 1,): the mean of each channel, then M2, the sum of squared deviations, of
each, then the number of elements of a channel. A program takes BLOCK_CHANNELS channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import SIZES, Plan, View, padded
from .stats import finite_or_zero, merge_moments
from .tile import divide, update_running

BLOCK_CHANNELS = 128


@triton.jit(do_not_specialize=SIZES)
def batch_norm_moments_kernel(
    x_ptr, partials_ptr, moments_ptr, n_splits, n_outer, n_channels, n_inner,
    ACC_DTYPE: tl.constexpr, INDEX_DTYPE: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, STATS_POSITIONS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """From what stats has left of x."""
    channels = tl.program_id(0).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    n_positions = tl.cast(n_outer, INDEX_DTYPE) * n_inner
    mean, m2 = merge_moments(
        x_ptr, partials_ptr, channels, n_splits, n_channels, n_inner, n_positions,
        ACC_DTYPE, STATS_POSITIONS, BLOCK_SPLITS,
    )  # fmt: skip
    tl.store(moments_ptr + channels, mean, mask=channels < n_channels)
    tl.store(moments_ptr + n_channels + channels, m2, mask=channels < n_channels)
    if tl.program_id(0) == 0:
        tl.store(moments_ptr + 2 * n_channels, n_positions.to(ACC_DTYPE))


@triton.jit(do_not_specialize=["n_ranks", "n_channels"])
def batch_norm_merge_kernel(
    moments_ptr, running_mean_ptr, running_var_ptr, momentum: tl.float64,
    mean_ptr, var_ptr, count_ptr, n_ranks, n_channels, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Chan's formula over the rows of all ranks, for all at once."""
    channels = tl.program_id(0).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    dtype: tl.constexpr = moments_ptr.dtype.element_ty
    # Means are added up relative to the first that there is: with mean >> std, absolute ones would
    # be rounded by more than they differ.
    count = tl.zeros([], dtype)
    origin = tl.zeros([BLOCK_CHANNELS], dtype)
    total = tl.zeros([BLOCK_CHANNELS], dtype)
    for rank in range(n_ranks):
        part_mean, _, part_count = load_moments(moments_ptr, rank, channels, n_channels)
        origin = tl.where(count == 0, finite_or_zero(part_mean), origin)
        total += part_count * (part_mean - origin)
        count += part_count
    from_origin = divide(total, count)
    m2 = tl.zeros([BLOCK_CHANNELS], dtype)
    for rank in range(n_ranks):
        part_mean, part_m2, part_count = load_moments(moments_ptr, rank, channels, n_channels)
        deviation = part_mean - origin - from_origin
        m2 += part_m2 + part_count * deviation * deviation

    mean = origin + from_origin
    if running_mean_ptr is not None:
        update_running(running_mean_ptr, mean, momentum, channels, n_channels)
    if running_var_ptr is not None:
        update_running(running_var_ptr, divide(m2, count - 1), momentum, channels, n_channels)
    tl.store(mean_ptr + channels, mean, mask=channels < n_channels)
    tl.store(var_ptr + channels, divide(m2, count), mask=channels < n_channels)
    if tl.program_id(0) == 0:
        tl.store(count_ptr, count)


@triton.jit
def load_moments(moments_ptr, rank, channels, n_channels):
    """Mean and M2 of channels, [len(channels)], and the count: those of a rank."""
    moments_ptr += tl.cast(rank, tl.int64) * (2 * n_channels + 1)
    valid = channels < n_channels
    mean = tl.load(moments_ptr + channels, mask=valid, other=0.0)
    m2 = tl.load(moments_ptr + n_channels + channels, mask=valid, other=0.0)
    return mean, m2, tl.load(moments_ptr + 2 * n_channels)


def moments(
    x: torch.Tensor, partials: torch.Tensor, row: torch.Tensor, view: View, plan: Plan
) -> None:
    """Fill a row of moments from the partials that stats has left."""
    constants = plan.constants(x)
    names = "ACC_DTYPE", "INDEX_DTYPE", "BLOCK_CHANNELS", "num_warps"
    batch_norm_moments_kernel[plan.channel_blocks,](
        x, partials, row, plan.stats_splits, *view,
        STATS_POSITIONS=plan.stats_positions, BLOCK_SPLITS=padded(plan.stats_splits),
        **{name: constants[name] for name in names},
    )  # fmt: skip


def merge(
    moments: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    mean: torch.Tensor,
    var: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """Fill mean, var and count, and update the running statistics that are given."""
    n_channels = mean.shape[0]
    batch_norm_merge_kernel[triton.cdiv(n_channels, BLOCK_CHANNELS),](
        moments, running_mean, running_var, momentum, mean, var, count,
        moments.shape[0], n_channels, BLOCK_CHANNELS=BLOCK_CHANNELS,
    )  # fmt: skip

"""What the host decides before a launch: how a tensor is seen, and the tile and grid for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Never specialised on: alignment reaches a kernel through VEC, so one binary serves many shapes.
SIZES = ["n_splits", "n_outer", "n_channels", "n_inner"]

WARPS = 8
VECTOR_BYTES = 16
VECTORS_PER_THREAD = 2  # independent 16-byte loads in flight per thread and tensor
SMS = 128  # of an H100's 132; a constant: sums do not depend on the GPU
MAX_SPLITS = 128  # partial results per channel, which every program of the second stage reads


class View(NamedTuple):
    """A dense activation (N, C, *) as (n_outer, n_channels, n_inner), n_inner contiguous in memory.

    Channels-last memory is (N * spatial, C, 1), channels-first memory (N, C, spatial).
    """

    n_outer: int
    n_channels: int
    n_inner: int

    @classmethod
    def of(cls, x: torch.Tensor) -> View:
        """The view that batch norm takes of x, shape (N, C, *)."""
        n_outer, n_channels = x.shape[:2]
        n_inner = math.prod(x.shape[2:])
        if x.is_contiguous():
            return cls(n_outer, n_channels, n_inner)
        return cls(n_outer * n_inner, n_channels, 1)

    @classmethod
    def flat(cls, x: torch.Tensor) -> View:
        """The view of an elementwise op: one row, in the order of memory."""
        return cls(1, x.numel(), 1)

    def gap(self, out: torch.Tensor) -> int | None:
        """What out, of this view but for it, leaves between two outer indices; None if nothing."""
        dense = self.n_channels * self.n_inner
        if self.n_outer == 1:
            return None
        strides = zip(out.shape, out.stride(), strict=True)
        return min(d for size, d in strides if size > 1 and d >= dense) - dense or None

    @property
    def mask_shape(self) -> tuple[int, int]:
        """(n_rows, bytes a row) of the 1-bit mask; a row is all channels of a pixel, or a plane."""
        if self.n_inner == 1:
            return self.n_outer, triton.cdiv(self.n_channels, 8)
        return self.n_outer * self.n_channels, triton.cdiv(self.n_inner, 8)


@dataclass(frozen=True)
class Plan:
    """Launch parameters of all stages of a call: a tile is [block_positions, block_channels].

    A position is one (outer, inner) pair, so a channel has n_outer * n_inner of them. Programs take
    tiles in turn (program, program + n_programs, ...), so that all are near one place in memory.
    """

    vec: int  # elements per memory access that the shape allows
    channels_last: bool
    long_index: bool  # more positions than 32 bits count; offsets have 64 bits in any case
    block_positions: int
    block_channels: int
    stats_positions: int  # a program reads one tensor: a longer tile keeps as many bytes in flight
    channel_blocks: int
    stats_splits: int  # programs per channel block and tensor in stats
    bwd_splits: int  # programs per channel block in bwd_reduce
    n_programs: int  # programs per channel block in an apply
    num_warps: int
    max_registers: int | None  # of all kernels but stats

    def constants(self, x: torch.Tensor) -> dict[str, Any]:
        """The constexpr arguments and compiler options common to all kernels."""
        return {
            "ACC_DTYPE": tl.float64 if x.dtype == torch.float64 else tl.float32,
            "INDEX_DTYPE": tl.int64 if self.long_index else tl.int32,
            "VEC": self.vec,
            "CHANNELS_LAST": self.channels_last,
            "BLOCK_POSITIONS": self.block_positions,
            "BLOCK_CHANNELS": self.block_channels,
            "num_warps": self.num_warps,
        }


def padded(n_splits: int) -> int:
    """The size that kernels pad n_splits to: one of two, so that there are two binaries."""
    return 16 if n_splits <= 16 else MAX_SPLITS


def statistics_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of mean, rstd and all sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@lru_cache(maxsize=4096)
def plan(view: View, itemsize: int, n_norms: int = 1) -> Plan:
    """Pick tile and grid, from the shape alone."""
    n_outer, n_channels, n_inner = view
    channels_last = n_inner == 1
    n_positions = n_outer * n_inner

    vector = VECTOR_BYTES // itemsize
    vec = math.gcd(n_channels if channels_last else n_inner, vector)
    elements = 32 * WARPS * VECTORS_PER_THREAD * vector
    if vec < vector:
        elements //= 2  # an address for every element: a full tile spills
    if channels_last:
        # Half the channels, so that C = 64 still gives 2 * MAX_SPLITS programs; at most 64, in bf16
        # a line of 128 bytes, or half of it where two norms need twice the registers a channel. An
        # elementwise op is one row, and a tile a piece of it.
        widest = 64 // n_norms if n_outer > 1 else elements
        block_channels = min(widest, max(8, triton.next_power_of_2(n_channels) // 2))
        smallest = 1
    else:
        block_channels, smallest = 1, 8  # positions of one mask byte
    largest = max(smallest, triton.next_power_of_2(n_positions))
    block_positions = min(elements // block_channels, largest)
    stats_positions = min(2 * elements // block_channels, largest)
    threads = WARPS * 32 * block_positions * block_channels // elements

    # As many programs as an SM holds at once, or the tensor would be walked through twice, and the
    # second stage not begin with what is left in L2. In bf16 channels-last, stats takes 96
    # registers and two norms up to 123: two fit. The others take 73 to 94, and without a spill 80
    # if told so: three fit. Channels-first they take 40 to 50, and stats 94. fp64, which is there
    # for gradcheck, takes what it needs, and so do accesses of single elements.
    of_stats, of_others = (2, 3 if n_norms == 1 else 2) if channels_last else (4, 4)
    is_held = channels_last and n_norms == 1 and vec == vector and itemsize < 8
    channel_blocks = triton.cdiv(n_channels, block_channels)

    def programs(per_sm: int) -> int:
        return max(1, SMS * per_sm // channel_blocks)

    def splits(positions: int, per_sm: int) -> int:
        most = min(MAX_SPLITS, programs(per_sm))
        return _even_share(triton.cdiv(n_positions, positions), most)

    return Plan(
        vec=vec,
        channels_last=channels_last,
        long_index=n_outer * (n_inner + 7) + stats_positions >= 2**31,
        block_positions=block_positions,
        block_channels=block_channels,
        stats_positions=stats_positions,
        channel_blocks=channel_blocks,
        stats_splits=splits(stats_positions, of_stats // n_norms),
        bwd_splits=splits(block_positions, of_others),
        n_programs=_even_share(triton.cdiv(n_positions, block_positions), programs(of_others)),
        num_warps=min(WARPS, max(1, threads // 32)),
        max_registers=80 if is_held else None,
    )


def _even_share(n_tiles: int, most: int) -> int:
    """The programs, at most `most`, that share n_tiles within one tile of each other."""
    return triton.cdiv(n_tiles, triton.cdiv(n_tiles, most))

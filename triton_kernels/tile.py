"""What the kernels share: where a tile lies, the ReLU threshold and its bits, partial results."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def whole_vectors(n_channels, n_inner, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The sizes unchanged: VEC divides the contiguous one, and so the compiler learns of it."""
    if CHANNELS_LAST:
        return n_channels // VEC * VEC, 1
    else:
        return n_channels, n_inner // VEC * VEC


@triton.jit
def n_octets(n):
    """ceil(n / 8) of a size, to which 7 cannot always be added in 32 bits."""
    return (n - 1) // 8 + 1


@triton.jit
def in_octets(n, INDEX_DTYPE: tl.constexpr):
    """The least multiple of 8 that is not below a size."""
    return n_octets(tl.cast(n, INDEX_DTYPE)) * 8


@triton.jit
def divide(a, b):
    """The quotient to nearest: in fp32 the operator may be off by two units in the last place."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def tile_offsets(
    tile, channels, n_outer, n_channels, n_inner, pitch,
    BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Offsets (int64) and validity, both [BLOCK, len(channels)], of a tile's positions in channels.

    Position p is (outer, inner) = divmod(p, pitch); a pitch above n_inner pads planes to whole mask
    bytes. The elements of a vector share the division.
    """
    position = tile * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        valid = (position < n_outer)[:, None] & (channels < n_channels)[None, :]
        offsets = position.to(tl.int64)[:, None] * n_channels + channels[None, :]
    else:
        outer = position // pitch
        inner = position % pitch
        valid = ((outer < n_outer) & (inner < n_inner))[:, None] & (channels < n_channels)[None, :]
        plane = outer.to(tl.int64)[:, None] * n_channels + channels[None, :]
        offsets = plane * n_inner + inner[:, None]
    return offsets, valid


@triton.jit
def mask_offsets(
    tile, n_outer, n_channels, n_inner,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Offsets and validity of a tile's mask bytes, of which there is one for eight neighbours.

    [BLOCK_POSITIONS, BLOCK_CHANNELS // 8] channels-last, [BLOCK_POSITIONS // 8, 1] channels-first.
    """
    block = tl.program_id(0).to(tl.int64)
    if CHANNELS_LAST:
        channels = block * (BLOCK_CHANNELS // 8) + tl.arange(0, BLOCK_CHANNELS // 8)
        n_bytes = n_octets(n_channels)
        return tile_offsets(tile, channels, n_outer, n_bytes, 1, 1, BLOCK_POSITIONS, True)
    else:
        n_bytes = n_octets(n_inner)
        channels = block + tl.arange(0, 1)
        return tile_offsets(
            tile, channels, n_outer, n_channels, n_bytes, n_bytes, BLOCK_POSITIONS // 8, False
        )


@triton.jit
def pack_bits(bits, CHANNELS_LAST: tl.constexpr):
    """Eight neighbours in memory to a byte, the first in the lowest bit; shapes as mask_offsets."""
    POSITIONS: tl.constexpr = bits.shape[0] if CHANNELS_LAST else bits.shape[0] // 8
    CHANNELS: tl.constexpr = bits.shape[1] // 8 if CHANNELS_LAST else 1
    octets = tl.reshape(bits.to(tl.int32), [POSITIONS, CHANNELS, 8])
    return tl.sum(octets << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(octets, BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """The inverse of pack_bits: bool, [BLOCK_POSITIONS, BLOCK_CHANNELS]."""
    bits = (octets.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, [BLOCK_POSITIONS, BLOCK_CHANNELS]) != 0


@triton.jit
def relu_passes(value, dtype: tl.constexpr):
    """What ReLU lets through: not (value <= 0), so NaN too, of the value as it is stored."""
    stored = value.to(dtype).to(value.dtype)
    return (stored <= 0) == 0


@triton.jit
def load_last(ptrs, valid):
    """What is not read again; what is not valid is 0."""
    return tl.load(ptrs, mask=valid, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_channels(ptr, channels, n_channels, absent: tl.constexpr, dtype: tl.constexpr):
    """A per-channel parameter, [len(channels)], or its neutral value where there is none."""
    if ptr is None:
        return tl.full([channels.shape[0]], absent, dtype)
    else:
        return tl.load(ptr + channels, mask=channels < n_channels, other=0.0).to(dtype)


@triton.jit
def load_statistics(
    statistics_ptr, row: tl.constexpr, channels, n_channels, dtype: tl.constexpr
):  # fmt: skip
    """Row 2k is the mean and 2k + 1 the rstd of norm k, [len(channels)]; 0 and 1 without any."""
    if statistics_ptr is None:
        return tl.full([channels.shape[0]], row % 2, dtype)
    else:
        offsets = n_channels.to(tl.int64) * row + channels
        return tl.load(statistics_ptr + offsets, mask=channels < n_channels, other=0.0)


@triton.jit
def update_running(ptr, batch, momentum, channels, n_channels):
    """(1 - momentum) * running + momentum * batch, in place.

    In fp64, as momentum is; by way of the dtype of the sums, as in torch, to the buffer's.
    """
    valid = channels < n_channels
    running = tl.load(ptr + channels, mask=valid, other=0.0).to(batch.dtype)
    running = (1 - momentum) * running + momentum * batch
    tl.store(ptr + channels, running.to(batch.dtype).to(ptr.dtype.element_ty), mask=valid)


@triton.jit
def uniform(values):
    """Values a channel; of a single channel, laid out so that a tile of them takes one register."""
    if values.shape[0] == 1:
        return tl.full([1], tl.sum(values, axis=0), values.dtype)
    else:
        return values


@triton.jit
def normalise(x, mean, scale, bias):
    """(x - mean) * scale + bias, from which backward recomputes forward's threshold bit for bit.

    Not scale * x + b: with mean >> std that b would cancel nearly all of scale * x.
    """
    return tl.fma(x - mean[None, :], scale[None, :], bias[None, :])


@triton.jit
def load_partials(partials_ptr, plane, channels, n_splits, n_channels, BLOCK_SPLITS: tl.constexpr):
    """A plane of partials [2, n_splits, n_channels], padded to [BLOCK_SPLITS, len(channels)]."""
    splits = tl.arange(0, BLOCK_SPLITS)
    offsets = (plane * n_splits + splits)[:, None] * n_channels + channels[None, :]
    valid = (splits < n_splits)[:, None] & (channels < n_channels)[None, :]
    return tl.load(partials_ptr + offsets, mask=valid, other=0.0)

"""Dense tensors: what kernels take, made of any strided tensor."""

from itertools import pairwise

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def dense(x: Tensor) -> Tensor:
    """`x` if it fills its memory as `(N, C, *)` or `(N, *, C)`, else a copy that does."""
    if x.is_contiguous():
        return x
    memory_format = _CHANNELS_LAST.get(x.dim())
    if memory_format is None:
        # (N, L, C) read as (N, C, L), the usual 1-D network.
        if x.dim() == 3 and x.transpose(1, 2).is_contiguous():
            return x
        return x.contiguous()
    if x.is_contiguous(memory_format=memory_format):
        return x
    # A slice of a channels-last tensor stays one, as in F.batch_norm.
    strides = [x.stride(d) for d in (0, *range(2, x.dim()), 1)]
    channels_last = strides[-1] == 1 and all(a >= b for a, b in pairwise(strides))
    channels_last = channels_last and strides[-2] >= x.shape[1]
    return x.contiguous(memory_format=memory_format if channels_last else torch.contiguous_format)


def empty_laid_out_like(x: Tensor, n_channels: int) -> Tensor:
    """An uninitialised tensor like the dense `x`, but for its number of channels; no view."""
    shape = (x.shape[0], n_channels, *x.shape[2:])
    if x.is_contiguous():
        return x.new_empty(shape)
    strides, stride = [1] * x.dim(), n_channels
    for d in (*range(x.dim() - 1, 1, -1), 0):
        strides[d] = stride
        stride *= shape[d]
    return x.new_empty_strided(shape, strides)


def strided(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`tensor`, or a copy of it with these strides, those of a dense tensor."""
    if torch.compiler.is_compiling():
        # Without a look at those of `tensor`: a gradient has none while dynamo traces, which, asked
        # for them, would have every gradient of the graph copied to be contiguous.
        if len(strides) < 3 or strides[1] != 1:
            return tensor.contiguous()
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if not tensor._is_zerotensor() and (  # that has no memory; torch.sgn has such a gradient
        tensor.stride() == strides
        or all(
            size == 1 or have == want
            for size, have, want in zip(tensor.shape, tensor.stride(), strides, strict=True)
        )
    ):
        return tensor
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)

"""The four raw ops, with the schemas of fusedskip.ops: allocate, then at most two launches."""

from __future__ import annotations

import torch
from torch import Tensor

from .apply import apply
from .bwd_apply import bwd_apply
from .bwd_reduce import bwd_reduce
from .launch import View, plan, statistics_dtype
from .stats import stats


def add_relu(x: Tensor, residual: Tensor, save_mask: bool) -> tuple[Tensor, Tensor]:
    """Return relu(x + residual) and, if saved, the mask of where ReLU passed. Any shape."""
    out = torch.empty_like(x)
    view = View.flat(x)
    mask = x.new_empty(view.mask_shape if save_mask else 0, dtype=torch.uint8)
    with torch.cuda.device_of(x):
        apply(
            x, residual, out, mask if save_mask else None, view, plan(view, x.itemsize), relu=True
        )
    return out, mask


def add_relu_backward(dout: Tensor, mask: Tensor) -> Tensor:
    """Return dout where ReLU passed, else 0: the gradient of both x and residual."""
    dx = torch.empty_like(dout)
    view = View.flat(dout)
    with torch.cuda.device_of(dout):
        bwd_apply(dout, None, mask, None, dx, view, plan(view, dout.itemsize), relu=True)
    return dx


def batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return relu(bn(x) + residual), mask, mean (C,) and rstd (C,); x is (N, C, *).

    Training updates the running buffers.
    """
    view = View.of(x)
    chosen = plan(view, x.itemsize)
    out = torch.empty_like(x)
    mask = x.new_empty(view.mask_shape if save_mask else 0, dtype=torch.uint8)
    dtype = statistics_dtype(x)
    mean = x.new_empty(view.n_channels, dtype=dtype)
    rstd = x.new_empty(view.n_channels, dtype=dtype)
    partials = x.new_empty((2, chosen.n_splits, view.n_channels), dtype=dtype) if training else None
    with torch.cuda.device_of(x):
        if partials is not None:
            stats(x, partials, view, chosen)
        apply(
            x, residual, out, mask if save_mask else None, view, chosen, relu,
            weight, bias, running_mean, running_var, partials, mean, rstd, momentum, eps,
        )  # fmt: skip
    return out, mask, mean, rstd


def batch_norm_backward(
    dout: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    relu: bool,
    need_dx: bool,
    need_dresidual: bool,
    need_dparams: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dresidual, dweight (C,) and dbias (C,); what is not needed has shape (0,).

    Without a mask, the threshold of relu is recomputed from x.
    """
    view = View.of(x)
    chosen = plan(view, x.itemsize)
    dx = torch.empty_like(x) if need_dx else None
    dresidual = torch.empty_like(x) if need_dresidual else None
    dweight = torch.empty_like(weight) if need_dparams and weight is not None else None
    dbias = torch.empty_like(bias) if need_dparams and bias is not None else None
    has_dparams = dweight is not None or dbias is not None
    with torch.cuda.device_of(x):
        partials = None
        if has_dparams or (training and need_dx):
            shape = (2, chosen.n_splits, view.n_channels)
            partials = x.new_empty(shape, dtype=statistics_dtype(x))
            bwd_reduce(dout, x, mask, weight, bias, mean, rstd, partials, view, chosen, relu)
        if has_dparams or need_dx or need_dresidual:
            bwd_apply(
                dout, x, mask, dx, dresidual, view, chosen, relu,
                training, weight, bias, mean, rstd, partials, dweight, dbias,
            )  # fmt: skip
    dx, dresidual, dweight, dbias = (
        x.new_empty(0) if gradient is None else gradient
        for gradient in (dx, dresidual, dweight, dbias)
    )
    return dx, dresidual, dweight, dbias

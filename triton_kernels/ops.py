"""The raw ops, with the schemas of fusedskip.ops: allocate, then at most two launches."""

from __future__ import annotations

import torch
from torch import Tensor

from .apply import Norm, apply
from .bwd_apply import bwd_apply
from .bwd_reduce import bwd_reduce
from .launch import View, plan, statistics_dtype
from .moments import merge, moments
from .stats import stats


def add_relu(
    x: Tensor, residual: Tensor, relu_first: bool, save_mask: bool
) -> tuple[Tensor, Tensor]:
    """Return relu(x + residual), or relu(x) + residual, and if saved the mask of where ReLU passed.

    Any shape.
    """
    out = torch.empty_like(x)
    view = View.flat(x)
    mask = x.new_empty(view.mask_shape if save_mask else 0, dtype=torch.uint8)
    with torch.cuda.device_of(x):
        apply(
            x, residual, out, mask if save_mask else None, view, plan(view, x.itemsize),
            relu=not relu_first, relu_first=relu_first,
        )  # fmt: skip
    return out, mask


def add_relu_backward(dout: Tensor, mask: Tensor) -> Tensor:
    """Return dout where ReLU passed, else 0: the gradient of what ReLU was given."""
    dx = torch.empty_like(dout)
    view = View.flat(dout)
    with torch.cuda.device_of(dout):
        bwd_apply(dout, None, None, mask, None, dx, view, plan(view, dout.itemsize), relu=True)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return relu(bn(x) + residual), mask, and statistics (2, C): mean, rstd; x is (N, C, *).

    Training updates the running buffers. Evaluation without them has mean 0 and variance 1.
    """
    norm = Norm(weight, bias, running_mean, running_var, momentum, eps)
    return _forward(x, residual, norm, None, training, relu, save_mask)


def batch_norm_inference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """Return relu(bn(x) + residual) by the running statistics."""
    norm = Norm(weight, bias, running_mean, running_var, 0.0, eps)
    return _forward(x, residual, norm, None, False, relu, False)[0]


def batch_norm_relu_into(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    out: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Fill out, part of a wider tensor, with relu(bn(x)); return its statistics (2, C)."""
    norm = Norm(weight, bias, running_mean, running_var, momentum, eps)
    return _forward(x, None, norm, None, training, True, False, out)[2]


def dual_batch_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_running_mean: Tensor | None,
    residual_running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual_momentum: float,
    residual_eps: float,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return relu(bn(x) + bn'(residual)), mask, and statistics (2, 2, C), those of x first."""
    norm = Norm(weight, bias, running_mean, running_var, momentum, eps)
    residual_norm = Norm(
        residual_weight, residual_bias, residual_running_mean, residual_running_var,
        residual_momentum, residual_eps,
    )  # fmt: skip
    return _forward(x, residual, norm, residual_norm, training, True, save_mask)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    residual_norm: Norm | None,
    training: bool,
    relu: bool,
    save_mask: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_contiguous(*norm[:4], *(residual_norm or ())[:4])
    view = View.of(x)
    norms = () if residual_norm is None else (2,)
    chosen = plan(view, x.itemsize, 1 if residual_norm is None else 2)
    out = torch.empty_like(x) if out is None else out
    mask = x.new_empty(view.mask_shape if save_mask else 0, dtype=torch.uint8)
    statistics = x.new_empty((*norms, 2, view.n_channels), dtype=statistics_dtype(x))
    partials = None
    with torch.cuda.device_of(x):
        if training:
            partials = statistics.new_empty((*norms, 2, chosen.stats_splits, view.n_channels))
            stats(x, residual if norms else None, partials, view, chosen)
        apply(
            x, residual, out, mask if save_mask else None, view, chosen, relu, False,
            norm, residual_norm, partials, statistics,
        )  # fmt: skip
    return out, mask, statistics


def batch_norm_backward(
    dout: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    training: bool,
    relu: bool,
    need_dx: bool,
    need_dresidual: bool,
    need_dparams: bool,
) -> tuple[Tensor, ...]:
    """Return dx, dresidual, dweight (C,) and dbias (C,); what is not needed has shape (0,).

    Without a mask, the threshold of relu is recomputed from x.
    """
    return _backward(
        dout, x, None, mask, (weight, bias), statistics, training, relu,
        need_dx, need_dresidual, need_dparams,
    )  # fmt: skip


def dual_batch_norm_backward(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    statistics: Tensor,
    training: bool,
    need_dx: bool,
    need_dresidual: bool,
    need_dparams: bool,
) -> tuple[Tensor, ...]:
    """Return dx, dresidual, and the gradients of the parameters in their order.

    What is not needed has shape (0,).
    """
    parameters = weight, bias, residual_weight, residual_bias
    return _backward(
        dout, x, residual, mask, parameters, statistics, training, True,
        need_dx, need_dresidual, need_dparams,
    )  # fmt: skip


def _backward(
    dout: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    parameters: tuple[Tensor | None, ...],
    statistics: Tensor,
    training: bool,
    relu: bool,
    need_dx: bool,
    need_dresidual: bool,
    need_dparams: bool,
    means: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The residual is given where it is normalised, and means where x is a part of the batch."""
    _check_contiguous(*parameters)
    view = View.of(x)
    _check_laid_out(x, view, mask, dout, residual)
    chosen = plan(view, x.itemsize, 1 if residual is None else 2)
    dx = torch.empty_like(x) if need_dx else None
    dresidual = torch.empty_like(x) if need_dresidual else None
    dparameters = [
        torch.empty_like(p) if need_dparams and p is not None else None for p in parameters
    ]
    weight, bias = parameters[:2]
    has_dparams = any(gradient is not None for gradient in dparameters)
    needs_sums = need_dx or (need_dresidual and residual is not None)
    with torch.cuda.device_of(x):
        partials = None
        if has_dparams or (training and needs_sums and means is None):
            shape = (2 if residual is None else 3, chosen.bwd_splits, view.n_channels)
            partials = x.new_empty(shape, dtype=statistics_dtype(x))
            bwd_reduce(
                dout, x, residual, mask, weight, bias, statistics, partials, view, chosen, relu
            )
        if has_dparams or need_dx or need_dresidual:
            bwd_apply(
                dout, x, residual, mask, dx, dresidual, view, chosen, relu,
                training, partials, statistics, parameters, dparameters, means,
            )  # fmt: skip
    return tuple(x.new_empty(0) if g is None else g for g in (dx, dresidual, *dparameters))


def batch_norm_stats(x: Tensor) -> Tensor:
    """Return the moments of x: means (C,), M2 (C,) and the number of elements a channel."""
    view = View.of(x)
    chosen = plan(view, x.itemsize)
    partials = x.new_empty((2, chosen.stats_splits, view.n_channels), dtype=statistics_dtype(x))
    row = partials.new_empty(2 * view.n_channels + 1)
    with torch.cuda.device_of(x):
        stats(x, None, partials, view, chosen)
        moments(x, partials, row, view, chosen)
    return row


def batch_norm_merge(
    moments: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (C,), biased var (C,) and count (1,) from a row of moments from each rank.

    Updates the running buffers.
    """
    _check_contiguous(running_mean, running_var)
    mean = moments.new_empty(moments.shape[1] // 2)
    var, count = torch.empty_like(mean), moments.new_empty(1)
    with torch.cuda.device_of(moments):
        merge(moments, running_mean, running_var, momentum, mean, var, count)
    return mean, var, count


def batch_norm_backward_apply(
    dout: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    means: Tensor,
    relu: bool,
    need_dx: bool,
    need_dresidual: bool,
) -> tuple[Tensor, ...]:
    """Return dx and dresidual; what is not needed has shape (0,).

    means (2C,) are those of g, dout where ReLU passed, and of g * (x - mean) * rstd.
    """
    dx, dresidual, *_ = _backward(
        dout, x, None, mask, (weight, bias), statistics, True, relu,
        need_dx, need_dresidual, False, means,
    )  # fmt: skip
    return dx, dresidual


def _check_laid_out(x: Tensor, view: View, mask: Tensor | None, *others: Tensor | None) -> None:
    strides = x.stride()
    for other in others:
        if other is None or other.stride() == strides:
            continue
        if any(s > 1 and a != b for s, a, b in zip(x.shape, other.stride(), strides, strict=True)):
            raise RuntimeError("dout, residual: expected the memory layout of x")
    if mask is not None and tuple(mask.shape) != view.mask_shape:
        raise RuntimeError("mask: not the one that forward returned")


def _check_contiguous(*vectors: Tensor | None) -> None:
    if any(vector is not None and not vector.is_contiguous() for vector in vectors):
        raise RuntimeError("parameters, running statistics: expected contiguous vectors")

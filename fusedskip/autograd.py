"""The autograd Functions: kernels forward and backward, torch's own operators below that.

A backward pass that is itself differentiated (`create_graph=True`) is written in operators that
torch can differentiate; one that is not, and pays nothing for it, is kernels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedskip.backends import KERNELS
from fusedskip.layout import dense, empty_laid_out_like, strided


class AddReLU(torch.autograd.Function):
    """`relu(x + residual)`, or `relu_first`: `relu(x) + residual`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, relu_first: bool, backend: str) -> Tensor:
        x = dense(x)
        # A residual that is added behind the ReLU has the gradient of the sum.
        passes_relu = ctx.needs_input_grad[0] or not relu_first
        out, mask = KERNELS[backend].add_relu(
            x, strided(residual, x.stride()), relu_first, passes_relu
        )
        ctx.materialize_grads = False
        ctx.save_for_backward(mask if passes_relu else None)
        ctx.strides, ctx.relu_first, ctx.backend = out.stride(), relu_first, backend
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return _no_gradients(ctx)
        (mask,) = ctx.saved_tensors
        if mask is None:
            return None, dout, None, None
        dense_dout = strided(dout, ctx.strides)
        if _is_differentiated(dout):
            with torch.no_grad():
                ones = torch.ones_like(dense_dout)
                passes = KERNELS[ctx.backend].add_relu_backward(ones, mask)
            dx = torch.where(passes != 0, dout, 0)
        else:
            dx = KERNELS[ctx.backend].add_relu_backward(dense_dout, mask)
        return dx, dout if ctx.relu_first else dx, None, None


class BiasAddReLU(torch.autograd.Function):
    """`relu(x + residual + bias)`: a norm in evaluation, of mean 0, variance 1 and no weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, bias: Tensor, backend: str) -> Tensor:
        x = dense(x)
        residual = strided(residual, x.stride())
        out, *saved = KERNELS[backend].batch_norm(
            x, residual, None, bias, None, None, False, 0.0, 0.0, True, True
        )
        ctx.materialize_grads = False
        ctx.save_for_backward(*saved)
        ctx.bias_dtype, ctx.strides, ctx.backend = bias.dtype, out.stride(), backend
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return _no_gradients(ctx)
        mask, statistics = ctx.saved_tensors
        need_x, need_residual, need_bias, _ = ctx.needs_input_grad
        dout, bias = strided(dout, ctx.strides), _like_bias(ctx.bias_dtype, None, statistics)
        # x only matters to the gradient of a weight, and there is none.
        if _is_differentiated(dout):
            dx = _gated(ctx.backend, dout, dout, mask, None, bias, statistics)
            dbias = dx.sum((0, *range(2, dx.dim())), dtype=ctx.bias_dtype)
        else:
            dx, _, _, dbias = KERNELS[ctx.backend].batch_norm_backward(
                dout, dout, mask, None, bias, statistics, False, True,
                need_x or need_residual, False, need_bias,
            )  # fmt: skip
        return (
            dx if need_x else None,
            dx if need_residual else None,
            dbias if need_bias else None,
            None,
        )


class BatchNorm(torch.autograd.Function):
    """`relu?(bn(x) + residual?)`."""

    @staticmethod
    def forward(
        ctx: Any,
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
        backend: str,
    ) -> Tensor:
        need_x, _, need_weight, *_ = ctx.needs_input_grad
        reads_x = _reads_input(training, need_x, need_weight)
        # From an x that backward reads anyway it recomputes the mask, if it can from that alone. If
        # it reads none, keeping bits saves x, and 0.2 of forward and backward at 32x256x56x56.
        ctx.recomputes_gate = relu and residual is None and reads_x
        save_mask = relu and not ctx.recomputes_gate
        keeps_weight = ctx.recomputes_gate or need_x or need_weight
        saved = (
            x if reads_x else None,
            weight if keeps_weight else None,
            bias if ctx.recomputes_gate else None,
        )
        _refuse_inference(saved)
        dense_x = dense(x)
        residual = None if residual is None else strided(residual, dense_x.stride())
        out, mask, statistics = KERNELS[backend].batch_norm(
            dense_x, residual, weight, bias, running_mean, running_var,
            training, momentum, eps, relu, save_mask,
        )  # fmt: skip
        ctx.materialize_grads = False
        ctx.save_for_backward(*saved, mask if save_mask else None, statistics)
        ctx.training, ctx.relu, ctx.backend = training, relu, backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.strides = out.stride()
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return _no_gradients(ctx)
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        if not (ctx.relu or need_x or need_weight or need_bias):
            return None, dout, *(None,) * 9
        x, weight, bias, mask, statistics = ctx.saved_tensors
        dout = strided(dout, ctx.strides)
        # Of what was not saved no result depends on the values.
        x = dout if x is None else strided(x, ctx.strides)
        bias = bias if ctx.recomputes_gate else _like_bias(ctx.bias_dtype, weight, statistics)
        if _is_differentiated(dout):
            dresidual = dout
            if ctx.relu:
                dresidual = _gated(ctx.backend, dout, x, mask, weight, bias, statistics)
            dx, dweight, dbias = _norm_gradients(
                dresidual, x, weight, statistics, ctx.training, (need_x, need_weight, need_bias)
            )
        else:
            dx, dresidual, dweight, dbias = KERNELS[ctx.backend].batch_norm_backward(
                dout, x, mask, weight, bias, statistics, ctx.training, ctx.relu,
                need_x, need_residual and ctx.relu, need_weight or need_bias,
            )  # fmt: skip
            if not ctx.relu:
                dresidual = dout
        return (
            dx if need_x else None,
            dresidual if need_residual else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            *(None,) * 7,
        )


def cat_batch_norm_relu(
    x: Tensor,
    skip: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`cat([skip, relu(bn(x))], dim=1)` of a dense `x`, and the statistics."""
    n_skip = skip.shape[1]
    out = empty_laid_out_like(x, n_skip + x.shape[1])
    out[:, :n_skip].copy_(skip)
    statistics = KERNELS[backend].batch_norm_relu_into(
        x, weight, bias, running_mean, running_var, out[:, n_skip:], training, momentum, eps
    )
    return out, statistics


class CatBatchNormReLU(torch.autograd.Function):
    """`cat([skip, relu(bn(x))], dim=1)`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        skip: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        backend: str,
    ) -> Tensor:
        need_x, _, need_weight, need_bias, *_ = ctx.needs_input_grad
        ctx.has_norm = need_x or need_weight or need_bias
        if ctx.has_norm:
            _refuse_inference((x, weight, bias))
        dense_x = dense(x)
        out, statistics = cat_batch_norm_relu(
            dense_x, skip, weight, bias, running_mean, running_var, training, momentum, eps, backend
        )
        ctx.materialize_grads = False
        ctx.save_for_backward(*(x, weight, bias, statistics) if ctx.has_norm else ())
        ctx.training, ctx.n_skip, ctx.backend = training, skip.shape[1], backend
        ctx.strides = dense_x.stride()
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return _no_gradients(ctx)
        need_x, need_skip, need_weight, need_bias = ctx.needs_input_grad[:4]
        dskip = dout[:, : ctx.n_skip] if need_skip else None
        if not ctx.has_norm:
            return None, dskip, *(None,) * 8
        x, weight, bias, statistics = ctx.saved_tensors
        dnorm = dout[:, ctx.n_skip :]
        if _is_differentiated(dout):
            dx, dweight, dbias = _norm_gradients(
                _gated(ctx.backend, dnorm, x, None, weight, bias, statistics),
                x, weight, statistics, ctx.training, (need_x, need_weight, need_bias),
            )  # fmt: skip
        else:
            dx, _, dweight, dbias = KERNELS[ctx.backend].batch_norm_backward(
                strided(dnorm, ctx.strides), strided(x, ctx.strides), None,
                weight, bias, statistics,
                ctx.training, True, need_x, False, need_weight or need_bias,
            )  # fmt: skip
        return (
            dx if need_x else None,
            dskip,
            dweight if need_weight else None,
            dbias if need_bias else None,
            *(None,) * 6,
        )


class DualBatchNorm(torch.autograd.Function):
    """`relu(bn(x) + bn'(residual))`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual_weight: Tensor | None,
        residual_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        residual_running_mean: Tensor | None,
        residual_running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        residual_momentum: float,
        residual_eps: float,
        backend: str,
    ) -> Tensor:
        need_x, need_residual, need_weight, _, need_residual_weight, *_ = ctx.needs_input_grad
        saved = (
            x if _reads_input(training, need_x, need_weight) else None,
            residual if _reads_input(training, need_residual, need_residual_weight) else None,
            weight if need_x or need_weight else None,
            residual_weight if need_residual or need_residual_weight else None,
        )
        _refuse_inference(saved)
        dense_x = dense(x)
        out, mask, statistics = KERNELS[backend].dual_batch_norm(
            dense_x, strided(residual, dense_x.stride()), weight, bias, running_mean, running_var,
            residual_weight, residual_bias, residual_running_mean, residual_running_var,
            training, momentum, eps, residual_momentum, residual_eps, True,
        )  # fmt: skip
        ctx.materialize_grads = False
        ctx.save_for_backward(*saved, mask, statistics)
        ctx.bias_dtypes = tuple(b if b is None else b.dtype for b in (bias, residual_bias))
        ctx.training, ctx.backend, ctx.strides = training, backend, out.stride()
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return _no_gradients(ctx)
        x, residual, weight, residual_weight, mask, statistics = ctx.saved_tensors
        needed = ctx.needs_input_grad[:6]
        need_x, need_residual, *need_parameters = needed
        dout = strided(dout, ctx.strides)
        x, residual = (dout if t is None else strided(t, ctx.strides) for t in (x, residual))
        if _is_differentiated(dout):
            # The mask alone says what passes.
            g = _gated(ctx.backend, dout, dout, mask, None, None, statistics[0])
            dx, dweight, dbias = _norm_gradients(
                g, x, weight, statistics[0], ctx.training, (need_x, *need_parameters[:2])
            )
            dresidual, residual_dweight, residual_dbias = _norm_gradients(
                g, residual, residual_weight, statistics[1],
                ctx.training, (need_residual, *need_parameters[2:]),
            )  # fmt: skip
            gradients = dx, dresidual, dweight, dbias, residual_dweight, residual_dbias
        else:
            bias, residual_bias = (
                _like_bias(dtype, like, statistics)
                for dtype, like in zip(ctx.bias_dtypes, (weight, residual_weight), strict=True)
            )
            gradients = KERNELS[ctx.backend].dual_batch_norm_backward(
                dout, x, residual, mask, weight, bias, residual_weight, residual_bias, statistics,
                ctx.training, need_x, need_residual, any(need_parameters),
            )  # fmt: skip
        return (
            *(g if need else None for g, need in zip(gradients, needed, strict=True)),
            *(None,) * 10,
        )


def _no_gradients(ctx: Any) -> tuple[None, ...]:
    """Where that of the output is undefined, as in torch's own operators.

    Not the 0 that `ctx.materialize_grads` stands for: an optimizer lets parameters decay whose
    gradient is 0, and leaves those alone where it is None.
    """
    return (None,) * len(ctx.needs_input_grad)


def _refuse_inference(saved: tuple[Tensor | None, ...]) -> None:
    """Raise `RuntimeError` if one cannot be saved: torch itself would once kernels have run."""
    if torch.compiler.is_compiling():
        return
    for tensor in saved:
        if tensor is not None and tensor.is_inference():
            raise RuntimeError("Inference tensors cannot be saved for backward: clone them first")


def _like_bias(
    dtype: torch.dtype | None, weight: Tensor | None, statistics: Tensor
) -> Tensor | None:
    """What takes a bias's place where its dtype matters alone, that of its gradient.

    So nothing keeps a bias from being changed before the backward pass, as in eager mode.
    """
    if dtype is None:
        return None
    if weight is not None and weight.dtype == dtype:
        return weight
    return statistics.flatten(end_dim=-2)[0].to(dtype)


def _reads_input(training: bool, need_input: bool, need_weight: bool) -> bool:
    """Whether a norm's backward needs its input, but for a mask: not where the norm is frozen."""
    return need_weight or (training and need_input)


def _is_differentiated(dout: Tensor) -> bool:
    """Whether this backward pass has to be differentiable."""
    if torch.compiler.is_compiling():
        # Whether gradients are enabled while it is traced says nothing of when it will run.
        _refuse_second_derivatives(dout)
        return forward_ad._current_level >= 0
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


# AOTAutograd refuses them by itself and drops what returns nothing; other backends run the graph.
@torch.library.custom_op("fusedskip_autograd::refuse_second_derivatives", mutates_args=())
def _refuse_second_derivatives(dout: Tensor) -> None:
    """Raise `RuntimeError` where a compiled backward pass is to be differentiated."""
    if dout.requires_grad:
        raise RuntimeError("fusedskip: a compiled backward pass cannot be differentiated")


@_refuse_second_derivatives.register_fake
def _(dout: Tensor) -> None:
    return None


def _gated(
    backend: str,
    dout: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
) -> Tensor:
    """`dout` where ReLU passed, by the kernels' own gate, else 0; that gate has no derivative."""
    with torch.no_grad():
        x = dense(x)
        passes = KERNELS[backend].batch_norm_backward(
            torch.ones_like(x), x, mask, weight, bias, statistics, False, True, False, True, False
        )[1]
    return torch.where(passes != 0, dout, 0)  # no product: a NaN that is stopped leaves no trace


def _norm_gradients(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    training: bool,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of a batch norm's `x`, `weight` and `bias`, in a differentiable operator."""
    mean, rstd = statistics
    dtype = mean.dtype  # 16-bit parameters are more than that operator takes
    dtypes = x.dtype, dtype if weight is None else weight.dtype
    scale = torch.ones_like(mean) if weight is None else weight.to(dtype)
    # In one layout: with a dimension of size 1, torch 2.13 takes one channels-last for the other's.
    x = dense(x)
    g = strided(g, x.stride())
    gradients = torch.ops.aten.native_batch_norm_backward(
        g.to(dtype), x.to(dtype), scale, mean, rstd.pow(-2), mean, rstd, training, 0.0, needed
    )
    return tuple(
        None if gradient is None else gradient.to(to)
        for gradient, to in zip(gradients, (*dtypes, dtypes[1]), strict=True)
    )

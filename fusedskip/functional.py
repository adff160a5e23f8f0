"""The public functions: each checks its arguments once, and then is one autograd Function.

Shapes: activations are `(N, C, *)`, parameters and running buffers `(C,)`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedskip import backends, reference
from fusedskip.backends import KERNELS

# The dtypes of activations, and which of parameters and buffers go with them.
_DTYPES = {
    torch.float64: (torch.float64,),
    torch.float32: (torch.float32,),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """`relu(x + residual)` in one pass.

    Saves one bit an element for the backward pass, nothing else. NaN passes; no gradient at 0.

    Args:
        x: any shape; fp64, fp32, bf16 or fp16.
        residual: same shape, dtype and device as `x`; it is never broadcast. May be `x` itself.

    Returns:
        A new tensor with the shape, dtype and memory layout of `x`.

    Raises:
        TypeError: `x` is not floating point, or `residual` differs in dtype.
        ValueError: `residual` differs in shape or device.

    Semantics: `torch.add` followed by `torch.relu`.
    """
    return _add_relu(x, residual, relu_first=False)


def relu_add(x: Tensor, residual: Tensor) -> Tensor:
    """`relu(x) + residual` in one pass: a branch that ends in a ReLU, added to its skip.

    The arguments, the result and the errors are those of `add_relu`; the sum is rounded once.

    Semantics: `torch.relu` followed by `torch.add`.
    """
    return _add_relu(x, residual, relu_first=True)


def bias_add_relu(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    """`relu(x + residual + bias)` in one pass, for branches whose convolutions leave it their bias.

    Saves one bit an element for the backward pass, and nothing of `x` or `residual`.

    Args:
        x: `(N, C, *)`; fp64, fp32, bf16 or fp16, contiguous or channels-last.
        residual: same shape, dtype and device as `x`; it is never broadcast. May be `x` itself.
        bias: `(C,)`, in the dtype of `x` or fp32.

    Returns:
        A new tensor with the shape, dtype and memory layout of `x`.

    Raises:
        TypeError: an argument has a dtype other than those above.
        ValueError: a shape or device does not fit `x`.

    Semantics: `torch.add`, twice, and `torch.relu`, rounded once.
    """
    _check_channels(x)
    _check_residual(residual, x)
    _check_channel_vectors(x, bias=bias)
    backend = backends.select(x)
    if backend == "eager" or x.numel() == 0:
        return reference.bias_add_relu(x, residual, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, residual, bias)):
        return _BiasAddReLU.apply(x, residual, bias, backend)
    x = _dense(x)
    return _shift(backend, x, _laid_out_like(residual, x), bias, save_mask=False)[0]


def batch_norm_relu(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`relu(batch_norm(x))` without the intermediate tensor.

    Keeps `x` and two numbers a channel for the backward pass, which recomputes the ReLU's mask.

    Args:
        x: `(N, C, *)`; fp64, fp32, bf16 or fp16, contiguous or channels-last.
        running_mean, running_var: `(C,)`, in the dtype of `x` or fp32, or both None. Training
            updates them in place (`running_var` with the unbiased variance); evaluation needs them.
        weight, bias: `(C,)`, in the dtype of `x` or fp32; absent, they are 1 and 0.
        training: normalise with the statistics of this batch rather than with the running ones.
        momentum: share of this batch in the running statistics.
        eps: added to the variance.

    Returns:
        A new tensor with the shape, dtype and memory layout of `x`.

    Raises:
        TypeError: an argument has a dtype other than those above.
        ValueError: a shape or device does not fit `x`, running statistics are missing, `eps` is
            not positive, or training finds one value per channel. Nothing has been updated then.

    Semantics: `torch.nn.functional.batch_norm` (Ioffe and Szegedy, 2015, arXiv:1502.03167) followed
    by `torch.relu`.
    """
    return _batch_norm(
        x, None, running_mean, running_var, weight, bias, training, momentum, eps, relu=True
    )


def batch_norm_add(
    x: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`batch_norm(x) + residual`; the arguments are those of `batch_norm_add_relu`."""
    return _batch_norm(
        x, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu=False
    )


def batch_norm_add_relu(
    x: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`relu(batch_norm(x) + residual)`, the tail of a residual block.

    Keeps `x`, two numbers a channel and one bit an element for the backward pass.

    Args:
        x, running_mean, running_var, weight, bias, training, momentum, eps: as `batch_norm_relu`.
        residual: same shape, dtype and device as `x`; it is never broadcast. May be `x` itself.

    Returns:
        A new tensor with the shape, dtype and memory layout of `x`.

    Raises:
        TypeError, ValueError: as `batch_norm_relu`, and if `residual` does not fit `x`.

    Semantics: `torch.nn.functional.batch_norm`, `torch.add`, `torch.relu`, rounded once.
    """
    return _batch_norm(
        x, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu=True
    )


def cat_batch_norm_relu(
    x: Tensor,
    skip: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`cat([skip, relu(batch_norm(x))], dim=1)`, the norm written straight into its channels.

    Args:
        x, running_mean, running_var, weight, bias, training, momentum, eps: as `batch_norm_relu`.
        skip: shape of `x` but for the channels, and its dtype and device.

    Returns:
        A new tensor `(N, C_skip + C, *)` with the dtype and memory layout of `x`.

    Raises:
        TypeError, ValueError: as `batch_norm_relu`, and if `skip` does not fit `x`.

    Semantics: `torch.nn.functional.batch_norm`, `torch.relu`, `torch.cat`.
    """
    check_batch_norm(x, None, running_mean, running_var, weight, bias, training, eps)
    _check_skip(skip, x)
    backend = backends.select(x)
    norm = (running_mean, running_var, weight, bias, training, momentum, eps)
    if backend == "eager" or x.numel() == 0:
        return reference.cat_batch_norm_relu(x, skip, *norm)
    return _CatBatchNormReLU.apply(x, skip, weight, bias, *norm[:2], *norm[4:], backend)


def dual_batch_norm_add_relu(
    x: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual_running_mean: Tensor | None,
    residual_running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual_momentum: float | None = None,
    residual_eps: float | None = None,
) -> Tensor:
    """`relu(batch_norm(x) + batch_norm'(residual))`: a skip whose projection ends in a norm, too.

    Both norms, the sum and the ReLU are one operation; neither normalised tensor is written. Keeps
    `x`, `residual`, four numbers a channel and one bit an element for the backward pass.

    Args:
        x, running_mean, running_var, weight, bias, training, momentum, eps: as `batch_norm_relu`.
        residual: same shape, dtype and device as `x`.
        residual_running_mean, residual_running_var, residual_weight, residual_bias: those of the
            norm of `residual`; running statistics are not shared with that of `x`.
        residual_momentum, residual_eps: where they differ from those of the norm of `x`.

    Returns:
        A new tensor with the shape, dtype and memory layout of `x`.

    Raises:
        TypeError, ValueError: as `batch_norm_relu`, for either norm, if `residual` does not fit
            `x`, and in training if the norms share running statistics.

    Semantics: `torch.nn.functional.batch_norm`, twice, `torch.add`, `torch.relu`, rounded once.
    """
    residual_momentum = momentum if residual_momentum is None else residual_momentum
    residual_eps = eps if residual_eps is None else residual_eps
    check_batch_norm(x, residual, running_mean, running_var, weight, bias, training, eps)
    _check_channel_vectors(
        x,
        residual_running_mean=residual_running_mean,
        residual_running_var=residual_running_var,
        residual_weight=residual_weight,
        residual_bias=residual_bias,
    )
    _check_statistics(
        residual_running_mean, residual_running_var, training, residual_eps, prefix="residual_"
    )
    if training and running_mean is not None and running_mean is residual_running_mean:
        raise ValueError("running_mean, residual_running_mean: expected different tensors")
    backend = backends.select(x)
    if backend == "eager" or x.numel() == 0:
        return reference.dual_batch_norm_add_relu(
            x, residual, running_mean, running_var, residual_running_mean, residual_running_var,
            weight, bias, residual_weight, residual_bias,
            training, momentum, eps, residual_momentum, residual_eps,
        )  # fmt: skip
    parameters = (weight, bias, residual_weight, residual_bias)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, residual, *parameters)
    ):
        return _DualBatchNorm.apply(
            x, residual, *parameters,
            running_mean, running_var, residual_running_mean, residual_running_var,
            training, momentum, eps, residual_momentum, residual_eps, backend,
        )  # fmt: skip
    x = _dense(x)
    return KERNELS[backend].dual_batch_norm(
        x, _laid_out_like(residual, x), weight, bias, running_mean, running_var,
        residual_weight, residual_bias, residual_running_mean, residual_running_var,
        training, momentum, eps, residual_momentum, residual_eps, False,
    )[0]  # fmt: skip


def _add_relu(x: Tensor, residual: Tensor, relu_first: bool) -> Tensor:
    _check_activation(x)
    _check_residual(residual, x)
    backend = backends.select(x)
    if backend == "eager" or x.numel() == 0:
        return (reference.relu_add if relu_first else reference.add_relu)(x, residual)
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad):
        return _AddReLU.apply(x, residual, relu_first, backend)
    x = _dense(x)
    return KERNELS[backend].add_relu(x, _laid_out_like(residual, x), relu_first, False)[0]


def _batch_norm(
    x: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> Tensor:
    check_batch_norm(x, residual, running_mean, running_var, weight, bias, training, eps)
    backend = backends.select(x)
    if backend == "eager" or x.numel() == 0:
        return reference.batch_norm(
            x, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
        )
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, residual, weight, bias)
    ):
        return _BatchNorm.apply(
            x, residual, weight, bias, running_mean, running_var,
            training, momentum, eps, relu, backend,
        )  # fmt: skip
    x = _dense(x)
    residual = None if residual is None else _laid_out_like(residual, x)
    return KERNELS[backend].batch_norm(
        x, residual, weight, bias, running_mean, running_var, training, momentum, eps, relu, False
    )[0]


class _AddReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, relu_first: bool, backend: str) -> Tensor:
        x = _dense(x)
        out, mask = KERNELS[backend].add_relu(x, _laid_out_like(residual, x), relu_first, True)
        ctx.save_for_backward(mask)
        ctx.strides, ctx.relu_first, ctx.backend = out.stride(), relu_first, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        dx = KERNELS[ctx.backend].add_relu_backward(_strided(dout, ctx.strides), mask)
        return dx, dout if ctx.relu_first else dx, None, None


def _shift(
    backend: str, x: Tensor, residual: Tensor, bias: Tensor, save_mask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`relu(x + residual + bias)`: the norm in evaluation, of mean 0, variance 1 and no weight."""
    return KERNELS[backend].batch_norm(
        x, residual, None, bias, None, None, False, 0.0, 0.0, True, save_mask
    )


class _BiasAddReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, bias: Tensor, backend: str) -> Tensor:
        x = _dense(x)
        out, *saved = _shift(backend, x, _laid_out_like(residual, x), bias, save_mask=True)
        ctx.save_for_backward(bias, *saved)
        ctx.strides, ctx.backend = out.stride(), backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        bias, mask, mean, rstd = ctx.saved_tensors
        need_x, need_residual, need_bias, _ = ctx.needs_input_grad
        dout = _strided(dout, ctx.strides)
        # x only matters to the gradient of a weight, and there is none.
        dx, _, _, dbias = KERNELS[ctx.backend].batch_norm_backward(
            dout, dout, mask, None, bias, mean, rstd, False, True,
            need_x or need_residual, False, need_bias,
        )  # fmt: skip
        return (
            dx if need_x else None,
            dx if need_residual else None,
            dbias if need_bias else None,
            None,
        )


class _BatchNorm(torch.autograd.Function):
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
        dense = _dense(x)
        residual = None if residual is None else _laid_out_like(residual, dense)
        save_mask = relu and residual is not None
        out, mask, mean, rstd = KERNELS[backend].batch_norm(
            dense, residual, weight, bias, running_mean, running_var,
            training, momentum, eps, relu, save_mask,
        )  # fmt: skip
        # A residual alone wants its gradient: the mask is all it takes.
        only_residual = save_mask and not any(ctx.needs_input_grad[i] for i in (0, 2, 3))
        ctx.save_for_backward(
            None if only_residual else x,
            mask if save_mask else None,
            weight,
            bias,
            mean,
            rstd,
        )
        ctx.training, ctx.relu, ctx.backend = training, relu, backend
        ctx.strides = out.stride()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, weight, bias, mean, rstd = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        dout = _strided(dout, ctx.strides)
        dx, dresidual, dweight, dbias = KERNELS[ctx.backend].batch_norm_backward(
            dout,
            dout if x is None else _dense(x),
            mask, weight, bias, mean, rstd, ctx.training, ctx.relu,
            need_x, need_residual and ctx.relu, need_weight or need_bias,
        )  # fmt: skip
        if need_residual and not ctx.relu:
            dresidual = dout
        return (
            dx if need_x else None,
            dresidual if need_residual else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            *(None,) * 7,
        )


class _CatBatchNormReLU(torch.autograd.Function):
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
        dense, n_skip = _dense(x), skip.shape[1]
        n_channels = n_skip + x.shape[1]
        if dense.is_contiguous():
            out = x.new_empty((x.shape[0], n_channels, *x.shape[2:]))
        else:
            out = x.new_empty((x.shape[0], *x.shape[2:], n_channels)).movedim(-1, 1)
        out[:, :n_skip].copy_(skip)
        mean, rstd = KERNELS[backend].batch_norm_relu_into(
            dense, weight, bias, running_mean, running_var, out[:, n_skip:],
            training, momentum, eps,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.training, ctx.n_skip, ctx.backend = training, n_skip, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        need_x, need_skip, need_weight, need_bias = ctx.needs_input_grad[:4]
        dense = _dense(x)
        dx, _, dweight, dbias = KERNELS[ctx.backend].batch_norm_backward(
            _laid_out_like(dout[:, ctx.n_skip :], dense), dense, None, weight, bias, mean, rstd,
            ctx.training, True, need_x, False, need_weight or need_bias,
        )  # fmt: skip
        return (
            dx if need_x else None,
            dout[:, : ctx.n_skip] if need_skip else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            *(None,) * 6,
        )


class _DualBatchNorm(torch.autograd.Function):
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
        dense = _dense(x)
        out, mask, mean, rstd = KERNELS[backend].dual_batch_norm(
            dense, _laid_out_like(residual, dense), weight, bias, running_mean, running_var,
            residual_weight, residual_bias, residual_running_mean, residual_running_var,
            training, momentum, eps, residual_momentum, residual_eps, True,
        )  # fmt: skip
        ctx.save_for_backward(
            x, residual, mask, weight, bias, residual_weight, residual_bias, mean, rstd
        )
        ctx.training, ctx.backend, ctx.strides = training, backend, out.stride()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[:6]
        dense = _dense(x)
        gradients = KERNELS[ctx.backend].dual_batch_norm_backward(
            _strided(dout, ctx.strides), dense, _laid_out_like(residual, dense), *saved,
            ctx.training, needed[0], needed[1], any(needed[2:]),
        )  # fmt: skip
        return (
            *(g if need else None for g, need in zip(gradients, needed, strict=True)),
            *(None,) * 10,
        )


def _dense(x: Tensor) -> Tensor:
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
    channels_last = strides[-1] == 1 and strides == sorted(strides, reverse=True)
    channels_last = channels_last and strides[-2] >= x.shape[1]
    return x.contiguous(memory_format=memory_format if channels_last else torch.contiguous_format)


def _laid_out_like(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor`, or a copy of it with the strides of the dense tensor `x` of the same shape."""
    return _strided(tensor, x.stride())


def _strided(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    if tensor.stride() == strides or all(
        size == 1 or have == want
        for size, have, want in zip(tensor.shape, tensor.stride(), strides, strict=True)
    ):
        return tensor
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def _check_activation(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"x: expected dtype float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"x: expected a strided tensor, got layout {x.layout}")


def _check_residual(residual: Tensor, x: Tensor) -> None:
    if residual.shape != x.shape:
        raise ValueError(
            f"residual: expected shape {tuple(x.shape)} like x, got {tuple(residual.shape)}"
        )
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: expected dtype {x.dtype} like x, got {residual.dtype}")
    if residual.device != x.device:
        raise ValueError(f"residual: expected device {x.device} like x, got {residual.device}")


def _check_skip(skip: Tensor, x: Tensor) -> None:
    if skip.shape[:1] + skip.shape[2:] != x.shape[:1] + x.shape[2:] or skip.dim() != x.dim():
        raise ValueError(
            f"skip: expected shape {tuple(x.shape)} of x but for the channels, "
            f"got {tuple(skip.shape)}"
        )
    if skip.dtype != x.dtype:
        raise TypeError(f"skip: expected dtype {x.dtype} like x, got {skip.dtype}")
    if skip.device != x.device:
        raise ValueError(f"skip: expected device {x.device} like x, got {skip.device}")


def _channel_vector_error(name: str, vector: Tensor, x: Tensor) -> Exception:
    if vector.shape != x.shape[1:2]:
        return ValueError(
            f"{name}: expected shape ({x.shape[1]},) for x of shape {tuple(x.shape)}, "
            f"got {tuple(vector.shape)}"
        )
    if vector.dtype not in _DTYPES[x.dtype]:
        expected = " or ".join(str(dtype) for dtype in _DTYPES[x.dtype])
        return TypeError(
            f"{name}: expected dtype {expected} for x of {x.dtype}, got {vector.dtype}"
        )
    return ValueError(f"{name}: expected device {x.device} like x, got {vector.device}")


def _check_channel_vectors(x: Tensor, **vectors: Tensor | None) -> None:
    channels, device, dtypes = x.shape[1:2], x.device, _DTYPES[x.dtype]
    for name, vector in vectors.items():
        if vector is not None and not (
            vector.shape == channels and vector.dtype in dtypes and vector.device == device
        ):
            raise _channel_vector_error(name, vector, x)


def _check_channels(x: Tensor) -> None:
    _check_activation(x)
    if x.dim() < 2:
        raise ValueError(f"x: expected at least 2 dimensions (N, C, *), got shape {tuple(x.shape)}")


def _check_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    prefix: str = "",
) -> None:
    names = f"{prefix}running_mean, {prefix}running_var"
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{names}: expected both or neither")
    if training:
        if eps <= 0:
            raise ValueError(f"{prefix}eps: expected a positive number when training, got {eps}")
    else:
        if eps < 0:
            raise ValueError(f"{prefix}eps: expected a number not below 0, got {eps}")
        if running_mean is None:
            raise ValueError(f"{names}: expected tensors when not training")


def check_batch_norm(
    x: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    """Raise `TypeError` or `ValueError` unless the arguments of a `batch_norm_*` function fit."""
    _check_channels(x)
    if residual is not None:
        _check_residual(residual, x)
    _check_channel_vectors(
        x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias
    )
    _check_statistics(running_mean, running_var, training, eps)
    if training and x.numel() == x.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
        )

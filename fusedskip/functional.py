"""The public functions: each checks its arguments, and then is one autograd Function.

Shapes: activations are `(N, C, *)`, parameters and running buffers `(C,)`. Where `use_backend` has
named a backend that cannot take the tensors, all of them raise `RuntimeError`.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedskip import autograd, backends, reference
from fusedskip.backends import KERNELS, take_vectors
from fusedskip.checks import (
    check_activation,
    check_batch_norm,
    check_channel_vectors,
    check_channels,
    check_residual,
    check_skip,
    check_statistics,
)
from fusedskip.layout import dense, strided
from fusedskip.tracing import overridable

# running_mean, running_var, weight, bias, training, momentum, eps, relu
_Norm = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool, float, float, bool
]  # fmt: skip


@overridable
def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """`relu(x + residual)` in one pass.

    Saves one bit an element for the backward pass, nothing else. NaN passes; no gradient at 0.

    Args:
        x: any shape; fp64, fp32, bf16 or fp16.
        residual: same shape, dtype and device as `x`; it is never broadcast. May be `x` itself.

    Returns:
        A new tensor with the shape and dtype of `x`, channels-last where `x` is, else contiguous.

    Raises:
        TypeError: `x` is not floating point, or `residual` differs in dtype.
        ValueError: `residual` differs in shape or device.

    Semantics: `torch.add` followed by `torch.relu`.
    """
    return _add_relu(x, residual, relu_first=False)


@overridable
def relu_add(x: Tensor, residual: Tensor) -> Tensor:
    """`relu(x) + residual` in one pass: a branch that ends in a ReLU, added to its skip.

    The arguments, the result and the errors are those of `add_relu`; the sum is rounded once.

    Semantics: `torch.relu` followed by `torch.add`.
    """
    return _add_relu(x, residual, relu_first=True)


@overridable
def bias_add_relu(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    """`relu(x + residual + bias)` in one pass, for branches whose convolutions leave it their bias.

    Saves one bit an element for the backward pass, and nothing of `x` or `residual`.

    Args:
        x: `(N, C, *)`; fp64, fp32, bf16 or fp16, contiguous or channels-last.
        residual: same shape, dtype and device as `x`; it is never broadcast. May be `x` itself.
        bias: `(C,)`, in the dtype of `x` or fp32.

    Returns:
        A new tensor with the shape and dtype of `x`, channels-last where `x` is, else contiguous.

    Raises:
        TypeError: an argument has a dtype other than those above.
        ValueError: a shape or device does not fit `x`.

    Semantics: `torch.add`, twice, and `torch.relu`, rounded once.
    """
    check_channels(x)
    check_residual(residual, x)
    check_channel_vectors(x, bias=bias)
    needs_grad = _needs_grad(x, residual, bias)
    backend = _choose(x, needs_grad, vectors=(bias,))
    if backend == "eager":
        return reference.bias_add_relu(x, residual, bias)
    if needs_grad:
        return _apply(autograd.BiasAddReLU, (x, residual, bias), backend)
    x = dense(x)
    residual = strided(residual, x.stride())
    return KERNELS[backend].batch_norm_inference(x, residual, None, bias, None, None, 0.0, True)


@overridable
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

    Keeps `x` and two numbers a channel for the backward pass, which recomputes the ReLU's mask. In
    evaluation, where `weight` needs no gradient, it keeps one bit an element in place of `x`.

    Args:
        x: `(N, C, *)`; fp64, fp32, bf16 or fp16, contiguous or channels-last.
        running_mean, running_var: `(C,)`, in the dtype of `x` or fp32, or both None. Training
            updates them in place (`running_var` with the unbiased variance); evaluation needs them.
        weight, bias: `(C,)`, in the dtype of `x` or fp32; absent, they are 1 and 0.
        training: normalise with the statistics of this batch rather than with the running ones.
        momentum: share of this batch in the running statistics.
        eps: added to the variance.

    Returns:
        A new tensor with the shape and dtype of `x`, channels-last where `x` is, else contiguous.

    Raises:
        TypeError: an argument has a dtype other than those above, or `training` is no bool.
        ValueError: a shape or device does not fit `x`, running statistics are missing, `eps` is
            not positive, or training finds one value per channel. Nothing has been updated then.

    Semantics: `torch.nn.functional.batch_norm` (Ioffe and Szegedy, 2015, arXiv:1502.03167) followed
    by `torch.relu`.
    """
    return _batch_norm(
        x, None, running_mean, running_var, weight, bias, training, momentum, eps, relu=True
    )


@overridable
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
    """`batch_norm(x) + residual`, the tail of a residual block without an activation.

    Keeps `x` and two numbers a channel for the backward pass. The arguments, the result and the
    errors are those of `batch_norm_add_relu`.

    Semantics: `torch.nn.functional.batch_norm`, `torch.add`, rounded once.
    """
    return _batch_norm(
        x, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu=False
    )


@overridable
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
        A new tensor with the shape and dtype of `x`, channels-last where `x` is, else contiguous.

    Raises:
        TypeError, ValueError: as `batch_norm_relu`, and if `residual` does not fit `x`.

    Semantics: `torch.nn.functional.batch_norm`, `torch.add`, `torch.relu`, rounded once.
    """
    return _batch_norm(
        x, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu=True
    )


@overridable
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
    check_skip(skip, x)
    differentiable = (x, skip, weight, bias)
    norm = (running_mean, running_var, weight, bias, training, momentum, eps)
    needs_grad = _needs_grad(*differentiable)
    backend = _choose(x, needs_grad, training, norm[:4])
    if backend == "eager":
        return reference.cat_batch_norm_relu(x, skip, *norm)
    if needs_grad:
        return _apply(autograd.CatBatchNormReLU, differentiable, *norm[:2], *norm[4:], backend)
    x = dense(x)
    return autograd.cat_batch_norm_relu(
        x, skip, weight, bias, running_mean, running_var, training, momentum, eps, backend
    )[0]


@overridable
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
        A new tensor with the shape and dtype of `x`, channels-last where `x` is, else contiguous.

    Raises:
        TypeError, ValueError: as `batch_norm_relu`, for either norm, if `residual` does not fit
            `x`, and in training if the norms share running statistics.

    Semantics: `torch.nn.functional.batch_norm`, twice, `torch.add`, `torch.relu`, rounded once.
    """
    residual_momentum = momentum if residual_momentum is None else residual_momentum
    residual_eps = eps if residual_eps is None else residual_eps
    check_batch_norm(x, residual, running_mean, running_var, weight, bias, training, eps)
    check_channel_vectors(
        x,
        residual_running_mean=residual_running_mean,
        residual_running_var=residual_running_var,
        residual_weight=residual_weight,
        residual_bias=residual_bias,
    )
    check_statistics(
        residual_running_mean, residual_running_var, training, residual_eps, prefix="residual_"
    )
    if training and running_mean is not None:
        if running_mean is residual_running_mean:
            raise ValueError("running_mean, residual_running_mean: expected different tensors")
        if running_var is residual_running_var:
            raise ValueError("running_var, residual_running_var: expected different tensors")
    parameters = (weight, bias, residual_weight, residual_bias)
    needs_grad = _needs_grad(x, residual, *parameters)
    running = (running_mean, running_var, residual_running_mean, residual_running_var)
    options: tuple[Any, ...] = (training, momentum, eps, residual_momentum, residual_eps)
    backend = _choose(x, needs_grad, training, (*parameters, *running))
    if backend == "eager":
        return reference.dual_batch_norm_add_relu(x, residual, *running, *parameters, *options)
    if needs_grad:
        differentiable = (x, residual, *parameters)
        return _apply(autograd.DualBatchNorm, differentiable, *running, *options, backend)
    x = dense(x)
    return KERNELS[backend].dual_batch_norm(
        x, strided(residual, x.stride()), weight, bias, running_mean, running_var,
        residual_weight, residual_bias, residual_running_mean, residual_running_var,
        *options, False,
    )[0]  # fmt: skip


def _add_relu(x: Tensor, residual: Tensor, relu_first: bool) -> Tensor:
    check_activation(x)
    check_residual(residual, x)
    needs_grad = _needs_grad(x, residual)
    backend = _choose(x, needs_grad)
    if backend == "eager":
        return (reference.relu_add if relu_first else reference.add_relu)(x, residual)
    if needs_grad:
        return _apply(autograd.AddReLU, (x, residual), relu_first, backend)
    x = dense(x)
    return KERNELS[backend].add_relu(x, strided(residual, x.stride()), relu_first, False)[0]


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
    norm = (running_mean, running_var, weight, bias, training, momentum, eps, relu)
    try:
        if (backend := _checking_backend(x)) is not None:
            check_statistics(running_mean, running_var, training, eps)
            return _run_batch_norm(x, residual, norm, backend)
    except Exception:
        if _passes(check_batch_norm, x, residual, *norm[:5], eps) and take_vectors(norm[:4]):
            raise  # from a hook, say, when kernels have run: they must not run twice
    check_batch_norm(x, residual, *norm[:5], eps)
    backend = _choose(x, _needs_grad(x, residual, weight, bias), training, norm[:4])
    if backend == "eager":
        return reference.batch_norm(x, residual, *norm)
    return _run_batch_norm(x, residual, norm, backend)


def _run_batch_norm(x: Tensor, residual: Tensor | None, norm: _Norm, backend: str) -> Tensor:
    """`_batch_norm` in kernels."""
    running_mean, running_var, weight, bias, training, momentum, eps, relu = norm
    if _needs_grad(x, residual, weight, bias):
        return _apply(
            autograd.BatchNorm, (x, residual, weight, bias), running_mean, running_var,
            training, momentum, eps, relu, backend,
        )  # fmt: skip
    x = dense(x)
    residual = None if residual is None else strided(residual, x.stride())
    if not training:
        return KERNELS[backend].batch_norm_inference(
            x, residual, weight, bias, running_mean, running_var, eps, relu
        )
    return KERNELS[backend].batch_norm(
        x, residual, weight, bias, running_mean, running_var, training, momentum, eps, relu, False
    )[0]


def _passes(check: Callable[..., None], *arguments: Any) -> bool:
    try:
        check(*arguments)
    except (TypeError, ValueError):
        return False
    return True


def _apply(
    function: type[torch.autograd.Function], tensors: tuple[Tensor | None, ...], *options: Any
) -> Tensor:
    """`function.apply`: the differentiable arguments, then the others."""
    if torch.compiler.is_compiling():
        # Dynamo gives no Function one tensor twice: a view stands for it from the second time on.
        tensors = tuple(
            t.view_as(t) if t is not None and any(t is earlier for earlier in tensors[:i]) else t
            for i, t in enumerate(tensors)
        )
        return function.apply(*tensors, *options)
    # Past what `Function.apply` does for torch.func, whose transforms run eagerly: of the 17 us of
    # a small call that takes 2.
    return super(torch.autograd.Function, function).apply(*tensors, *options)  # type: ignore[misc]


def _needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:  # a generator for any() would take as long as the rest
            if tensor is not None and tensor.requires_grad:
                # In inference mode `enable_grad` records nothing; dynamo has no word for that.
                return torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()
    return False


def _checking_backend(x: Tensor) -> str | None:
    """The backend of a call that has nothing out of the ordinary, if its kernels check arguments.

    They find out as well as `fusedskip.checks` that something is wrong, and change nothing then;
    what it is those checks say better. They take 3 us of the 11 of a small call, and 15 of 80
    where the rest of a network has driven them out of the caches.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or type(x) is not Tensor:
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    backend = backends.select(x)
    return backend if backend in ("cpu", "cuda") and x.numel() > 0 else None


def _choose(
    x: Tensor, needs_grad: bool, training: bool = False, vectors: Iterable[Tensor | None] = ()
) -> str:
    """The backend of a call: `eager` too where torch's own operators are what is wanted."""
    backend = backends.select(x)
    if torch.compiler.is_compiling():
        # What torch.export makes is to run without fusedskip. An evaluation is pointwise: Inductor
        # fuses it with its neighbours, too. A gradient that is itself part of the graph may have to
        # be differentiated.
        is_differentiated = getattr(torch._dynamo.config, "trace_autograd_ops", False)
        plain = _is_exporting() or is_differentiated or not (training or needs_grad)
    else:
        plain = torch._C._is_tracing()
    plain = plain or (type(x) is not Tensor and _is_distributed(x))
    # The level is read here, too, where dynamo guards on it.
    if plain or x.numel() == 0 or _is_transformed() or forward_ad._current_level >= 0:
        return "eager"
    return backend if take_vectors(vectors) else "eager"


# Called by dynamo while it traces: by its own answer, torch 2.11 exports whatever it compiles.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


def _is_distributed(x: Tensor) -> bool:
    """Whether `x` is a DTensor, which has rules for torch's own operators alone."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(x, module.DTensor):
        return False
    backends.warn_of_eager("on distributed tensors")
    return True


# A constant to dynamo, which guards on the active transforms by itself.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_transformed() -> bool:
    """Whether the call is inside `torch.func.grad`, `vmap` or forward-mode differentiation."""
    if not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0:
        return False
    backends.warn_of_eager("inside the transforms of torch.func and forward-mode differentiation")
    return True

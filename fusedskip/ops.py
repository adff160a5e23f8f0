"""The raw operators: schemas, fakes, and where each implementation comes from.

Two namespaces hold the same operators: `fusedskip` is compiled (`csrc/bindings` registers
the CPU and CUDA kernels), `fusedskip_triton` launches `fusedskip.triton_kernels`. They are private,
know nothing of autograd, and are given dense tensors of one memory layout. The compiled ones refuse
tensors that do not belong together; before the others `fusedskip.functional` checks all arguments.

`mask` holds one bit an element, 1 where the gradient passes: `not (out <= 0)`. Its rows are those
of memory, each padded to whole bytes; see `mask_shape`. A result not asked for has shape (0,).
"""

import importlib
import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

COMPILED, TRITON = "fusedskip", "fusedskip_triton"


def memory_view(x: Tensor) -> tuple[int, int, int]:
    """`(n_outer, n_channels, n_inner)` of a dense `(N, C, *)` tensor, in the order of its memory.

    Contiguous: `(N, C, spatial)`. Channels-last: `(N * spatial, C, 1)`.
    """
    n_channels, spatial = x.shape[1], math.prod(x.shape[2:])
    if x.is_contiguous():
        return x.shape[0], n_channels, spatial
    return x.shape[0] * spatial, n_channels, 1


def mask_shape(view: tuple[int, int, int]) -> tuple[int, int]:
    """Shape of the 1-bit mask: a row for each plane of a channel, or channels-last each pixel."""
    n_outer, n_channels, n_inner = view
    if n_inner == 1:
        return n_outer, (n_channels + 7) // 8
    return n_outer * n_channels, (n_inner + 7) // 8


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of mean, rstd and every sum: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# By name: the schema, and what it returns of fake tensors.
_OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {}


def _operator(*mutates: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make an operator `name` of its fake `_name`, whose annotations are the schema."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(fake)
        def of_one_device(x: Tensor, *others: Any) -> Any:
            # One meta tensor among others brings a call here, to return what nothing has written.
            if type(x) is Tensor and not x.is_meta:
                raise ValueError(f"an argument is on device meta, the first on {x.device}")
            return fake(x, *others)

        schema = torch.library.infer_schema(fake, mutates_args=mutates)
        _OPERATORS[fake.__name__.removeprefix("_")] = schema, of_one_device
        return fake

    return register


@_operator()
def _add_relu(
    x: Tensor, residual: Tensor, relu_first: bool, save_mask: bool
) -> tuple[Tensor, Tensor]:
    """relu(x + residual), or relu_first: relu(x) + residual, and the mask."""
    shape = mask_shape((1, 1, x.numel())) if save_mask else (0,)
    return torch.empty_like(x), x.new_empty(shape, dtype=torch.uint8)


@_operator()
def _add_relu_backward(dout: Tensor, mask: Tensor) -> Tensor:
    """The gradient of what ReLU was given."""
    return torch.empty_like(dout)


@_operator("running_mean", "running_var")
def _batch_norm(
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
    """relu?(bn(x) + residual?), the mask, and statistics: (2, C), mean and rstd.

    Without running statistics, evaluation has mean 0 and variance 1. save_mask is for residuals:
    without one, backward recomputes the mask from x.
    """
    return _fake_forward(x, save_mask)


@_operator()
def _batch_norm_inference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """What batch_norm returns first in evaluation.

    Three arguments and two results less are 1 us less, of the 4 of a small call.
    """
    return torch.empty_like(x)


@_operator()
def _batch_norm_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients dx, dresidual, dweight, dbias."""
    return (
        _fake_like(x, need_dx),
        _fake_like(x, need_dresidual),
        _fake_gradient(weight, x, need_dparams),
        _fake_gradient(bias, x, need_dparams),
    )


@_operator("running_mean", "running_var", "out")
def _batch_norm_relu_into(
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
    """relu(bn(x)) into part of a wider tensor; its statistics.

    `out` is laid out like x, but for the distance from one image, channels-last from one pixel, to
    the next. Its backward is batch_norm_backward.
    """
    return _fake_statistics(x)


@_operator("running_mean", "running_var", "residual_running_mean", "residual_running_var")
def _dual_batch_norm(
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
    """relu(bn(x) + bn'(residual)), the mask, and statistics: (2, 2, C), those of x first."""
    return _fake_forward(x, save_mask, 2)


@_operator()
def _dual_batch_norm_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients dx, dresidual, and those of the parameters in their order."""
    return (
        _fake_like(x, need_dx),
        _fake_like(x, need_dresidual),
        _fake_gradient(weight, x, need_dparams),
        _fake_gradient(bias, x, need_dparams),
        _fake_gradient(residual_weight, x, need_dparams),
        _fake_gradient(residual_bias, x, need_dparams),
    )


# The stages of a norm of a batch that is spread over ranks, between which these communicate. Two of
# the four are above, with training=False: batch_norm by the merged mean and var, and
# batch_norm_backward for dweight and dbias alone.


@_operator()
def _batch_norm_stats(x: Tensor) -> Tensor:
    """The moments of a rank's x.

    Of each channel its mean, then of each M2, the sum of squared deviations, then the number of
    elements a channel: (2C + 1,).
    """
    return x.new_empty((2 * x.shape[1] + 1,), dtype=statistics_dtype(x.dtype))


@_operator("running_mean", "running_var")
def _batch_norm_merge(
    moments: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean and the biased variance of a whole batch, and its elements a channel: (1,).

    `moments` has a row from each rank, zeros from one without elements.
    """
    mean = moments.new_empty((moments.shape[1] // 2,))
    return mean, torch.empty_like(mean), moments.new_empty((1,))


@_operator()
def _batch_norm_backward_apply(
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
) -> tuple[Tensor, Tensor]:
    """The gradients dx and dresidual, by `means` over the whole batch.

    Those of g, the gradient behind the ReLU, then those of g * (x - mean) * rstd: (2C,).
    """
    return (
        _fake_like(x, need_dx),
        _fake_like(x, need_dresidual),
    )


def _fake_forward(x: Tensor, save_mask: bool, *norms: int) -> tuple[Tensor, Tensor, Tensor]:
    mask = mask_shape(memory_view(x)) if save_mask else (0,)
    return torch.empty_like(x), x.new_empty(mask, dtype=torch.uint8), _fake_statistics(x, *norms)


def _fake_statistics(x: Tensor, *norms: int) -> Tensor:
    return x.new_empty((*norms, 2, x.shape[1]), dtype=statistics_dtype(x.dtype))


def _fake_like(x: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(x) if wanted else x.new_empty((0,))


def _fake_gradient(parameter: Tensor | None, x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty((0,)) if parameter is None or not wanted else torch.empty_like(parameter)


def _triton_launcher(name: str) -> Callable[..., Any]:
    """A launcher that imports Triton at its first call: the import takes half a second."""

    def launch(*args: Any) -> Any:
        from fusedskip.triton_kernels import ops

        return getattr(ops, name)(*args)

    return launch


def _define(namespace: str) -> torch.library.Library:
    library = torch.library.Library(namespace, "DEF")
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    for name, (schema, fake) in _OPERATORS.items():
        library.define(name + schema, tags=tags)
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return library


def _load_compiled() -> Exception | None:
    """Import the extension, which registers its kernels; return why it could not be had."""
    try:
        importlib.import_module("fusedskip._C")
    except ImportError as error:
        return error
    return None


NAMES = tuple(_OPERATORS)
# The definitions live as long as these objects.
_libraries = {namespace: _define(namespace) for namespace in (COMPILED, TRITON)}
compiled_error = _load_compiled()
for _name in _OPERATORS:
    for _key in ("CPU", "CUDA"):
        _libraries[TRITON].impl(_name, _triton_launcher(_name), _key)


def has_kernel(namespace: str, dispatch_key: str) -> bool:
    """Whether `namespace` has kernels for `"CPU"` or `"CUDA"` in this installation."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::batch_norm", dispatch_key)

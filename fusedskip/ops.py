"""The raw operators: schemas, fakes, and where each implementation comes from.

Two namespaces hold the same operators: `fusedskip` is compiled (`csrc/bindings` registers
the CPU and CUDA kernels), `fusedskip_triton` launches `fusedskip.triton_kernels`. They are private,
know nothing of autograd, and check only what memory safety needs: `fusedskip.functional` has
checked the arguments and gives dense tensors of one memory layout.

`mask` holds one bit an element, 1 where the gradient passes: `not (out <= 0)`. Its rows are those
of memory, each padded to whole bytes; see `mask_shape`. A result not asked for has shape (0,).
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COMPILED, TRITON = "fusedskip", "fusedskip_triton"

_SCHEMAS = {
    # relu(x + residual), or relu_first: relu(x) + residual. The gradient of what ReLU was given
    # is the same.
    "add_relu": (
        "(Tensor x, Tensor residual, bool relu_first, bool save_mask) -> (Tensor out, Tensor mask)"
    ),
    "add_relu_backward": "(Tensor dout, Tensor mask) -> Tensor dx",
    # Without running statistics, evaluation has mean 0 and variance 1. save_mask is for residuals:
    # without one, backward recomputes the mask from x.
    "batch_norm": (
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
        "Tensor(a!)? running_mean, Tensor(b!)? running_var, "
        "bool training, float momentum, float eps, bool relu, bool save_mask) "
        "-> (Tensor out, Tensor mask, Tensor mean, Tensor rstd)"
    ),
    "batch_norm_backward": (
        "(Tensor dout, Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, "
        "Tensor mean, Tensor rstd, bool training, bool relu, "
        "bool need_dx, bool need_dresidual, bool need_dparams) "
        "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
    ),
    # relu(bn(x)) into part of a wider tensor: out is laid out like x, but for the distance from one
    # image, channels-last from one pixel, to the next. Its backward is batch_norm_backward.
    "batch_norm_relu_into": (
        "(Tensor x, Tensor? weight, Tensor? bias, "
        "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!) out, "
        "bool training, float momentum, float eps) -> (Tensor mean, Tensor rstd)"
    ),
    # relu(bn(x) + bn'(residual)); mean and rstd are (2, C), those of x first.
    "dual_batch_norm": (
        "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, "
        "Tensor(a!)? running_mean, Tensor(b!)? running_var, "
        "Tensor? residual_weight, Tensor? residual_bias, "
        "Tensor(c!)? residual_running_mean, Tensor(d!)? residual_running_var, "
        "bool training, float momentum, float eps, float residual_momentum, float residual_eps, "
        "bool save_mask) -> (Tensor out, Tensor mask, Tensor mean, Tensor rstd)"
    ),
    "dual_batch_norm_backward": (
        "(Tensor dout, Tensor x, Tensor residual, Tensor mask, Tensor? weight, Tensor? bias, "
        "Tensor? residual_weight, Tensor? residual_bias, Tensor mean, Tensor rstd, "
        "bool training, bool need_dx, bool need_dresidual, bool need_dparams) "
        "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, "
        "Tensor residual_dweight, Tensor residual_dbias)"
    ),
    # A norm of a batch that is spread over ranks: the stages between which these communicate. Two
    # of the four are above, with training=False: batch_norm by the merged mean and var, and
    # batch_norm_backward for dweight and dbias alone.
    #
    # Of a rank's x: the mean of each channel, then M2, the sum of squared deviations, of each, then
    # the number of elements a channel: (2C + 1,).
    "batch_norm_stats": "(Tensor x) -> Tensor moments",
    # moments has a row from each rank, zeros from one without elements. var is biased; count (1,).
    "batch_norm_merge": (
        "(Tensor moments, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum) "
        "-> (Tensor mean, Tensor var, Tensor count)"
    ),
    # means, of the whole batch: of g, the gradient behind the ReLU, then of g * (x - mean) * rstd:
    # (2C,).
    "batch_norm_backward_apply": (
        "(Tensor dout, Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, "
        "Tensor mean, Tensor rstd, Tensor means, bool relu, bool need_dx, bool need_dresidual) "
        "-> (Tensor dx, Tensor dresidual)"
    ),
}


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


def _fake_add_relu(
    x: Tensor, residual: Tensor, relu_first: bool, save_mask: bool
) -> tuple[Tensor, Tensor]:
    shape = mask_shape((1, 1, x.numel())) if save_mask else (0,)
    return torch.empty_like(x), x.new_empty(shape, dtype=torch.uint8)


def _fake_add_relu_backward(dout: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(dout)


def _fake_batch_norm(
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
    return _fake_forward(x, save_mask, (x.shape[1],))


def _fake_batch_norm_backward(
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
    return (
        torch.empty_like(x) if need_dx else x.new_empty((0,)),
        torch.empty_like(x) if need_dresidual else x.new_empty((0,)),
        _fake_gradient(weight, x, need_dparams),
        _fake_gradient(bias, x, need_dparams),
    )


def _fake_batch_norm_relu_into(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    out: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    mean = x.new_empty((x.shape[1],), dtype=statistics_dtype(x.dtype))
    return mean, torch.empty_like(mean)


def _fake_dual_batch_norm(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_forward(x, save_mask, (2, x.shape[1]))


def _fake_dual_batch_norm_backward(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    need_dx: bool,
    need_dresidual: bool,
    need_dparams: bool,
) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(x) if need_dx else x.new_empty((0,)),
        torch.empty_like(x) if need_dresidual else x.new_empty((0,)),
        _fake_gradient(weight, x, need_dparams),
        _fake_gradient(bias, x, need_dparams),
        _fake_gradient(residual_weight, x, need_dparams),
        _fake_gradient(residual_bias, x, need_dparams),
    )


def _fake_batch_norm_stats(x: Tensor) -> Tensor:
    return x.new_empty((2 * x.shape[1] + 1,), dtype=statistics_dtype(x.dtype))


def _fake_batch_norm_merge(
    moments: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean = moments.new_empty((moments.shape[1] // 2,))
    return mean, torch.empty_like(mean), moments.new_empty((1,))


def _fake_batch_norm_backward_apply(
    dout: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    means: Tensor,
    relu: bool,
    need_dx: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x) if need_dx else x.new_empty((0,)),
        torch.empty_like(x) if need_dresidual else x.new_empty((0,)),
    )


def _fake_forward(
    x: Tensor, save_mask: bool, statistics: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = mask_shape(memory_view(x)) if save_mask else (0,)
    mean = x.new_empty(statistics, dtype=statistics_dtype(x.dtype))
    return torch.empty_like(x), x.new_empty(mask, dtype=torch.uint8), mean, torch.empty_like(mean)


def _fake_gradient(parameter: Tensor | None, x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty((0,)) if parameter is None or not wanted else torch.empty_like(parameter)


_FAKES: dict[str, Callable[..., Any]] = {
    "add_relu": _fake_add_relu,
    "add_relu_backward": _fake_add_relu_backward,
    "batch_norm": _fake_batch_norm,
    "batch_norm_backward": _fake_batch_norm_backward,
    "batch_norm_relu_into": _fake_batch_norm_relu_into,
    "dual_batch_norm": _fake_dual_batch_norm,
    "dual_batch_norm_backward": _fake_dual_batch_norm_backward,
    "batch_norm_stats": _fake_batch_norm_stats,
    "batch_norm_merge": _fake_batch_norm_merge,
    "batch_norm_backward_apply": _fake_batch_norm_backward_apply,
}


def _triton_launcher(name: str) -> Callable[..., Any]:
    """A launcher that imports Triton at its first call: the import takes half a second."""

    def launch(*args: Any) -> Any:
        from fusedskip.triton_kernels import ops

        return getattr(ops, name)(*args)

    return launch


def _define(namespace: str) -> torch.library.Library:
    library = torch.library.Library(namespace, "DEF")
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    for name, schema in _SCHEMAS.items():
        library.define(name + schema, tags=tags)
        torch.library.register_fake(f"{namespace}::{name}", _FAKES[name], lib=library)
    return library


def _load_compiled() -> Exception | None:
    """Import the extension, which registers its kernels; return why it could not be had."""
    try:
        importlib.import_module("fusedskip._C")
    except ImportError as error:
        return error
    return None


# The definitions live as long as these objects.
_libraries = {namespace: _define(namespace) for namespace in (COMPILED, TRITON)}
compiled_error = _load_compiled()
for _name in _SCHEMAS:
    for _key in ("CPU", "CUDA"):
        _libraries[TRITON].impl(_name, _triton_launcher(_name), _key)


def has_kernel(namespace: str, dispatch_key: str) -> bool:
    """Whether `namespace` has kernels for `"CPU"` or `"CUDA"` in this installation."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::batch_norm", dispatch_key)

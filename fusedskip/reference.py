"""The fused operations in plain torch: the oracle of the tests and the `eager` backend.

Each function is the best eager form (in-place add and ReLU), so that it is also the baseline of the
benchmarks. Shapes and arguments are those of `fusedskip.functional`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """`relu(x + residual)`."""
    return torch.add(x, residual).relu_()


def relu_add(x: Tensor, residual: Tensor) -> Tensor:
    """`relu(x) + residual`."""
    return torch.add(torch.relu(x), residual)  # not in place: backward needs what ReLU gave


def bias_add_relu(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    """`relu(x + residual + bias)`, `bias` a number a channel."""
    wide = bias.to(x.dtype).view(-1, *(1,) * (x.dim() - 2))
    return _add(torch.add(x, residual), wide).relu_()


def batch_norm(
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
    """`relu?(batch_norm(x) + residual?)`, the expression behind every `batch_norm_*` function."""
    out = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        out = _add(out, residual)
    return out.relu_() if relu else out


def cat_batch_norm_relu(
    x: Tensor,
    skip: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """`cat([skip, relu(batch_norm(x))], dim=1)`."""
    out = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return torch.cat([skip, out.relu_()], dim=1)


def dual_batch_norm_add_relu(
    x: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual_running_mean: Tensor | None,
    residual_running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual_momentum: float,
    residual_eps: float,
) -> Tensor:
    """`relu(batch_norm(x) + batch_norm'(residual))`."""
    out = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    normalised = F.batch_norm(
        residual, residual_running_mean, residual_running_var, residual_weight, residual_bias,
        training, residual_momentum, residual_eps,
    )  # fmt: skip
    return _add(out, normalised).relu_()


def _add(out: Tensor, other: Tensor) -> Tensor:
    """`out + other`, in place but under vmap, where it may be `other` alone that has a batch."""
    return out + other if torch._C._are_functorch_transforms_active() else out.add_(other)

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
        out = out.add_(residual)
    return out.relu_() if relu else out

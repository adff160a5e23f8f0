"""Fused modules: the batch norms of `torch.nn` with the rest of the tail in the same pass.

They subclass `nn.BatchNorm1d/2d/3d`: constructors, parameters, buffers, state_dicts are theirs.
"""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from fusedskip import functional


def _forward(bn: _BatchNorm, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """`relu?(bn(x) + residual?)` with the bookkeeping of `nn.BatchNorm*d.forward`."""
    bn._check_input_dim(x)
    update = bn.training and bn.track_running_stats
    counter = bn.num_batches_tracked if update else None
    momentum = bn.momentum
    if momentum is None:  # the cumulative average
        momentum = 0.0 if counter is None else 1.0 / (float(counter) + 1.0)
    # Buffers take part in training when tracked, and in evaluation always.
    use_buffers = update or not bn.training
    running_mean, running_var = (bn.running_mean, bn.running_var) if use_buffers else (None, None)
    training = bn.training or (bn.running_mean is None and bn.running_var is None)
    out = functional._batch_norm(
        x, residual, running_mean, running_var, bn.weight, bn.bias,
        training, momentum, bn.eps, relu,
    )  # fmt: skip
    if counter is not None:  # after the call: a refused one counts nothing
        counter.add_(1)
    return out


class _BatchNormReLU(_BatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x, None, relu=True)


class _BatchNormAddReLU(_BatchNorm):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return _forward(self, x, residual, relu=True)


class BatchNormReLU1d(_BatchNormReLU, nn.BatchNorm1d):
    """`relu(BatchNorm1d(x))` in one operation; `x` is `(N, C)` or `(N, C, L)`."""


class BatchNormReLU2d(_BatchNormReLU, nn.BatchNorm2d):
    """`relu(BatchNorm2d(x))` in one operation; `x` is `(N, C, H, W)`."""


class BatchNormReLU3d(_BatchNormReLU, nn.BatchNorm3d):
    """`relu(BatchNorm3d(x))` in one operation; `x` is `(N, C, D, H, W)`."""


class BatchNormAddReLU1d(_BatchNormAddReLU, nn.BatchNorm1d):
    """`relu(BatchNorm1d(x) + residual)` in one operation; both `(N, C)` or `(N, C, L)`."""


class BatchNormAddReLU2d(_BatchNormAddReLU, nn.BatchNorm2d):
    """`relu(BatchNorm2d(x) + residual)` in one operation; both `(N, C, H, W)`."""


class BatchNormAddReLU3d(_BatchNormAddReLU, nn.BatchNorm3d):
    """`relu(BatchNorm3d(x) + residual)` in one operation; both `(N, C, D, H, W)`."""


class AddReLU(nn.Module):
    """`relu(x + residual)` in one operation; any shape, the same for both."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return functional.add_relu(x, residual)


_FUSIBLE_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_plain(module: nn.Module) -> bool:
    """Whether bypassing `module.forward` goes unnoticed: no hooks, no forward of its own."""
    attributes = module.__dict__
    return "forward" not in attributes and not any(attributes[hooks] for hooks in _HOOKS)


def norm_add_act(
    norm: nn.Module, act: nn.Module, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """`act(norm(x) + residual?)`: fused where the children are what kernels compute, else eager.

    Fused for exactly `nn.BatchNorm1d/2d/3d` and `nn.ReLU` without hooks or a patched forward. That
    is looked at in every call, so that a child replaced later (SyncBatchNorm, another activation,
    parametrized weights) is honoured.

    Args:
        norm, act: the children of a block.
        x: `(N, C, *)`.
        residual: shape of `norm(x)`, or None.

    Raises:
        ValueError: the shapes of `x` and `residual` differ.
    """
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual: expected shape {tuple(x.shape)} like x, got {tuple(residual.shape)}"
        )
    if (
        type(norm) in _FUSIBLE_NORMS
        and type(act) is nn.ReLU
        and _is_plain(norm)
        and _is_plain(act)
        and not _has_any_global_hook()
        and (residual is None or residual.dtype == x.dtype)
    ):
        return _forward(norm, x, residual, relu=True)  # type: ignore[arg-type]
    out: Tensor = norm(x)
    if residual is not None:
        out += residual
    return act(out)

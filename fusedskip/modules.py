"""Fused modules: the batch norms of `torch.nn` with the rest of the tail in the same pass.

They subclass `nn.BatchNorm1d/2d/3d`: constructors, parameters, buffers, state_dicts are theirs.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedskip import functional
from fusedskip.tracing import leaf


class _Call:
    """What `nn.BatchNorm*d.forward` passes to `F.batch_norm`, and what it then counts."""

    def __init__(self, bn: _BatchNorm, x: Tensor) -> None:
        bn._check_input_dim(x)
        tracks = bn.training and bn.track_running_stats
        # Buffers take part in training when tracked, and in evaluation always.
        use_buffers = tracks or not bn.training
        running: tuple[Tensor | None, ...] = (None, None)
        if use_buffers:
            running = bn.running_mean, bn.running_var
        self.training = bn.training or (bn.running_mean is None and bn.running_var is None)
        self.momentum = bn.momentum or 0.0
        self._counter = bn.num_batches_tracked if tracks else None
        self._averages: list[tuple[Tensor, Tensor]] = []
        if bn.momentum is None and self._counter is not None:
            # The cumulative average weighs this batch by 1 / counter, which is on the device:
            # reading it would wait for that, or break a graph.
            self._averages = [(r, torch.zeros_like(r)) for r in running if r is not None]
            running = tuple(batch for _, batch in self._averages) or running
            self.momentum = 1.0
        self.running_mean, self.running_var = running

    def count(self) -> None:
        """Update the counter, after the call: a refused one counts nothing."""
        if self._counter is None:
            return
        self._counter.add_(1)
        for running, batch in self._averages:
            running.lerp_(batch, self._counter.to(running.dtype).reciprocal())


def apply_norm(bn: _BatchNorm, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """`relu?(bn(x) + residual?)` with the bookkeeping of `nn.BatchNorm*d.forward`."""
    call = _Call(bn, x)
    out = functional._batch_norm(
        x, residual, call.running_mean, call.running_var, bn.weight, bn.bias,
        call.training, call.momentum, bn.eps, relu,
    )  # fmt: skip
    call.count()
    return out


def apply_cat_norm(bn: _BatchNorm, x: Tensor, skip: Tensor) -> Tensor:
    """`cat([skip, relu(bn(x))], dim=1)`, the bookkeeping of `bn` included."""
    call = _Call(bn, x)
    out = functional.cat_batch_norm_relu(
        x, skip, call.running_mean, call.running_var, bn.weight, bn.bias,
        call.training, call.momentum, bn.eps,
    )  # fmt: skip
    call.count()
    return out


def apply_dual_norm(bn: _BatchNorm, x: Tensor, residual_bn: _BatchNorm, residual: Tensor) -> Tensor:
    """`relu(bn(x) + residual_bn(residual))`, the bookkeeping of both included."""
    if bn is residual_bn or bn.training != residual_bn.training:  # one of them frozen
        return apply_norm(bn, x, residual_bn(residual), relu=True)
    call, other = _Call(bn, x), _Call(residual_bn, residual)
    if call.training != other.training:  # only one tracks statistics
        return apply_norm(bn, x, residual_bn(residual), relu=True)
    out = functional.dual_batch_norm_add_relu(
        x, residual, call.running_mean, call.running_var, other.running_mean, other.running_var,
        bn.weight, bn.bias, residual_bn.weight, residual_bn.bias,
        call.training, call.momentum, bn.eps, other.momentum, residual_bn.eps,
    )  # fmt: skip
    call.count()
    other.count()
    return out


class _BatchNormReLU(_BatchNorm):
    @leaf
    def forward(self, x: Tensor) -> Tensor:
        return apply_norm(self, x, None, relu=True)


class _BatchNormAddReLU(_BatchNorm):
    @leaf
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return apply_norm(self, x, residual, relu=True)


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

"""Fused modules: the batch norms of `torch.nn` with the rest of the tail in the same pass.

They subclass `nn.BatchNorm1d/2d/3d`: constructors, parameters, buffers, state_dicts are theirs.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedskip import distributed, functional
from fusedskip.tracing import leaf

Model = TypeVar("Model", bound=nn.Module)


# The classes of norms that are frozen for good, and their eps; None for those that have their own.
FROZEN: dict[type[nn.Module], float | None] = {}


class _Call:
    """What `nn.BatchNorm*d.forward` passes to `F.batch_norm`, and what it then counts."""

    __slots__ = (
        "_averages", "_counter", "bias", "eps", "group", "momentum", "running_mean", "running_var",
        "training", "weight",
    )  # fmt: skip

    def __init__(self, bn: Any, x: Tensor) -> None:
        self.group = self._counter = None
        self._averages: list[tuple[Tensor, Tensor]] = []
        if not isinstance(bn, _BatchNorm):
            return self._freeze(bn)
        bn._check_input_dim(x)
        self.eps, self.momentum = bn.eps, bn.momentum or 0.0
        self.weight: Tensor | None
        self.bias: Tensor | None
        self.weight, self.bias = bn.weight, bn.bias
        self.running_mean, self.running_var = bn.running_mean, bn.running_var
        if not bn.training:
            self.training = self.running_mean is None and self.running_var is None
            return
        self.training = True
        if isinstance(bn, (SyncBatchNorm, nn.SyncBatchNorm)):
            self.group = distributed.group_of(bn.process_group)
        if not bn.track_running_stats:
            self.running_mean = self.running_var = None
            return
        self._counter = bn.num_batches_tracked
        # A batch without elements has no statistics to average.
        has_statistics = x.numel() > 0 or self.group is not None
        if bn.momentum is None and self._counter is not None and has_statistics:
            self._average(self._counter)

    def _freeze(self, norm: Any) -> None:
        """Of a norm that is frozen for good: all that it has are buffers."""
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.training, self.momentum = False, 0.0
        eps = FROZEN.get(type(norm))
        self.eps = norm.eps if eps is None else eps
        if torch.is_grad_enabled():
            # Eager keeps none of them for backward: a checkpoint may be loaded before that.
            self.weight, self.bias = self.weight.clone(), self.bias.clone()

    def _average(self, counter: Tensor) -> None:
        """Of a norm without momentum: its statistics are the averages over all batches."""
        running = self.running_mean, self.running_var
        buffers = [r for r in running if r is not None]
        if any(r.dtype.itemsize == 2 for r in buffers):
            # As eager does: 16 bits may not hold one batch's variance, nor the counter.
            self.momentum = 1.0 / (float(counter) + 1.0)
        elif len(buffers) == 2:
            # The cumulative average weighs this batch by 1 / counter, which is on the device:
            # reading it would wait for that, or break a graph.
            self._averages = [(r, torch.zeros_like(r)) for r in buffers]
            self.running_mean, self.running_var = (batch for _, batch in self._averages)
            self.momentum = 1.0

    def norm(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        """`relu?(bn(x) + residual?)`, and count."""
        tensors = x, residual, self.running_mean, self.running_var, self.weight, self.bias
        if self.group is not None:
            return _run_and_count(
                (self,), distributed.sync_batch_norm,
                *tensors, self.momentum, self.eps, relu, self.group,
            )  # fmt: skip
        options = self.training, self.momentum, self.eps, relu
        if self._counter is None:  # nothing to count: 2 us less of 46 out of cold caches
            return functional._batch_norm(*tensors, *options)
        return _run_and_count((self,), functional._batch_norm, *tensors, *options)

    def ask_to_count(self) -> None:
        """Raise what `count` would raise of a transform that cannot change the counter."""
        if self._counter is not None:
            self._counter.add_(0)

    def count(self) -> None:
        """Update the counter."""
        if self._counter is None:
            return
        self._counter.add_(1)
        for running, batch in self._averages:
            # A forward that is yet to be differentiated may have saved it, as torch's own does not.
            running.data.lerp_(batch, self._counter.to(running.dtype).reciprocal())


def _run_and_count(
    calls: tuple[_Call, ...], function: Callable[..., Tensor], *arguments: Any
) -> Tensor:
    """What the function returns; the calls are counted, unless it has refused its arguments."""
    if torch._C._are_functorch_transforms_active():  # ahead of the running statistics
        for call in calls:
            call.ask_to_count()
    try:
        out = function(*arguments)
    except (TypeError, ValueError, RuntimeError):
        raise
    except Exception:
        # torch.utils.checkpoint ends a recomputation when all has been saved that is needed.
        for call in calls:
            call.count()
        raise
    for call in calls:
        call.count()
    return out


def is_torchs(bn: nn.Module, x: Tensor) -> bool:
    """Whether `bn`, frozen for good, is to be called: no kernel does what it does with this `x`.

    It is arithmetic of torch, which promotes dtypes, broadcasts, keeps any strides and
    differentiates by all of its buffers.
    """
    if isinstance(bn, _BatchNorm):
        return False
    if x.dim() != 4 or not (
        x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    ):
        return True
    shape, dtype = x.shape[1:2], x.dtype
    for name in ("weight", "bias", "running_mean", "running_var"):
        buffer = bn._buffers.get(name)
        if buffer is None or buffer.dtype != dtype or buffer.shape != shape or buffer.requires_grad:
            return True
    return False


def apply_norm(bn: nn.Module, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """`relu?(bn(x) + residual?)` with the bookkeeping of `nn.BatchNorm*d.forward`.

    `bn` is one of torch's, or of `FROZEN` and not `is_torchs`.
    """
    return _Call(bn, x).norm(x, residual, relu)


def apply_cat_norm(bn: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
    """`cat([skip, relu(bn(x))], dim=1)`, the bookkeeping of `bn` included."""
    call = _Call(bn, x)
    if call.group is not None:
        return torch.cat([skip, call.norm(x, None, relu=True)], dim=1)
    return _run_and_count(
        (call,), functional.cat_batch_norm_relu,
        x, skip, call.running_mean, call.running_var, call.weight, call.bias,
        call.training, call.momentum, call.eps,
    )  # fmt: skip


def apply_dual_norm(bn: nn.Module, x: Tensor, residual_bn: nn.Module, residual: Tensor) -> Tensor:
    """`relu(bn(x) + residual_bn(residual))`, the bookkeeping of both included."""
    call, other = _Call(bn, x), _Call(residual_bn, residual)
    is_one = call.training == other.training  # neither alone is frozen
    if not is_one or call.group is not None or other.group is not None:
        return call.norm(x, other.norm(residual, None, relu=False), relu=True)
    return _run_and_count(
        (call, other), functional.dual_batch_norm_add_relu,
        x, residual, call.running_mean, call.running_var, other.running_mean, other.running_var,
        call.weight, call.bias, other.weight, other.bias,
        call.training, call.momentum, call.eps, other.momentum, other.eps,
    )  # fmt: skip


# Their tensor is `input` to who passes it by name, as it is to torch's norms.


class _BatchNormReLU(_BatchNorm):
    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return apply_norm(self, input, None, relu=True)


class _BatchNormAddReLU(_BatchNorm):
    @leaf
    def forward(self, input: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return apply_norm(self, input, residual, relu=True)


class BatchNormReLU1d(_BatchNormReLU, nn.BatchNorm1d):
    """`relu(BatchNorm1d(input))` in one operation; `input` is `(N, C)` or `(N, C, L)`."""


class BatchNormReLU2d(_BatchNormReLU, nn.BatchNorm2d):
    """`relu(BatchNorm2d(input))` in one operation; `input` is `(N, C, H, W)`."""


class BatchNormReLU3d(_BatchNormReLU, nn.BatchNorm3d):
    """`relu(BatchNorm3d(input))` in one operation; `input` is `(N, C, D, H, W)`."""


NORM_RELUS = (BatchNormReLU1d, BatchNormReLU2d, BatchNormReLU3d)


class BatchNormAddReLU1d(_BatchNormAddReLU, nn.BatchNorm1d):
    """`relu(BatchNorm1d(input) + residual)` in one operation; both `(N, C)` or `(N, C, L)`."""


class BatchNormAddReLU2d(_BatchNormAddReLU, nn.BatchNorm2d):
    """`relu(BatchNorm2d(input) + residual)` in one operation; both `(N, C, H, W)`."""


class BatchNormAddReLU3d(_BatchNormAddReLU, nn.BatchNorm3d):
    """`relu(BatchNorm3d(input) + residual)` in one operation; both `(N, C, D, H, W)`."""


class SyncBatchNorm(_BatchNorm):
    """`nn.SyncBatchNorm` in fused kernels, on GPUs and, unlike that, on CPUs; of `(N, C, *)`.

    Constructor, parameters and buffers are those of `nn.SyncBatchNorm`, which it is no subclass of:
    DistributedDataParallel refuses that on CPUs.

    Args:
        process_group: whose batches are one; all processes by default.

    Raises:
        ValueError: in forward, `input` has fewer than two dimensions.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return apply_norm(self, input, None, relu=False)


class SyncBatchNormReLU(_BatchNormReLU, SyncBatchNorm):
    """`relu(SyncBatchNorm(input))` in one operation; `input` is `(N, C, *)`."""


class SyncBatchNormAddReLU(_BatchNormAddReLU, SyncBatchNorm):  # type: ignore[misc]
    """`relu(SyncBatchNorm(input) + residual)` in one operation; both `(N, C, *)`."""


class AddReLU(nn.Module):
    """`relu(x + residual)` in one operation; any shape, the same for both."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return functional.add_relu(x, residual)


_SYNCHRONISED: dict[type[_BatchNorm], type[SyncBatchNorm]] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), SyncBatchNorm),
    **dict.fromkeys((BatchNormReLU1d, BatchNormReLU2d, BatchNormReLU3d), SyncBatchNormReLU),
    **dict.fromkeys(
        (BatchNormAddReLU1d, BatchNormAddReLU2d, BatchNormAddReLU3d), SyncBatchNormAddReLU
    ),
    nn.SyncBatchNorm: SyncBatchNorm,
    **{kind: kind for kind in (SyncBatchNorm, SyncBatchNormReLU, SyncBatchNormAddReLU)},
}


def convert_sync_batchnorm(module: Model, process_group: Any = None) -> Model:
    """Make every batch norm in `module` a `SyncBatchNorm`, and fused ones remain what they are.

    So a `BatchNormReLU*d` becomes a `SyncBatchNormReLU`, where the conversion of `nn.SyncBatchNorm`
    would leave the ReLU out. Norms change their class and nothing else: hooks, parameters and
    buffers stay. Convert before wrapping in DistributedDataParallel or FSDP.

    Args:
        module: converted in place.
        process_group: whose batches are one; all processes by default.

    Returns:
        `module`.

    Raises:
        ValueError: a subclass, such as timm's `BatchNormAct2d`, may do more than a batch norm;
            nothing has been changed. A subclass of `nn.SyncBatchNorm` stays what it is.

    Semantics: `torch.nn.SyncBatchNorm.convert_sync_batchnorm`.
    """
    norms = {n: m for n, m in module.named_modules() if isinstance(m, _BatchNorm)}
    for name, norm in norms.items():
        if type(norm) not in _SYNCHRONISED and not isinstance(norm, nn.SyncBatchNorm):
            raise ValueError(
                f"{name or 'module'}: a {type(norm).__name__} may do more than a batch norm, which "
                "would be lost: convert it by the function of its library first"
            )
    for norm in norms.values():
        if type(norm) in _SYNCHRONISED:
            norm.__class__ = _SYNCHRONISED[type(norm)]
            norm.process_group = process_group
    return module

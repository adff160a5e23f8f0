"""Batch norm of a batch that is spread over processes: statistics, and their gradients, of all.

The four stages are those of a batch in one process, with a collective behind each that reduces:
forward gathers 2C + 1 numbers a process (mean, M2 and count, merged by Chan's formula), backward
sums 2C. Nothing waits for the device. Ranks may have batches of any size, none among them.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedskip import backends, reference
from fusedskip.backends import KERNELS
from fusedskip.checks import check_batch_norm
from fusedskip.layout import dense, strided


def group_of(process_group: Any) -> Any:
    """The group whose batches are one, by default all processes; None where that is this one."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def sync_batch_norm(
    x: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
    group: Any,
) -> Tensor:
    """`relu?(bn(x) + residual?)` in training, with the statistics of all ranks of `group`.

    The arguments and errors are those of `functional.batch_norm_add_relu`, but that one value a
    channel is enough. All ranks of the group must make the same calls, backward too.

    Semantics: `torch.nn.SyncBatchNorm` in training, `torch.add`, `torch.relu`.
    """
    check_batch_norm(x, residual, running_mean, running_var, weight, bias, True, eps, True)
    takes_vectors = backends.take_vectors((running_mean, running_var, weight, bias))
    return _SyncBatchNorm.apply(
        x, residual, running_mean, running_var, weight, bias, momentum, eps, relu, group,
        backends.select(x) if takes_vectors else "eager",
    )  # fmt: skip


# torch 2.13 renamed it. Builds without torch.distributed have neither, and no groups.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


def _stages(backend: str, x: Tensor) -> Any:
    """The operators of the stages; kernels take no tensor without elements."""
    return reference.Stages if backend == "eager" or x.numel() == 0 else KERNELS[backend]


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
        relu: bool,
        group: Any,
        backend: str,
    ) -> Tensor:
        stages = _stages(backend, x)
        dense_x = dense(x)
        residual = None if residual is None else strided(residual, dense_x.stride())
        save_mask = relu and residual is not None
        moments = stages.batch_norm_stats(dense_x)
        gathered = moments.new_empty(dist.get_world_size(group) * len(moments))
        _all_gather(gathered, moments, group=group)
        # By the same operator on every rank, for the same bits.
        mean, var, count = _stages(backend, gathered).batch_norm_merge(
            gathered.view(-1, len(moments)), running_mean, running_var, momentum
        )
        out, mask, statistics = stages.batch_norm(
            dense_x, residual, weight, bias, mean, var, False, 0.0, eps, relu, save_mask
        )
        ctx.save_for_backward(x, mask if save_mask else None, weight, bias, statistics, count)
        ctx.relu, ctx.group, ctx.backend, ctx.strides = relu, group, backend, out.stride()
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        # Not `once_differentiable`: that lets constant gradients through, and drops their terms.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("fusedskip: a synchronised norm cannot be differentiated twice")
        x, mask, weight, bias, statistics, count = ctx.saved_tensors
        need_x, need_residual, _, _, need_weight, need_bias = ctx.needs_input_grad[:6]
        stages = _stages(ctx.backend, x)
        x, dout = strided(x, ctx.strides), strided(dout, ctx.strides)
        # The sums are wanted in the precision of statistics, whatever that of the parameters.
        mean = statistics[0]
        exact_weight = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        exact_bias = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
        _, _, dweight, dbias = stages.batch_norm_backward(
            dout, x, mask, exact_weight, exact_bias, statistics, False, ctx.relu,
            False, False, True,
        )  # fmt: skip
        means = torch.cat([dbias, dweight])
        if need_x:
            dist.all_reduce(means, group=ctx.group)
            means /= count
        dx, dresidual = stages.batch_norm_backward_apply(
            dout, x, mask, weight, bias, statistics, means, ctx.relu,
            need_x, need_residual and ctx.relu,
        )  # fmt: skip
        return (
            dx if need_x else None,
            (dresidual if ctx.relu else dout) if need_residual else None,
            None,
            None,
            dweight.to(weight.dtype) if need_weight else None,
            dbias.to(bias.dtype) if need_bias else None,
            *(None,) * 5,
        )

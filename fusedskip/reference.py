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
    return _add(torch.add(x, residual), _per_channel(bias.to(x.dtype), x)).relu_()


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


class Stages:
    """The stages of a norm whose batch is spread over ranks, as the raw operators of `ops` do them.

    Shapes and arguments are theirs, but that the mask has one bool an element.
    """

    @staticmethod
    def batch_norm_stats(x: Tensor) -> Tensor:
        x = x.to(_statistics_dtype(x))
        count = x.new_full((1,), x.numel() // x.shape[1])
        mean = _sum(x) / count.clamp(min=1)
        return torch.cat([mean, _sum((x - _per_channel(mean, x)) ** 2), count])

    @staticmethod
    def batch_norm_merge(
        moments: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        n_channels = moments.shape[1] // 2
        means, m2s, counts = moments.split([n_channels, n_channels, 1], dim=1)
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count
        m2 = (m2s + counts * (means - mean) ** 2).sum(0)
        for running, batch in ((running_mean, mean), (running_var, m2 / (count - 1))):
            if running is not None:
                running.lerp_(batch.to(running.dtype), momentum)
        return mean, m2 / count, count

    @staticmethod
    def batch_norm(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        training: bool,
        momentum: float,
        eps: float,
        relu: bool,
        save_mask: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        statistics = torch.stack([mean, torch.rsqrt(var + eps)])
        out = Stages._normalised(x, weight, bias, statistics)
        out = (out if residual is None else out + residual).to(x.dtype)
        mask = ~(out <= 0)
        return out.relu() if relu else out, mask, statistics

    @staticmethod
    def batch_norm_backward(
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
    ) -> tuple[None, None, Tensor, Tensor]:
        g = Stages._gated(dout, x, mask, weight, bias, statistics, relu).to(statistics.dtype)
        return None, None, _sum(g * Stages._normalised(x, None, None, statistics)), _sum(g)

    @staticmethod
    def batch_norm_backward_apply(
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
        g = Stages._gated(dout, x, mask, weight, bias, statistics, relu)
        x_hat = Stages._normalised(x, None, None, statistics)
        mean_g, mean_gx = (_per_channel(m, x) for m in means.chunk(2))
        rstd = statistics[1]
        scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
        return (_per_channel(scale, x) * (g - mean_g - x_hat * mean_gx)).to(x.dtype), g

    @staticmethod
    def _normalised(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor
    ) -> Tensor:
        mean, rstd = statistics
        out = (x.to(mean.dtype) - _per_channel(mean, x)) * _per_channel(rstd, x)
        out = out if weight is None else out * _per_channel(weight.to(mean.dtype), x)
        return out if bias is None else out + _per_channel(bias.to(mean.dtype), x)

    @staticmethod
    def _gated(
        dout: Tensor,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Tensor,
        relu: bool,
    ) -> Tensor:
        if relu and mask is None:
            mask = ~(Stages._normalised(x, weight, bias, statistics).to(x.dtype) <= 0)
        return dout if mask is None else torch.where(mask, dout, 0)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sum(x: Tensor) -> Tensor:
    """Of each channel."""
    return x.transpose(0, 1).flatten(1).sum(1)


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """A number a channel, to be broadcast over `x`."""
    return vector.view(-1, *(1,) * (x.dim() - 2))


def _add(out: Tensor, other: Tensor) -> Tensor:
    """`out + other`, in place but under vmap, where it may be `other` alone that has a batch."""
    return out + other if torch._C._are_functorch_transforms_active() else out.add_(other)

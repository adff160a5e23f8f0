"""The runners: one training step of an operation as eager, Inductor and fusedskip have it."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import fusedskip
from fusedskip import reference

FUNCTIONS = (
    "batch_norm_add_relu", "batch_norm_relu", "dual_batch_norm_add_relu", "add_relu", "relu_add",
)  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Those for this device. Triton's interpreter, which takes CPU tensors, is not for measuring.
_TAKING = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}[DEVICE]
BACKENDS = tuple(name for name in _TAKING if name in fusedskip.available_backends())
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Inputs(NamedTuple):
    """Activations `(N, C, H, W)`; parameters and running buffers `(C,)` in fp32."""

    x: Tensor
    residual: Tensor
    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor
    residual_running_mean: Tensor
    residual_running_var: Tensor
    residual_weight: Tensor
    residual_bias: Tensor
    dout: Tensor
    copied: Tensor  # as large as x, for a copy of it

    @staticmethod
    def random(shape: tuple[int, ...], layout: str, dtype: str) -> "Inputs":
        x, residual, dout, copied = (
            torch.randn(shape, device=DEVICE, dtype=DTYPES[dtype]).contiguous(
                memory_format=LAYOUTS[layout]
            )
            for _ in range(4)
        )
        channels = [torch.ones(shape[1], device=DEVICE) for _ in range(8)]
        for parameter in (*channels[2:4], *channels[6:8]):
            parameter.requires_grad_()
        return Inputs(x.requires_grad_(), residual.requires_grad_(), *channels, dout, copied)

    @staticmethod
    def rotation(shape: tuple[int, ...], layout: str, dtype: str) -> "list[Inputs]":
        """So many inputs that, taken in turn, none is found in the L2 cache of a GPU."""
        l2 = torch.cuda.get_device_properties(0).L2_cache_size if DEVICE == "cuda" else 0
        set_size = 3 * math.prod(shape) * DTYPES[dtype].itemsize  # x, residual, dout
        n_sets = max(1, math.ceil(4 * l2 / set_size))
        return [Inputs.random(shape, layout, dtype) for _ in range(n_sets)]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        norms = self.weight, self.bias, self.residual_weight, self.residual_bias
        return self.x, self.residual, *norms


def eager(function: str, inputs: Inputs) -> Tensor:
    x, residual, *norm = inputs[:6]
    if function in ("add_relu", "relu_add"):
        return getattr(reference, function)(x, residual)
    options = {"training": True, "momentum": 0.1, "eps": 1e-5}
    if function == "dual_batch_norm_add_relu":
        mean, var, weight, bias = inputs[6:10]
        return reference.dual_batch_norm_add_relu(
            x, residual, *norm[:2], mean, var, *norm[2:], weight, bias,
            **options, residual_momentum=0.1, residual_eps=1e-5,
        )  # fmt: skip
    added = residual if function == "batch_norm_add_relu" else None
    return reference.batch_norm(x, added, *norm, **options, relu=True)


def fused(function: str, inputs: Inputs) -> Tensor:
    x, residual, *norm = inputs[:6]
    if function in ("add_relu", "relu_add"):
        return getattr(fusedskip, function)(x, residual)
    if function == "batch_norm_relu":
        return fusedskip.batch_norm_relu(x, *norm, training=True)
    if function == "dual_batch_norm_add_relu":
        mean, var, weight, bias = inputs[6:10]
        return fusedskip.dual_batch_norm_add_relu(
            x, residual, *norm[:2], mean, var, *norm[2:], weight, bias, training=True
        )
    return fusedskip.batch_norm_add_relu(x, residual, *norm, training=True)


def forward(runner: str, function: str) -> Callable[[Inputs], Tensor]:
    """The forward pass of `runner`: `"eager"`, `"compile"`, or a backend that is in use."""
    if runner == "compile":
        torch._dynamo.reset()  # or it would give up on the shapes that follow
        return partial(torch.compile(eager, fullgraph=True, dynamic=False), function)
    return partial(eager if runner == "eager" else fused, function)


def forward_backward(runner: str, function: str) -> Callable[[Inputs], object]:
    """The forward and backward pass of `runner`, with gradients for all that has an influence."""
    run = forward(runner, function)
    return lambda inputs: torch.autograd.grad(
        run(inputs), inputs.leaves, inputs.dout, allow_unused=True
    )


def copy(inputs: Inputs) -> None:
    """What bandwidth is measured by."""
    inputs.copied.copy_(inputs.x.detach())


def occupy() -> None:
    """Give a GPU a millisecond's work: what is launched meanwhile then runs without a gap."""
    if DEVICE == "cuda":
        torch.cuda._sleep(2_000_000)  # cycles

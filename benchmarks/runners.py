"""The runners: one training step of an operation as eager, Inductor and fusedskip have it."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import fusedskip
from fusedskip import reference

FUNCTIONS = ("batch_norm_add_relu", "batch_norm_relu", "add_relu")
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
        buffers = (torch.ones(shape[1], device=DEVICE) for _ in range(2))
        parameters = (torch.ones(shape[1], device=DEVICE, requires_grad=True) for _ in range(2))
        return Inputs(
            x.requires_grad_(), residual.requires_grad_(), *buffers, *parameters, dout, copied
        )

    @staticmethod
    def rotation(shape: tuple[int, ...], layout: str, dtype: str) -> "list[Inputs]":
        """So many inputs that, taken in turn, none is found in the L2 cache of a GPU."""
        l2 = torch.cuda.get_device_properties(0).L2_cache_size if DEVICE == "cuda" else 0
        set_size = 3 * math.prod(shape) * DTYPES[dtype].itemsize  # x, residual, dout
        n_sets = max(1, math.ceil(4 * l2 / set_size))
        return [Inputs.random(shape, layout, dtype) for _ in range(n_sets)]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.residual, self.weight, self.bias


def eager(function: str, inputs: Inputs) -> Tensor:
    x, residual, *rest = inputs[:6]
    if function == "add_relu":
        return reference.add_relu(x, residual)
    added = residual if function == "batch_norm_add_relu" else None
    return reference.batch_norm(x, added, *rest, training=True, momentum=0.1, eps=1e-5, relu=True)


def fused(function: str, inputs: Inputs) -> Tensor:
    x, residual, *rest = inputs[:6]
    if function == "add_relu":
        return fusedskip.add_relu(x, residual)
    if function == "batch_norm_relu":
        return fusedskip.batch_norm_relu(x, *rest, training=True)
    return fusedskip.batch_norm_add_relu(x, residual, *rest, training=True)


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

"""The runners: one training forward of an operation as eager, Inductor and fusedskip have it."""

from collections.abc import Callable
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

    @staticmethod
    def random(shape: tuple[int, ...], layout: str, dtype: str) -> "Inputs":
        activations = (
            torch.randn(shape, device=DEVICE, dtype=DTYPES[dtype])
            .contiguous(memory_format=LAYOUTS[layout])
            .requires_grad_()
            for _ in range(2)
        )
        buffers = (torch.ones(shape[1], device=DEVICE) for _ in range(2))
        parameters = (torch.ones(shape[1], device=DEVICE, requires_grad=True) for _ in range(2))
        return Inputs(*activations, *buffers, *parameters)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.residual, self.weight, self.bias


def eager(function: str, inputs: Inputs) -> Tensor:
    x, residual, *rest = inputs
    if function == "add_relu":
        return reference.add_relu(x, residual)
    added = residual if function == "batch_norm_add_relu" else None
    return reference.batch_norm(x, added, *rest, training=True, momentum=0.1, eps=1e-5, relu=True)


def fused(function: str, inputs: Inputs) -> Tensor:
    x, residual, *rest = inputs
    if function == "add_relu":
        return fusedskip.add_relu(x, residual)
    if function == "batch_norm_relu":
        return fusedskip.batch_norm_relu(x, *rest, training=True)
    return fusedskip.batch_norm_add_relu(x, residual, *rest, training=True)


def forward(runner: str, function: str, inputs: Inputs) -> Callable[[], Tensor]:
    """The forward pass of `runner`: `"eager"`, `"compile"`, or a backend that is in use."""
    if runner == "compile":
        torch._dynamo.reset()  # or it would give up on the shapes that follow
        compiled = torch.compile(eager, fullgraph=True, dynamic=False)
        return lambda: compiled(function, inputs)
    call = eager if runner == "eager" else fused
    return lambda: call(function, inputs)


def forward_backward(runner: str, function: str, inputs: Inputs) -> Callable[[], object]:
    """The forward and backward pass of `runner`, with gradients for all that has an influence."""
    run, dout = forward(runner, function, inputs), torch.randn_like(inputs.x)
    return lambda: torch.autograd.grad(run(), inputs.leaves, dout, allow_unused=True)

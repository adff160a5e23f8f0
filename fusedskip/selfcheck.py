"""The self-check of `python -m fusedskip`: every public function on one backend, against fp64.

A small odd shape in both layouts, training and evaluation, forward and backward. A result may be
twice as far from fp64 as eager's own result in the same dtype, and a few roundings further.
"""

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedskip import backends, functional, ops

_SHAPE = (3, 13, 5, 7)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
_LAYOUTS = (torch.contiguous_format, torch.channels_last)
_SUMS = ("add_relu", "relu_add", "bias_add_relu")
_NORMS = (
    "batch_norm_relu", "batch_norm_add", "batch_norm_add_relu", "dual_batch_norm_add_relu",
    "cat_batch_norm_relu",
)  # fmt: skip
# Mean, variance, rstd, coefficients, product, sum: about so many roundings in a row, each of which
# eager may have escaped by luck. In fp64, where eager is the reference, no more is allowed.
_ROUNDINGS = 8


@dataclass(frozen=True)
class Case:
    """One public function on one kind of input."""

    function: str
    dtype: torch.dtype
    layout: torch.memory_format
    training: bool

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        words = (self.function, self.dtype, self.layout, mode)
        return " ".join(str(word).removeprefix("torch.") for word in words)


@dataclass(frozen=True)
class Result:
    """What one backend did: the number of cases, and a line for each one that is wrong."""

    n_cases: int
    failures: list[str]


def devices(backend: str) -> list[str]:
    """The device types whose tensors `backend` takes here."""
    present = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [device for device in present if backends.unavailable(backend, device) is None]


def check(backend: str) -> Result:
    """Check `backend` on every device whose tensors it takes."""
    runs = list(itertools.product(devices(backend), _cases()))
    failures = [
        f"{case} on {device}: {error}"
        for device, case in runs
        if (error := _error(case, backend, device)) is not None
    ]
    return Result(len(runs), failures)


def _cases() -> Iterator[Case]:
    for dtype, layout in itertools.product(_DTYPES, _LAYOUTS):
        for function in _SUMS:
            yield Case(function, dtype, layout, training=True)
        for function, training in itertools.product(_NORMS, (True, False)):
            yield Case(function, dtype, layout, training)


def _error(case: Case, backend: str, device: str) -> str | None:
    """What is wrong with the results of `backend`, or None."""
    inputs = _inputs(case, device)
    exact = _run(case, {name: tensor.double() for name, tensor in inputs.items()}, "eager")
    eager = _run(case, inputs, "eager")
    try:
        ours = _run(case, inputs, backend)
    except Exception as error:  # of any kind: a compiler's, a driver's, our own
        return f"{type(error).__name__}: {error}"
    rounding = torch.finfo(ops.statistics_dtype(case.dtype)).eps
    for name, reference in exact.items():
        distance = _distance(ours[name], reference)
        atol = _ROUNDINGS * rounding * float(reference.abs().max())
        allowed = 2 * _distance(eager[name], reference) + atol
        if not distance <= allowed:  # a NaN is wrong too
            return f"{name} is {distance:.1e} from fp64, allowed {allowed:.1e}"
    return None


def _distance(result: Tensor, reference: Tensor) -> float:
    return float((result.double() - reference).abs().max())


def _inputs(case: Case, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def activation(n_channels: int) -> Tensor:
        shape = (_SHAPE[0], n_channels, *_SHAPE[2:])
        return normal(shape, case.dtype).contiguous(memory_format=case.layout)

    inputs = {}
    n_results = 0  # channels of the result: those of x, and of what it is concatenated with
    for name in inspect.signature(getattr(functional, case.function)).parameters:
        if name in ("x", "residual", "skip"):
            inputs[name] = activation(_SHAPE[1])
            n_results += 0 if name == "residual" else _SHAPE[1]
        elif name.endswith(("weight", "bias", "running_mean")):
            inputs[name] = normal(_SHAPE[1:2], ops.statistics_dtype(case.dtype))
        elif name.endswith("running_var"):
            inputs[name] = normal(_SHAPE[1:2], ops.statistics_dtype(case.dtype)).square() + 0.5
    inputs["dout"] = activation(n_results)
    return inputs


def _run(case: Case, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The output, every gradient, and the running buffers afterwards, by name."""
    tensors = {name: tensor.clone() for name, tensor in inputs.items()}
    dout = tensors.pop("dout")
    buffers = {name: tensor for name, tensor in tensors.items() if "running" in name}
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if n not in buffers}
    options: dict[str, Any] = {"training": case.training} if case.function in _NORMS else {}
    with backends.use_backend(backend):
        out: Tensor = getattr(functional, case.function)(**tensors, **options)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout)
    named = {f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), **named, **buffers}

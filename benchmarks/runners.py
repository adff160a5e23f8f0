"""The runners: an operation as eager, Inductor, fusedskip and other libraries have it."""

import contextlib
import functools
import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import fusedskip
from fusedskip import backends, reference

FUNCTIONS = (
    "batch_norm_add_relu", "batch_norm_relu", "dual_batch_norm_add_relu", "batch_norm_add",
    "cat_batch_norm_relu", "add_relu", "relu_add", "bias_add_relu",
)  # fmt: skip
PASSES = ("both", "forward", "backward")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Library(NamedTuple):
    """A rival: what to import, what installs it, where it runs, and which functions it has."""

    module: str
    package: str
    device: str | None
    functions: tuple[str, ...]


LIBRARIES = {
    "cudnn": Library(
        "cudnn", "nvidia-cudnn-frontend", "cuda", ("batch_norm_add_relu", "batch_norm_relu")
    ),
    "timm": Library("timm", "timm", None, ("batch_norm_relu",)),
}


def _obstacle(runner: str) -> str | None:
    """Why a runner cannot be measured here, or None."""
    if runner in backends.KERNELS:
        # Triton's interpreter, which takes CPU tensors, is not for measuring.
        interpreted = (
            "on a CPU it is interpreted" if (runner, DEVICE) == ("triton", "cpu") else None
        )
        return interpreted or backends.unavailable(runner, DEVICE)
    library = LIBRARIES[runner]
    if library.device not in (None, DEVICE):
        return f"it needs a {library.device} device"
    if importlib.util.find_spec(library.module) is None:
        return f"{library.package} is not installed"
    return None


# What was not measured, and why. A library that refuses a case adds to it.
UNAVAILABLE = {
    runner: reason for runner in (*backends.KERNELS, *LIBRARIES) if (reason := _obstacle(runner))
}
UNAVAILABLE["flaggems"] = "it replaces torch's operators in the whole process, and so eager's"
BACKENDS = tuple(name for name in backends.KERNELS if name not in UNAVAILABLE)
# The `cuda` backend with each pass in one launch, and in two, whatever it prefers.
ON_CHIP, TWO_LAUNCHES = "cuda_on_chip", "cuda_two_launches"
RUNNERS = (
    "eager", "compile", *BACKENDS, *((ON_CHIP, TWO_LAUNCHES) if "cuda" in BACKENDS else ()),
    *(name for name in LIBRARIES if name not in UNAVAILABLE),
)  # fmt: skip


def has(runner: str, function: str) -> bool:
    if runner in (ON_CHIP, TWO_LAUNCHES):
        return function not in ("add_relu", "relu_add")  # one launch at all times
    return runner not in LIBRARIES or function in LIBRARIES[runner].functions


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
    def random(function: str, shape: tuple[int, ...], layout: str, dtype: str) -> "Inputs":
        wide = (shape[0], 2 * shape[1], *shape[2:]) if function.startswith("cat") else shape
        x, residual, dout, copied = (
            torch.randn(size, device=DEVICE, dtype=DTYPES[dtype]).contiguous(
                memory_format=LAYOUTS[layout]
            )
            for size in (shape, shape, wide, shape)
        )
        channels = [torch.ones(shape[1], device=DEVICE) for _ in range(8)]
        for index in (2, 3, 6, 7):
            channels[index] = torch.nn.Parameter(channels[index])
        return Inputs(x.requires_grad_(), residual.requires_grad_(), *channels, dout, copied)

    @staticmethod
    @functools.lru_cache(maxsize=1)  # the runners of a case share them
    def rotation(
        function: str, shape: tuple[int, ...], layout: str, dtype: str
    ) -> "tuple[Inputs, ...]":
        """So many inputs that, taken in turn, none is found in the L2 cache of a GPU."""
        l2 = torch.cuda.get_device_properties(0).L2_cache_size if DEVICE == "cuda" else 0
        set_size = 3 * math.prod(shape) * DTYPES[dtype].itemsize  # x, residual, dout
        n_sets = max(1, math.ceil(4 * l2 / set_size))
        return tuple(Inputs.random(function, shape, layout, dtype) for _ in range(n_sets))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        norms = self.weight, self.bias, self.residual_weight, self.residual_bias
        return self.x, self.residual, *norms

    def arguments(self, function: str) -> tuple[Tensor, ...]:
        """Those of the public function, in its order."""
        x, residual, *norm = self[:6]
        if function in ("add_relu", "relu_add"):
            return x, residual
        if function == "bias_add_relu":
            return x, residual, self.bias
        if function == "batch_norm_relu":
            return x, *norm
        if function == "dual_batch_norm_add_relu":
            return x, residual, *norm[:2], *self[6:8], *norm[2:], *self[8:10]
        return x, residual, *norm


def eager(function: str, inputs: Inputs) -> Tensor:
    options = True, 0.1, 1e-5  # training, momentum, eps
    if function in ("batch_norm_relu", "batch_norm_add", "batch_norm_add_relu"):
        residual = None if function == "batch_norm_relu" else inputs.residual
        relu = function.endswith("relu")
        return reference.batch_norm(inputs.x, residual, *inputs[2:6], *options, relu)
    if function == "dual_batch_norm_add_relu":
        options = *options, *options[1:]
    elif "norm" not in function:
        options = ()
    return getattr(reference, function)(*inputs.arguments(function), *options)


def fused(function: str, inputs: Inputs) -> Tensor:
    options = {"training": True} if "norm" in function else {}
    return getattr(fusedskip, function)(*inputs.arguments(function), **options)


@functools.cache
def compiled() -> Callable[[str, Inputs], Tensor]:
    """The eager form, compiled anew for each shape."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    torch._functorch.config.donated_buffer = False  # the backward pass alone is timed on one graph
    return torch.compile(eager, fullgraph=True, dynamic=False)


@functools.cache
def _batch_norm_act(channels: int) -> torch.nn.Module:
    return importlib.import_module("timm.layers").BatchNormAct2d(channels, device=DEVICE)


def timm(_: str, inputs: Inputs) -> Tensor:
    norm = _batch_norm_act(inputs.x.shape[1])
    norm.running_mean, norm.running_var, norm.weight, norm.bias = inputs[2:6]
    return norm(inputs.x)


def forward(runner: str, function: str) -> Callable[[Inputs], Tensor]:
    """The forward pass of `runner`: one of RUNNERS, within `using` it."""
    if runner == "cudnn":
        run = importlib.import_module("benchmarks.cudnn").forward
    elif runner == "compile":
        run = compiled()
    else:
        run = {"eager": eager, "timm": timm}.get(runner, fused)
    return functools.partial(run, function)


@contextlib.contextmanager
def using(runner: str) -> Iterator[None]:
    """Calls run on `runner` within."""
    if runner in (ON_CHIP, TWO_LAUNCHES):
        with fusedskip.use_backend("cuda"), backends.on_chip(runner == ON_CHIP):
            yield
    else:
        with fusedskip.use_backend(runner if runner in BACKENDS else "auto"):
            yield


def step(
    runner: str, function: str, passes: str, rotation: tuple[Inputs, ...]
) -> Callable[[], object]:
    """A call that makes one pass, or both, with gradients for all that has an influence."""
    run = forward(runner, function)
    turns = itertools.cycle(rotation)
    if passes == "forward":
        return lambda: run(next(turns))
    if passes == "backward":
        graphs = itertools.cycle([(run(inputs), inputs) for inputs in rotation])
    else:
        graphs = ((run(inputs), inputs) for inputs in turns)

    def backward() -> object:
        out, inputs = next(graphs)
        return torch.autograd.grad(
            out, inputs.leaves, inputs.dout, allow_unused=True, retain_graph=passes == "backward"
        )

    return backward


def launched(runner: str, function: str) -> dict[str, str]:
    """How the `cuda` backend has launched the last pass, where that is what is compared."""
    if runner not in (ON_CHIP, TWO_LAUNCHES) or "norm" not in function:
        return {}
    return {"launched": importlib.import_module("fusedskip._C").cuda_launched()}


def copy(inputs: Inputs) -> None:
    """What bandwidth is measured by."""
    inputs.copied.copy_(inputs.x.detach())


def occupy() -> None:
    """Give a GPU a millisecond's work: what is launched meanwhile then runs without a gap."""
    if DEVICE == "cuda":
        torch.cuda._sleep(2_000_000)  # cycles

"""Which kernels a call runs on: one table of backends, and the choice that `auto` makes."""

import importlib
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fusedskip import ops


def _raising_as_torch(operator: Callable[..., Any]) -> Callable[..., Any]:
    """`operator`, whose error where a GPU's memory ends is torch's own: programs look for that.

    It comes before any kernel runs. 0.2 us a call, which those on a CPU do without.
    """

    def call(x: Tensor, *args: Any) -> Any:
        try:
            return operator(x, *args)
        except RuntimeError as error:
            wanted = re.search(r"C\w+ out of memory\. Tried .* (\d+) bytes", str(error))
            if wanted:
                torch.empty(int(wanted[1]), dtype=torch.uint8, device=x.device)
                # There is room now, as what the call had allocated has gone with it.
                raise torch.OutOfMemoryError(wanted[0]) from None
            raise

    return call


def _operators(namespace: str, wrap: Callable[..., Any] = lambda operator: operator) -> Any:
    """The raw operators of a namespace, as attributes: without a search for the overload."""
    raw = getattr(torch.ops, namespace)
    return SimpleNamespace(**{name: wrap(getattr(raw, name).default) for name in ops.NAMES})


# In the order in which `auto` prefers them. `eager` has none: it is `fusedskip.reference`.
KERNELS = {
    "cuda": _operators(ops.COMPILED, _raising_as_torch),
    "triton": _operators(ops.TRITON),
    "cpu": _operators(ops.COMPILED),
}
NAMES = (*KERNELS, "eager")


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def unavailable(name: str, device_type: str, index: int | None = None) -> str | None:
    """Why backend `name` cannot take tensors on a device, or None if it can.

    Without an index the device is the current one of its type.
    """
    if name == "eager":
        return None
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device_type == "cuda" or (device_type == "cpu" and _triton_interprets()):
            return None
        return "Triton runs on CUDA tensors (and on CPU tensors under TRITON_INTERPRET=1)"
    if device_type != name:
        return f"it takes {name} tensors only"
    if ops.compiled_error is not None:
        return f"the extension fusedskip._C did not load: {ops.compiled_error}"
    if not ops.has_kernel(ops.COMPILED, name.upper()):
        return f"this installation was built without {name} kernels"
    if name == "cuda" and torch.cuda.is_available():
        with torch.cuda.device(index):  # or asking would set up another GPU
            error = importlib.import_module("fusedskip._C").cuda_error()
        return error and f"its kernels do not load on this GPU: {error}"
    return None


def available_backends() -> tuple[str, ...]:
    """The backends that work in this process, best first: `("cuda", "triton", "cpu", "eager")`."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return tuple(n for n in NAMES if any(unavailable(n, device) is None for device in devices))


def _checked_name(name: str) -> str:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend: expected 'auto' or one of {NAMES}, got {name!r}")
    return name


# Process-wide, like torch.backends.*: a plain global also costs nothing and traces under dynamo.
_active = _checked_name(os.environ.get("FUSEDSKIP_BACKEND", "auto"))


def use_backend(name: str) -> AbstractContextManager[None]:
    """Run every fused operation called inside the `with` block on one backend.

    The choice is process-wide, not per thread. A backward pass runs on the backend of its forward.

    Args:
        name: `"cuda"`, `"triton"`, `"cpu"`, `"eager"` or `"auto"`.

    Raises:
        ValueError: for another name. A call on tensors that the backend cannot take raises
            `RuntimeError` and says why.
    """
    return _active_backend(_checked_name(name))


@contextmanager
def _active_backend(name: str) -> Iterator[None]:
    global _active
    previous, _active = _active, name
    try:
        yield
    finally:
        _active = previous


@contextmanager
def on_chip(preferred: bool = True) -> Iterator[None]:
    """Let the `cuda` backend make each pass in training one launch, where the GPU has room for it.

    Its blocks wait for each other and keep on the chip what they can. With False, all are two
    launches. The default is what GPUs of the kind have measured to be faster at the nearest shape,
    and two where none has. Process-wide, like `use_backend`.

    Raises:
        RuntimeError: if the backend `cuda` is not to be had.
    """
    try:
        set_launches = importlib.import_module("fusedskip._C").cuda_set_launches
    except (ImportError, AttributeError):
        raise RuntimeError(f"backend 'cuda': {unavailable('cuda', 'cuda')}") from None
    previous = set_launches(1 if preferred else 2)
    try:
        yield
    finally:
        set_launches(previous)


@cache
def _auto(device: torch.device) -> str:
    reasons = {name: unavailable(name, device.type, device.index) for name in KERNELS}
    for name, reason in reasons.items():
        # Interpreted Triton is for tests: it is taken only when asked for by name.
        if reason is None and not (name == "triton" and device.type == "cpu"):
            return name
    if device.type != "meta":  # nothing runs there
        tried = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        _warn_once(f"on {device.type} tensors ({tried})")
    return "eager"


# dynamo calls this while it traces and keeps the answer, instead of tracing into it.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _select(active: str, device: torch.device) -> str:
    if active == "auto":
        return _auto(device)
    if (reason := unavailable(active, device.type, device.index)) is not None:
        raise RuntimeError(f"backend {active!r} cannot take {device.type} tensors: {reason}")
    return active


def select(x: Tensor) -> str:
    """The name of the backend that a call on `x` runs on."""
    name: str = _select(_active, x.device)
    return name


def take_vectors(vectors: Iterable[Tensor | None]) -> bool:
    """Whether kernels take these parameters and running statistics; if not, a warning says so."""
    for vector in vectors:
        if vector is not None and not vector.is_contiguous():
            warn_of_eager("where parameters or running statistics are not contiguous")
            return False
    return True


# Called by dynamo while it traces, into which a warning has no way.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def warn_of_eager(where: str) -> None:
    """Say, once, where calls run eagerly."""
    _warn_once(where)


@cache
def _warn_once(where: str) -> None:
    warnings.warn(f"fusedskip runs eagerly {where}", stacklevel=3)

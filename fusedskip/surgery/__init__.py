"""`fuse`, `unfuse` and `explain`: an existing model's skip connections, fused in place.

A fused module gets another class, a subclass of its own (`fusedskip.surgery.<library>`), and
nothing else: its children, parameters, hooks, names and state_dict are what they were. At every
call it looks at its children, and if they are not what kernels compute runs the forward it had.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, TypeVar

from torch import jit, nn

from fusedskip import tails
from fusedskip.remembered import forget
from fusedskip.surgery import frozen
from fusedskip.surgery.fused import FUSED, Fused, FusedChain

__all__ = ["Report", "Row", "explain", "fuse", "unfuse"]

Model = TypeVar("Model", bound=nn.Module)

_LIBRARIES = ("torch", "torchvision", "timm", "transformers")


@dataclass(frozen=True)
class Row:
    """One candidate of a model.

    Attributes:
        name: of the module in the model; empty for the model itself.
        type: the class, as its library names it.
        kernels: what runs fused, or would after `fuse`; `fusedskip.tails` lists them.
        fused: whether a call now runs fused.
        reason: why it cannot, or None if it can.
    """

    name: str
    type: str
    kernels: tuple[str, ...]
    fused: bool
    reason: str | None


class Report:
    """The candidates of a model in the order of its modules; prints as a table.

    Attributes:
        rows: the candidates; iterating over the report gives them.
        n_norms: normalisation layers in the model.
        n_covered: those among them that the kernels of the rows compute.
    """

    def __init__(self, rows: list[Row], n_norms: int, n_covered: int) -> None:
        self.rows, self.n_norms, self.n_covered = rows, n_norms, n_covered

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as dictionaries."""
        return [asdict(row) for row in self.rows]

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("module", "type", "kernels", "fused", "why not")
        for row in self.rows:
            fused = "yes" if row.fused else "no"
            name = row.name or "(the model)"
            table.add_row(name, row.type, " ".join(row.kernels), fused, row.reason or "")
        is_done = all(row.fused for row in self.rows if row.reason is None)
        where = "in fused kernels" if is_done else "fusible"
        table.caption = f"{self.n_covered} of {self.n_norms} normalisation layers {where}"
        if not self.rows:
            table.caption += "; fuse knows no module of this model"
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


@dataclass(frozen=True)
class _Candidate:
    module: nn.Module
    row: Row
    fused_class: type[Fused] | None
    norms: list[nn.Module]


def fuse(
    model: Model,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    strict: bool = False,
) -> Model:
    """Fuse what is known of `model` in place: the blocks of torchvision, timm and transformers.

    Fused modules change their class to a subclass of it, and nothing else. Fusing twice changes
    nothing. Convert to SyncBatchNorm before, compile and wrap in DDP after.

    Args:
        model: any module.
        filter_fn: called with each candidate and its name; what it does not accept is left alone.
        strict: raise if a candidate has to be refused.

    Returns:
        `model`.

    Raises:
        ValueError: `strict`, and a candidate was refused; the message has every reason, and nothing
            has been changed.
    """
    candidates = [
        candidate
        for candidate in _candidates(model)
        if filter_fn is None or filter_fn(candidate.module, candidate.row.name)
    ]
    refused = [candidate.row for candidate in candidates if candidate.row.reason is not None]
    if strict and refused:
        lines = [f"  {row.name or '(the model)'} ({row.type}): {row.reason}" for row in refused]
        raise ValueError("\n".join([f"{len(refused)} modules cannot be fused:", *lines]))
    for candidate in candidates:
        row = candidate.row
        if candidate.fused_class is not None and row.reason is None and not row.fused:
            candidate.module.__class__ = candidate.fused_class
    return model


def unfuse(model: Model) -> Model:
    """Give every fused module of `model` its own class back, in place; returns `model`.

    Raises:
        ValueError: something has changed the class of a module since it was fused, as
            parametrizations and `fully_shard` do, or its `forward`; nothing has been changed.
    """
    fused = {name: module for name, module in model.named_modules() if isinstance(module, Fused)}
    for name, module in fused.items():
        if type(module) not in FUSED.values():
            raise ValueError(
                f"{name or '(the model)'} has become a {type(module).__name__} since it was fused: "
                "what did that, a parametrization or fully_shard, is to be taken back first"
            )
        if (patched := module._fused_patched(module)) is not None:
            raise ValueError(
                f"{name or '(the model)'} has got a {patched} of its own since it was fused, which "
                "may call the fused one: that is to be taken back first"
            )
    for module in fused.values():
        module.__class__ = module._fused_replaces  # type: ignore[assignment]
        forget(module)
    return model


def explain(model: nn.Module) -> Report:
    """What `fuse` would do with `model`, or has done and what of it holds now; changes nothing."""
    candidates = _candidates(model)
    norms = {module for module in model.modules() if tails.resembles_norm(module)}
    covered = {norm for candidate in candidates for norm in candidate.norms}
    return Report([candidate.row for candidate in candidates], len(norms), len(covered & norms))


def _candidates(model: nn.Module) -> list[_Candidate]:
    # First: a library may know of norms and chains that are inside what belongs to another.
    for module in model.modules():
        for base in type(module).__mro__:
            _load(base.__module__.partition(".")[0])
    frozen.learn(model)
    found = (_candidate(module, name) for name, module in model.named_modules())
    return [candidate for candidate in found if candidate is not None]


def _candidate(module: nn.Module, name: str) -> _Candidate | None:
    if isinstance(module, jit.ScriptModule):
        return _scripted(module, name)
    known = next((base for base in type(module).__mro__ if base in FUSED), None)
    if known is None:
        return None
    if any(base.__module__.startswith("fusedskip.blocks") for base in type(module).__mro__):
        return None  # it fuses what it can by itself
    cls, type_name = FUSED[known], known.__name__
    try:
        if not isinstance(module, Fused) and not cls._fused_applies(module):
            return None
        if isinstance(module, Fused) or type(module) is known:
            reason = cls._fused_refusal(module)
        else:
            type_name = type(module).__name__
            reason = f"it is a subclass of {known.__name__} and may compute something else"
        plan = cls._fused_plan_of(module) if reason is None else None
    except (AttributeError, KeyError) as error:
        reason, plan = f"it is not built like a {known.__name__}: {error}", None
    if plan is None:
        return _Candidate(module, Row(name, type_name, (), False, reason), cls, [])
    row = Row(name, type_name, tails.kernels(plan), isinstance(module, Fused), None)
    return _Candidate(module, row, cls, tails.norms_of(plan))


def _scripted(module: jit.ScriptModule, name: str) -> _Candidate | None:
    for library in sys.modules.keys() & set(_LIBRARIES):
        _load(library)
    blocks = {cls.__name__ for cls, fused in FUSED.items() if not issubclass(fused, FusedChain)}
    if (type_name := module.original_name) not in blocks:
        return None
    row = Row(name, type_name, (), False, "it is a ScriptModule: fuse before scripting")
    return _Candidate(module, row, None, [])


@cache
def _load(library: str) -> None:
    if library not in _LIBRARIES:
        return
    try:
        importlib.import_module(f"fusedskip.surgery.{library}")
    except (ImportError, AttributeError) as error:  # a release without what is known of another
        warnings.warn(f"fusedskip knows another {library} than this: {error}", stacklevel=2)

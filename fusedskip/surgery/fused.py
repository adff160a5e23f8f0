"""The classes that `fuse` gives to modules: subclasses of what they replace, children untouched.

A subclass says which children its forward calls, in what order; `fusedskip.tails` makes of that
what is fused, once more in the call after something has changed. Where something forbids it the
replaced class's own forward runs.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fusedskip import tails
from fusedskip.remembered import plan_of
from fusedskip.surgery import frozen
from fusedskip.surgery.fingerprints import known_method
from fusedskip.tails import Plan

# The fused class of each class that one replaces.
FUSED: dict[type[nn.Module], "type[Fused]"] = {}


class Fused(nn.Module):
    """Base of the fused classes: `class FusedX(Fused, X, forward="...")` replaces exactly `X`.

    The class arguments are the methods of `X` that `FusedX` overrides, with the `fingerprint` of
    those that it is known to equal; several releases of a library are parted by spaces. Parameters
    have the names that they have in `X`, for those who call by name. What these classes add has
    names that no child has: an attribute of the class would hide it.

    Attributes:
        _fused_replaces: `X`.
        _fused_methods: the methods of `X` that are known, by name; None for one that is not.
        _fused_children: the names of the children of which `_fused_plan` makes plans; None for all.
    """

    _fused_replaces: ClassVar[type[nn.Module]]
    _fused_methods: ClassVar[dict[str, Any]]
    _fused_children: ClassVar[tuple[str | None, ...] | None]

    if TYPE_CHECKING:  # the children of X

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls, **fingerprints: str) -> None:
        super().__init_subclass__()
        if fingerprints:
            replaced = cls.__bases__[-1]
            cls._fused_replaces, FUSED[replaced] = replaced, cls
            cls._fused_methods = {
                name: known_method(replaced, name, known) for name, known in fingerprints.items()
            }

    @classmethod
    def _fused_changed(cls) -> str | None:
        """Why `X` is not the one that is known, or not any more; None if it is."""
        for name, known in cls._fused_methods.items():
            if getattr(cls._fused_replaces, name) is not known:
                method = f"{cls._fused_replaces.__name__}.{name}"
                return f"{method} is not the one that fusedskip knows"
        return None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        frozen.learn(self)  # in this process nothing may have been fused yet

    def __prepare_scriptable__(self) -> "Fused":  # torch.jit.script asks for it first
        raise RuntimeError("a fused module cannot be scripted: fusedskip.unfuse(model) before")

    @classmethod
    def _fused_patched(cls, module: nn.Module) -> str | None:
        """A method that `module` has got for itself, behind which that of `cls` is not called."""
        return next((m for m in ("forward", *cls._fused_methods) if m in module.__dict__), None)

    @classmethod
    def _fused_applies(cls, module: nn.Module) -> bool:
        """Whether `module`, a `_fused_replaces` or already fused, has a tail at all."""
        return True

    @classmethod
    def _fused_plan_of(cls, module: nn.Module) -> Plan:
        """What to run of `module`, a `_fused_replaces` or already fused; by default a chain."""
        return tails.plan_chain(tails.children(module, cls._fused_children))

    @classmethod
    def _fused_refusal(cls, module: nn.Module) -> str | None:
        """Why `module` cannot run fused now, or None if it can."""
        if (changed := cls._fused_changed()) is not None:
            return changed
        if not cls._fused_applies(module):
            return "it has no tail any more"
        if (patched := cls._fused_patched(module)) is not None:
            return f"it has a {patched} of its own"
        if _has_any_global_hook():
            return "torch has a global module hook"
        if nn.Module.__call__ is not tails.CALL:
            return "nn.Module.__call__ is patched"
        plan = cls._fused_plan_of(module)
        if (obstacle := plan.obstacle()) is not None:
            culprit, reason = obstacle
            names = {child: name for name, child in module.named_modules()}
            return f"{names.get(culprit) or 'it'} {reason}"
        if not tails.kernels(plan) and not tails.may_have_more(plan):
            return f"no kernel computes {_activations(module)}"
        return None

    def _may_run(self, plan: Plan, x: Tensor) -> bool:
        return self._fused_changed() is None and tails.may_run(plan, x)

    def _fused_plan(self, x: Tensor) -> Plan | None:
        """The plan of `_fused_children`, if it may run on `x`."""
        if self._fused_changed() is not None:
            return None
        return plan_of(self, self._fused_children, self._fused_plan_of, x)


class FusedChain(Fused):
    """A module that calls its children one after the other: `_fused_children`."""

    _fused_children: ClassVar[tuple[str, ...] | None] = None

    def __init_subclass__(cls, **fingerprints: str) -> None:
        super().__init_subclass__(**fingerprints)
        if fingerprints and cls._fused_changed() is None:
            replaced = cls._fused_replaces
            tails.CHAINS[cls] = tails.CHAINS[replaced] = cls._fused_children
            tails.FORWARDS[replaced] = replaced.forward

    @classmethod
    def _fused_applies(cls, module: nn.Module) -> bool:
        children = tails.children(module, cls._fused_children)
        present = [m for m in children if m is not None and type(m) not in tails.IDLE]
        return any(tails.resembles_norm(a) and _is_activation(b) for a, b in pairwise(present))

    def forward(self, input: Tensor) -> Tensor:  # as nn.Sequential calls it
        plan = self._fused_plan(input)
        return super().forward(input) if plan is None else tails.run_chain(plan, input)


class FusedSkip(Fused):
    """A block: `act(branch(x) + shortcut(x))`.

    Attributes:
        _fused_branch, _fused_shortcut: names of children, called in this order; those that end in
            "?" may be None.
        _fused_act: the child that is called on the sum, if there is one.
        _fused_inplace: whether eager adds in place, so that the sum has dtype and shape of the
            branch.
        _fused_shortcut_first: whether eager calls the shortcut ahead of the branch.
        _fused_norms: which of the branch the library calls norms.
    """

    _fused_branch: ClassVar[tuple[str, ...]]
    _fused_shortcut: ClassVar[tuple[str, ...]] = ()
    _fused_act: ClassVar[str | None] = None
    _fused_inplace: ClassVar[bool] = True
    _fused_shortcut_first: ClassVar[bool] = False
    _fused_norms: ClassVar[tuple[int, ...]]

    def __init_subclass__(cls, **fingerprints: str) -> None:
        super().__init_subclass__(**fingerprints)
        if fingerprints:
            cls._fused_children = (*cls._fused_branch, *cls._fused_shortcut, cls._fused_act)
            if "_fused_norms" not in cls.__dict__:
                cls._fused_norms = tuple(
                    i for i, name in enumerate(cls._fused_branch) if name.startswith(("bn", "norm"))
                )

    @classmethod
    def _fused_plan_of(cls, module: nn.Module) -> Plan:
        children = tails.children(module, cls._fused_children)
        n_branch = len(cls._fused_branch)
        branch, shortcut, act = children[:n_branch], children[n_branch:-1], children[-1]
        plan = tails.plan_skip(branch, shortcut, act, cls._fused_shortcut_first)
        # What the library calls a norm must be one: it may have been folded into a convolution.
        for i in cls._fused_norms:
            if (norm := branch[i]) is not None and not tails.resembles_norm(norm):
                plan.norms.append(norm)
        return plan

    def forward(self, x: Tensor) -> Tensor:
        plan = self._fused_plan(x) if self._fused_applies(self) else None
        if plan is None:
            return super().forward(x)
        add = Tensor.add_ if self._fused_inplace else Tensor.add
        return tails.run_skip(plan, x, add=add)


def know_idle(kind: type[nn.Module], is_idle: Callable[[Any], bool], forward: str) -> None:
    """Pass over modules of a class where they return what they are given, as Identity does."""
    if known_method(kind, "forward", forward):
        tails.IDLE[kind], tails.FORWARDS[kind] = is_idle, kind.forward


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation"


def _activations(module: nn.Module) -> str:
    found = sorted({type(m).__name__ for m in module.modules() if _is_activation(m)})
    return " and ".join(found) or "what it adds"

"""Which neighbours among a block's modules are one operation, and running them as such.

A plan is made from the modules as they are then, and `fusedskip.remembered` sees what has been
replaced, hooked or patched since. The kernels, by the names that `fusedskip.explain` gives them:

    K1 relu(bn(x))    K2 relu(bn(x) + r)    K3 bn(x) + r
    K4 relu(x + r)    K5 relu(x) + r        K6 relu(bn(x) + bn'(z))
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fusedskip import functional
from fusedskip.modules import (
    NORM_RELUS,
    SyncBatchNorm,
    apply_dual_norm,
    apply_norm,
    is_torchs,
)


def always(module: Any) -> bool:
    """Whatever the state of the module."""
    return True


# The norms that kernels compute, by exact type, and what else must hold of one.
NORMS: dict[type[nn.Module], Callable[[Any], bool]] = dict.fromkeys(
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm), always
)
# Modules that call their children one after the other, by exact type: which, or None for all.
CHAINS: dict[type[nn.Module], tuple[str, ...] | None] = {nn.Sequential: None}
# Those that return what they are given, by exact type, and when.
IDLE: dict[type[nn.Module], Callable[[Any], bool]] = {nn.Identity: always}

# A module to call, or a norm and the ReLU that is one operation with it.
Step = tuple[nn.Module, nn.Module | None]
_Side = tuple[nn.Module | None, list[Step], str]


def is_of_library(function: Callable[..., Any], owner: type[nn.Module]) -> bool:
    """Whether a method of `owner` is code of its library or of torch: no patch of somebody else's.

    By the module in which it was compiled, which `functools.wraps` does not change.
    """
    libraries = {"torch", owner.__module__.partition(".")[0]}
    module: str = getattr(function, "__globals__", {}).get("__name__", "")
    return module.partition(".")[0] in libraries


# The forward of what is bypassed, by exact type, as it was: a patch of the class is honoured, too.
# What knows of more NORMS, CHAINS or IDLE adds theirs.
_PLAIN: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.Conv2d, *NORMS, *CHAINS, *IDLE, *NORM_RELUS,
)  # fmt: skip
FORWARDS = {kind: kind.forward if is_of_library(kind.forward, kind) else None for kind in _PLAIN}

CALL = nn.Module.__call__  # FX replaces it while it traces
GETATTR = nn.Module.__getattr__
RELU = nn.ReLU()  # stands in a chain for a call of `torch.relu`

MISSING = nn.Module()  # stands for a child that is not there, on which eager fails

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Plan(NamedTuple):
    """`act(norm(branch(x)) + shortcut_norm(shortcut(x)))`; a chain is its branch alone.

    Attributes:
        branch, shortcut: the steps before the tail.
        norm, shortcut_norm: what the tail computes with the sum, where there is such a norm.
        act: the activation after the sum.
        relu: whether the tail computes that, too.
        norms: those that kernels are to compute.
        bypassed: other modules whose `forward` is not called.
        shortcut_first: whether the shortcut is called ahead of the branch.
        others: the plans of other parts of the module, which runs fused as a whole or not at all.
    """

    branch: list[Step]
    shortcut: list[Step]
    norm: nn.Module | None
    shortcut_norm: nn.Module | None
    act: nn.Module | None
    relu: bool
    norms: list[nn.Module]
    bypassed: list[nn.Module]
    shortcut_first: bool = False
    others: tuple["Plan", ...] = ()

    def obstacle(self) -> tuple[nn.Module, str] | None:
        """A module whose bypassing would be wrong, or noticed, and why; None if all is well."""
        for norm in self.norms:
            computes = NORMS.get(type(norm))
            if computes is None or not computes(norm):
                return norm, f"is {type(norm).__name__}, a norm that no kernel computes"
        for module in (*self.norms, *self.bypassed):
            if module is MISSING:
                return module, "lacks a child that it calls"
            if not is_plain(module):
                has_hooks = any(module.__dict__[hooks] for hooks in HOOKS)
                return module, "has hooks" if has_hooks else "has a forward of its own"
        for other in self.others:
            if (found := other.obstacle()) is not None:
                return found
        return self.conflict()

    def delays_norm(self) -> bool:
        """Whether anything of the second side comes ahead of the first side's norm.

        Eager goes through the whole first side before the second; here the steps of both are ahead
        of either norm.
        """
        (norm, *_), (other_norm, steps, _) = self._sides()
        return norm is not None and (bool(steps) or other_norm is not None)

    def conflict(self) -> tuple[nn.Module, str] | None:
        """A norm that is delayed, and what may happen to it on the other side in between."""
        if not self.delays_norm():
            return None
        (norm, ahead, _), (other_norm, steps, other) = self._sides()
        assert norm is not None
        if steps and not ahead:
            return norm, f"has the input of the {other}, which may change it in place"
        others = [other_norm, *(step for step, _ in steps)]
        after = (m for step in others if isinstance(step, nn.Module) for m in step.modules())
        running = norm._buffers.items()
        for module in after:
            if module is norm:
                return norm, f"is in the {other}, too"
            buffers = module._buffers
            if buffers and any(t is not None and t is buffers.get(n) for n, t in running):
                return norm, f"shares running statistics with a norm of the {other}"
        return None

    def _sides(self) -> list["_Side"]:
        """Norm, steps and name of branch and shortcut, in eager's order."""
        branch = self.norm, self.branch, "branch"
        shortcut = self.shortcut_norm, self.shortcut, "shortcut"
        return [shortcut, branch] if self.shortcut_first else [branch, shortcut]


def plan_chain(modules: Iterable[nn.Module | None]) -> Plan:
    """The plan of modules that are called one after the other; None is passed over."""
    norms: list[nn.Module] = []
    bypassed: list[nn.Module] = []
    steps = _pair(_present(modules, bypassed), norms, bypassed)
    return Plan(steps, [], None, None, None, False, norms, bypassed)


def plan_skip(
    branch: Iterable[nn.Module | None],
    shortcut: Iterable[nn.Module | None],
    act: nn.Module | None,
    shortcut_first: bool = False,
) -> Plan:
    """The plan of `act(branch(x) + shortcut(x))`; an empty shortcut is the identity."""
    relu = type(act) is nn.ReLU
    norms: list[nn.Module] = []
    bypassed: list[nn.Module] = []
    if act is not None and (relu or act is MISSING):
        bypassed.append(act)
    branch, norm = _split_norm(_open_last(branch, bypassed))
    shortcut, shortcut_norm = _open_last(shortcut, bypassed), None
    if relu or norm is None:  # two norms go with a ReLU only
        shortcut, shortcut_norm = _split_norm(shortcut)
    steps = _pair(branch, norms, bypassed), _pair(shortcut, norms, bypassed)
    norms += [n for n in (norm, shortcut_norm) if n is not None]
    return Plan(*steps, norm, shortcut_norm, act, relu, norms, bypassed, shortcut_first)


def joined(plan: Plan, *others: Plan) -> Plan:
    """The plan, to be judged with those of other parts of its module."""
    return plan._replace(others=others)


def may_bypass(x: Tensor) -> bool:
    """Whether modules may be bypassed at all; FX is shown the single ones.

    Only with strided tensors: MKLDNN's go from one module to the next as they are.
    """
    is_called = nn.Module.__call__ is CALL and not _has_any_global_hook()
    return is_called and isinstance(x, Tensor) and x.layout is torch.strided


def may_run(plan: Plan, x: Tensor) -> bool:
    """Whether nothing forbids bypassing what the plan bypasses."""
    return may_bypass(x) and plan.obstacle() is None


def kernels(plan: Plan) -> tuple[str, ...]:
    """The kernels of a plan, in the order of its steps, the tail's last."""
    pairs = ["K1" for _, relu in (*plan.branch, *plan.shortcut) if relu is not None]
    n_norms = (plan.norm is not None) + (plan.shortcut_norm is not None)
    tail = ("K4", "K2", "K6")[n_norms] if plan.relu else (None, "K3")[n_norms]
    of_others = [kernel for other in plan.others for kernel in kernels(other)]
    return (*of_others, *pairs, tail) if tail else (*of_others, *pairs)


def may_have_more(plan: Plan) -> bool:
    """Whether a step that now does something may return what it is given, as drop path does."""
    return any(type(step) in IDLE for step, _ in (*plan.branch, *plan.shortcut))


def norms_of(plan: Plan) -> list[nn.Module]:
    """The norms that the kernels of a plan compute."""
    pairs = [norm for norm, relu in (*plan.branch, *plan.shortcut) if relu is not None]
    tail = [norm for norm in (plan.norm, plan.shortcut_norm) if norm is not None]
    return [*(norm for other in plan.others for norm in norms_of(other)), *pairs, *tail]


def run_chain(plan: Plan, x: Tensor) -> Tensor:
    """Run the plan of a chain."""
    return run_steps(plan.branch, x)


def run_skip(
    plan: Plan,
    x: Tensor,
    skip: Tensor | None = None,
    add: Callable[[Tensor, Tensor], Tensor] = Tensor.add_,
) -> Tensor:
    """Run the plan of a skip connection.

    Args:
        plan: from `plan_skip`, without obstacle.
        x: the input of the branch.
        skip: the input of the shortcut, if that is not `x`.
        add: the eager sum of branch and shortcut, for what kernels do not add: another dtype (under
            autocast, when `x` is not in its dtype) and another shape.
    """
    skip = x if skip is None else skip
    if plan.shortcut_first:
        residual = run_steps(plan.shortcut, skip)
    out = run_steps(plan.branch, x)
    if not plan.shortcut_first:
        residual = run_steps(plan.shortcut, skip)
    norm: Any = plan.norm
    shortcut_norm: Any = plan.shortcut_norm
    if (
        out.dtype != residual.dtype
        or out.shape != residual.shape
        or (norm is not None and is_torchs(norm, out))
        or (shortcut_norm is not None and is_torchs(shortcut_norm, residual))
    ):
        out = out if norm is None else norm(out)
        out = add(out, residual if shortcut_norm is None else shortcut_norm(residual))
        out = out.relu() if plan.relu else out
    elif norm is not None and shortcut_norm is not None:
        out = apply_dual_norm(norm, out, shortcut_norm, residual)
    elif norm is not None:
        out = apply_norm(norm, out, residual, plan.relu)
    elif shortcut_norm is not None:
        out = apply_norm(shortcut_norm, residual, out, plan.relu)
    elif plan.relu:
        out = functional.add_relu(out, residual)
    else:
        out = out + residual
    return out if plan.relu or plan.act is None else plan.act(out)


def is_exactly(kind: type[nn.Module] | tuple[type[nn.Module], ...], *modules: nn.Module) -> bool:
    """Whether calling these modules is the forward of `kind` and nothing else: it can be bypassed.

    False for a subclass (a parametrized module is one), a hook or a forward of its own.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return not _has_any_global_hook() and all(type(m) in kinds and is_plain(m) for m in modules)


def children(module: nn.Module, names: tuple[str | None, ...] | None) -> list[nn.Module | None]:
    """The children of these names, or all of them; a function may stand for one.

    What has no name is None, and so may be those whose name ends in "?"; `MISSING` stands for what
    else is not there, and for what the class of the module gives in its place.
    """
    modules, kind = module._modules, type(module)
    if names is None:
        return [MISSING if child is None else child for child in modules.values()]
    found = []
    for name in names:
        child = None
        if name is not None:
            own_name = name.removesuffix("?")
            child = module.__dict__.get(own_name, modules.get(own_name))
            of_class = hasattr(kind, own_name) or kind.__getattr__ is not GETATTR
            if of_class or (child is None and own_name == name):
                child = MISSING
        found.append(child)
    return found


def resembles_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of whatever kind, going by its name."""
    kind = type(module)
    if kind in NORMS:
        return True
    return "Norm" in kind.__name__ and kind not in CHAINS and not issubclass(kind, nn.Sequential)


def forward_of(module: nn.Module) -> tuple[Any, Any]:
    """The class whose forward is bypassed with that of `module`, and what that has to be."""
    kind: Any = type(module)
    if kind not in FORWARDS:
        kind = getattr(kind, "_fused_replaces", kind)
    return kind, FORWARDS.get(kind, kind.forward)


def is_plain(module: nn.Module) -> bool:
    """Whether nobody notices that `module.forward` is bypassed: no hooks, no patched forward."""
    attributes = module.__dict__
    for hooks in HOOKS:
        if len(attributes[hooks]):
            return False
    kind, forward = forward_of(module)
    # Of a method that is read, dynamo guards that the module gets none of its own.
    return callable(module.forward) and "forward" not in attributes and kind.forward is forward


def run_steps(steps: list[Step], x: Tensor) -> Tensor:
    """Run steps one after the other."""
    for module, relu in steps:
        if relu is None:
            x = module(x)
        elif is_torchs(module, x):
            x = module(x).relu()
        else:
            x = apply_norm(module, x, None, relu=True)
    return x


def _present(modules: Iterable[nn.Module | None], bypassed: list[nn.Module]) -> list[nn.Module]:
    present = []
    for module in modules:
        if module is None:
            continue
        if module is MISSING:
            bypassed.append(module)
        is_idle = IDLE.get(type(module))
        if is_idle is not None and is_idle(module):
            bypassed.append(module)
        else:
            present.append(module)
    return present


def _open_last(modules: Iterable[nn.Module | None], bypassed: list[nn.Module]) -> list[nn.Module]:
    """The modules, the last one, as long as it is a chain, replaced by what it calls."""
    flat = _present(modules, bypassed)
    while flat and type(flat[-1]) in CHAINS:
        last = flat.pop()
        bypassed.append(last)
        flat += _present(children(last, CHAINS[type(last)]), bypassed)
    return flat


def _split_norm(modules: list[nn.Module]) -> tuple[list[nn.Module], nn.Module | None]:
    if modules and resembles_norm(modules[-1]):
        return modules[:-1], modules[-1]
    return modules, None


def _pair(
    modules: list[nn.Module], norms: list[nn.Module], bypassed: list[nn.Module]
) -> list[Step]:
    steps: list[Step] = []
    for module in modules:
        if type(module) is nn.ReLU and steps:
            last, relu = steps[-1]
            if relu is None and resembles_norm(last):
                steps[-1] = last, module
                norms.append(last)
                if module not in bypassed:
                    bypassed.append(module)
                continue
        steps.append((module, None))
    return steps

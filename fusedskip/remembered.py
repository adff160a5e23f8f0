"""Plans that outlive a call, and what has to be as it was for that."""

from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from fusedskip import tails
from fusedskip.tails import Plan

Names = tuple[str | None, ...] | None

_KEY = "_fusedskip_plan"


def plan_of(module: nn.Module, names: Names, make: Callable[[Any], Plan], x: Tensor) -> Plan | None:
    """`make(module)`, if it may run; the last one, as long as that holds.

    A plan of a Bottleneck takes 5 us to make and to judge, and 2 us to find that it holds: one that
    the rest of a network has driven out of the caches 22 us and 13.

    Args:
        module: always with the same `names` and `make`.
        names: the children of which the plan is made, as `tails.children` takes them.
        make: looks at nothing else.
        x: what the plan is to run on.
    """
    if not tails.may_bypass(x):
        return None
    attributes = module.__dict__
    is_compiling = torch.compiler.is_compiling()  # what dynamo traces it guards by itself
    remembered = None if is_compiling else attributes.get(_KEY)
    if remembered:
        if remembered.holds(module):
            return remembered.plan
        forget(module)  # it would keep modules that have been replaced
    plan = make(module)
    if plan.obstacle() is not None:
        return None
    if not is_compiling:
        attributes[_KEY] = Remembered(plan, module, names)
    return plan


def forget(module: nn.Module) -> None:
    """Leave nothing of a plan behind."""
    module.__dict__.pop(_KEY, None)


class Remembered:
    """A plan without obstacle, made of certain children of a module.

    What a plan calls may become anything, it is called as eager calls it. This is about which
    children there are, and about those that the plan passes over. A copied or pickled one is an
    empty set, which torch.load takes for weights.
    """

    __slots__ = (
        "_chains", "_children", "_delays_norm", "_facts", "_forwards", "_kind", "_own",
        "_predicates", "_seen", "plan",
    )  # fmt: skip

    def __init__(self, plan: Plan, module: nn.Module, names: Names) -> None:
        self.plan, self._kind, self._children = plan, type(module), module._modules
        self._delays_norm = plan.delays_norm()
        # What a mapping has under a key, None if it has nothing. Apart from others those of the
        # attributes of the module, which would keep itself alive.
        self._facts: list[tuple[dict[str, Any], str, Any]] = []
        self._chains: list[tuple[dict[str, Any], list[Any]]] = []
        self._predicates: list[tuple[Callable[[Any], bool], nn.Module, bool]] = []
        self._own = self._note_children(module, names)

        plans = plan, *plan.others
        passed_over = {m: None for each in plans for m in (*each.norms, *each.bypassed)}
        self._seen = [(m, type(m), m.__dict__) for m in passed_over]
        self._forwards = {tails.forward_of(m): None for m in passed_over}
        for m, kind, attributes in self._seen:
            if kind in tails.CHAINS:
                self._facts.append((attributes, "_modules", m._modules))
                shadows = self._note_children(m, tails.CHAINS[kind])
                self._facts += [(attributes, key, value) for key, value in shadows]
        for each in plans:
            for norm in each.norms:
                self._note_predicate(tails.NORMS, norm, True)
            for m in each.bypassed:
                self._note_predicate(tails.IDLE, m, True)
            for step, _ in (*each.branch, *each.shortcut):
                self._note_predicate(tails.IDLE, step, False)

    def holds(self, module: nn.Module) -> bool:
        """Whether the same plan would be made of `module`, maybe a shallow copy of its own."""
        if type(module) is not self._kind or module._modules is not self._children:
            return False
        for key, value in self._own:
            if module.__dict__.get(key) is not value:
                return False
        for m, kind, attributes in self._seen:
            if type(m) is not kind or m.__dict__ is not attributes or "forward" in attributes:
                return False
            for hooks in tails.HOOKS:
                if attributes[hooks]:
                    return False
        for mapping, key, value in self._facts:
            if mapping.get(key) is not value:
                return False
        for kind, forward in self._forwards:
            if kind.forward is not forward:
                return False
        for children, known in self._chains:
            if len(children) != len(known) or not all(map(is_, children.values(), known)):
                return False
        for predicate, m, was in self._predicates:
            if bool(predicate(m)) is not was:
                return False
        return not self._delays_norm or self.plan.conflict() is None

    def __reduce__(self) -> tuple[type[set[Any]], tuple[()]]:
        return set, ()

    def _note_children(self, module: nn.Module, names: Names) -> list[tuple[str, Any]]:
        """What `tails.children` reads; returned is what there is among the module's attributes."""
        children = module._modules
        if names is None:
            self._chains.append((children, [*children.values()]))
            return []
        keys = dict.fromkeys(name.removesuffix("?") for name in names if name is not None)
        self._facts += [(children, key, children.get(key)) for key in keys]
        return [(key, module.__dict__.get(key)) for key in keys]

    def _note_predicate(
        self, known: dict[type[nn.Module], Callable[[Any], bool]], module: nn.Module, was: bool
    ) -> None:
        predicate = known.get(type(module), tails.always)
        if predicate is not tails.always:
            self._predicates.append((predicate, module, was))

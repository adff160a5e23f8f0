"""Plans that outlive a call, and what has to be as it was for that."""

from collections.abc import Callable
from typing import Any

from torch import nn

from fusedskip import tails
from fusedskip.tails import Plan


class Remembered:
    """A plan without obstacle and without a shortcut, made of certain children of a module.

    What a plan calls may become anything, it is called as eager calls it. This is about which
    children there are, and about those that the plan passes over. A copied or pickled one is None.
    """

    __slots__ = (
        "_children", "_facts", "_forwards", "_hooks", "_order", "_own", "_predicates", "_seen",
        "plan",
    )  # fmt: skip

    def __init__(self, plan: Plan, module: nn.Module, names: tuple[str | None, ...] | None) -> None:
        self.plan, self._children = plan, module._modules
        # What a mapping has under a key, None if it has nothing; of the attributes of the module,
        # which must not keep itself alive, apart from others.
        self._own: list[tuple[str, Any]] = []
        self._facts: list[tuple[dict[str, Any], str, Any]] = []
        self._order: list[tuple[dict[str, Any], list[str]]] = []
        self._predicates: list[tuple[Callable[[Any], bool], nn.Module, bool]] = []
        self._own += self._note_children(module, names)

        plans = plan, *plan.others
        passed_over = {m: None for each in plans for m in (*each.norms, *each.bypassed)}
        self._seen = [(m, type(m), m.__dict__) for m in passed_over]
        self._hooks = [m.__dict__[hooks] for m in passed_over for hooks in tails.HOOKS]
        self._forwards = {tails.forward_of(m): None for m in passed_over}
        for m, kind, attributes in self._seen:
            keys = ("forward", *tails.HOOKS)
            self._facts += [(attributes, key, attributes.get(key)) for key in keys]
            if kind in tails.CHAINS:
                self._facts.append((attributes, "_modules", m._modules))
                absent = self._note_children(m, tails.CHAINS[kind])
                self._facts += [(attributes, key, value) for key, value in absent]
        for each in plans:
            for norm in each.norms:
                self._note_predicate(tails.NORMS, norm, True)
            for m in each.bypassed:
                self._note_predicate(tails.IDLE, m, True)
            for step, _ in each.branch:
                self._note_predicate(tails.IDLE, step, False)

    def holds(self, module: nn.Module) -> bool:
        """Whether the plan would be made once more; `module` may be a copy of its own."""
        if module._modules is not self._children:
            return False
        for key, value in self._own:
            if module.__dict__.get(key) is not value:
                return False
        for m, kind, attributes in self._seen:
            if type(m) is not kind or m.__dict__ is not attributes:
                return False
        for mapping, key, value in self._facts:
            if mapping.get(key) is not value:
                return False
        for kind, forward in self._forwards:
            if kind.forward is not forward:
                return False
        for mapping, keys in self._order:
            if [*mapping] != keys:
                return False
        for predicate, m, was in self._predicates:
            if predicate(m) is not was:
                return False
        return not any(self._hooks)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def _note_children(
        self, module: nn.Module, names: tuple[str | None, ...] | None
    ) -> list[tuple[str, Any]]:
        """What `tails.children` reads; returned is what of it are attributes of the module."""
        children = module._modules
        if names is None:
            self._order.append((children, [*children]))
            names = tuple(children)
        keys = [name.removesuffix("?") for name in names if name is not None]
        self._facts += [(children, key, children.get(key)) for key in keys]
        return [(key, module.__dict__.get(key)) for key in keys if children.get(key) is None]

    def _note_predicate(
        self, known: dict[type[nn.Module], Callable[[Any], bool]], module: nn.Module, was: bool
    ) -> None:
        predicate = known.get(type(module), tails.always)
        if predicate is not tails.always:
            self._predicates.append((predicate, module, was))

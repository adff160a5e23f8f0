"""How a block runs: fused, or where a child forbids that, child by child."""

from torch import Tensor, nn

from fusedskip import tails
from fusedskip.checks import check_same_shape
from fusedskip.remembered import plan_of
from fusedskip.tails import Plan


def skip_connection(
    module: nn.Module, x: Tensor, branch: tuple[str, ...], shortcut: tuple[str, ...], act: str
) -> Tensor:
    """`act(branch(x) + shortcut(x))`: fused, or if a child forbids it, called one by one.

    Branch, shortcut and act are names of children, as `tails.children` takes them.

    Raises:
        ValueError: branch and shortcut differ in shape.
    """
    n_branch = len(branch)
    names = (*branch, *shortcut, act)

    def make(module: nn.Module) -> Plan:
        children = tails.children(module, names)
        return tails.plan_skip(children[:n_branch], children[n_branch:-1], children[-1])

    plan = plan_of(module, names, make, x)
    if plan is not None:
        return tails.run_skip(plan, x, add=_add_same_shape)
    out = _add_same_shape(_call(module, branch, x), _call(module, shortcut, x))
    return _call(module, (act,), out)


def chain(module: nn.Module, x: Tensor, names: tuple[str, ...]) -> Tensor:
    """The children of these names called one after the other, fused as far as they allow it."""
    plan = plan_of(module, names, lambda m: tails.plan_chain(tails.children(m, names)), x)
    return _call(module, names, x) if plan is None else tails.run_chain(plan, x)


def _add_same_shape(x: Tensor, residual: Tensor) -> Tensor:
    if isinstance(x, Tensor):  # FX traces with proxies, which have no shape to speak of
        check_same_shape(residual, x)
    return x + residual


def _call(module: nn.Module, names: tuple[str, ...], x: Tensor) -> Tensor:
    for name in names:
        child = getattr(module, name.removesuffix("?"))
        x = x if child is None else child(x)
    return x

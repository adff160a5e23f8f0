"""What `torch.fx` and other users of `__torch_function__` see of a fused operation: one call."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch import fx
from torch.overrides import handle_torch_function, has_torch_function

F = TypeVar("F", bound=Callable[..., Any])


def overridable(function: F) -> F:
    """Let `__torch_function__` of an argument take the call, as torch's own functions do."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values()) if kwargs else args
        if has_torch_function(given):
            return handle_torch_function(call, given, *args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def leaf(forward: F) -> F:
    """Make a module one node of an FX graph, as the modules of `torch.nn` are."""

    @wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        for given in (*args, *kwargs.values()):
            if isinstance(given, fx.Proxy):
                tracer: Any = given.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return forward(self, *args, **kwargs)

    return call  # type: ignore[return-value]

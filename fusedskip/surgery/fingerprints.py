"""Telling the code that is known from what another release, or a patch, has made of it."""

import ast
import hashlib
import inspect
import textwrap
from typing import Any

from torch import nn

from fusedskip import tails


def fingerprint(function: Any) -> str | None:
    """A hash of what `function` does: its source without comments, docstring and annotations.

    None where Python has no source of it.
    """
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return None
    (definition,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(definition, ast.FunctionDef)
    if ast.get_docstring(definition) is not None:
        definition.body = definition.body[1:]
    definition.returns = None
    for node in ast.walk(definition):
        if isinstance(node, ast.arg):
            node.annotation = None
    return hashlib.sha256(ast.unparse(definition).encode()).hexdigest()[:12]


def known_method(owner: type[nn.Module], name: str, fingerprints: str) -> Any:
    """The method of a library's class, if it has one of these fingerprints; else None."""
    method = getattr(owner, name)
    is_known = fingerprint(method) in fingerprints.split()
    return method if is_known and tails.is_of_library(method, owner) else None

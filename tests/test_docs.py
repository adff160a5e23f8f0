"""The snippets of docs/pytorch.md run as they stand."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from . import libraries  # noqa: F401  torchvision can be imported from here on

PAGE = Path(__file__).parent.parent / "docs" / "pytorch.md"


def snippets():
    """The Python of the page, each snippet on its own lines."""
    text = PAGE.read_text()
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield "\n" * text.count("\n", 0, match.start(1)) + match[1]


@pytest.mark.filterwarnings("ignore:fusedskip runs eagerly inside the transforms")
def test_snippets(monkeypatch):
    """One after the other, with what the ones before have defined."""
    # Inductor would compile for minutes; test_compile takes a smaller network to it.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    names = {}
    for snippet in snippets():
        exec(compile(snippet, PAGE, "exec"), names)
    assert names["masks"]  # of the last one

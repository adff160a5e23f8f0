"""The snippets of README.md and docs/pytorch.md run as they stand."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from . import libraries  # noqa: F401  torchvision can be imported from here on

ROOT = Path(__file__).parent.parent


def run(page):
    """The Python of a page, one snippet after the other; returns the names that they define."""
    text, names = page.read_text(), {}
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = "\n" * text.count("\n", 0, match.start(1)) + match[1]
        exec(compile(lines, page, "exec"), names)
    return names


def test_readme():
    names = run(ROOT / "README.md")
    assert names["out"].shape == names["x"].shape


@pytest.mark.filterwarnings("ignore:fusedskip runs eagerly inside the transforms")
def test_pytorch(monkeypatch):
    # Inductor would compile for minutes; test_compile takes a smaller network to it.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    assert run(ROOT / "docs" / "pytorch.md")["masks"]  # of the last one

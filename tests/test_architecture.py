"""The walls between the rooms: imports go down only."""

import ast
import re
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parent.parent

# What a module of fusedskip may import of fusedskip.
MAY_IMPORT = {
    "reference": set(),
    "ops": {"triton_kernels", "_C"},
    "backends": {"ops"},
    "layout": set(),
    "checks": set(),
    "autograd": {"backends", "layout"},
    "tracing": set(),
    "functional": {"autograd", "backends", "checks", "layout", "reference", "tracing"},
    "distributed": {"backends", "checks", "layout", "reference"},
    "modules": {"distributed", "functional", "tracing"},
    "tails": {"functional", "modules"},
    "remembered": {"tails"},
    "blocks": {"checks", "functional", "modules", "remembered", "tails", "tracing", "blocks"},
    "surgery": {"modules", "remembered", "tails", "surgery"},
}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield prefix
            if prefix == "fusedskip":
                yield from (f"fusedskip.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_go_down(name):
    package = ROOT / "fusedskip" / name
    paths = list(package.glob("*.py")) if package.is_dir() else [package.with_suffix(".py")]
    imported = {module for path in paths for module in imported_modules(path)}
    ours = {m.split(".")[1] for m in imported if m.startswith("fusedskip.")}
    assert imported
    assert ours <= MAY_IMPORT[name]


def test_reference_imports_torch_alone():
    imported = imported_modules(ROOT / "fusedskip" / "reference.py")
    assert {module.split(".")[0] for module in imported} == {"torch"}


def test_triton_kernels_never_import_fusedskip():
    for path in (ROOT / "triton_kernels").glob("*.py"):
        for module in imported_modules(path):
            assert not module.startswith(("fusedskip", "..")), path


def includes(folder):
    for path in sorted((ROOT / "csrc" / folder).glob("*")):
        for header in re.findall(r'#include [<"](.+?)[>"]', path.read_text()):
            yield path.name, header


def test_cpu_kernels_know_torch_by_its_pool_alone():
    torch_headers = {
        pair for pair in includes("cpu") if pair[1].startswith(("torch", "ATen", "c10"))
    }
    assert torch_headers == {("parallel.h", "torch/csrc/stable/c/shim.h")}


def test_cuda_kernels_know_neither_torch_nor_python():
    for name, header in includes("cuda"):
        assert not re.match("torch|ATen|c10|Python", header), name


def test_bindings_use_the_stable_abi_alone():
    allowed = re.compile(r"torch/(csrc/stable|headeronly|csrc/inductor/aoti_torch/c)/")
    for name, header in includes("bindings"):
        if header.startswith(("torch", "ATen", "c10")):
            assert allowed.match(header), name


def test_every_folder_is_installed():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "fusedskip").rglob("*.py")}
    found = {".".join(folder.parts) for folder in folders}
    assert {*packages} == {*found, "fusedskip.triton_kernels"}

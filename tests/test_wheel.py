"""One binary serves every Python from 3.10 and every torch from 2.11 on."""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fusedskip import ops

DIST = Path(__file__).parent.parent / "dist"
OTHER_TORCH = os.environ.get("FUSEDSKIP_TEST_TORCH")


@pytest.fixture
def extension():
    if ops.compiled_error is not None:
        pytest.skip(f"no compiled kernels: {ops.compiled_error}")
    return importlib.import_module("fusedskip._C").__file__


def run(*command, **options):
    """What `command` prints; a failure shows what it said."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_extension_imports_the_limited_api_of_python(extension):
    pytest.importorskip("abi3audit", reason="abi3audit is not installed")
    assert extension.endswith(".abi3.so")
    run(sys.executable, "-m", "abi3audit", "--strict", "--summary", extension)


def test_extension_imports_no_cpp_of_torch(extension):
    imported = run("nm", "--dynamic", "--undefined-only", extension)
    assert "aoti_torch_get_data_ptr" in imported
    # Mangled: namespaces at, c10, caffe2 and torch.
    assert not re.findall(r"\b_Z\w*?(?:2at|3c10|6caffe2|5torch)\d\w*", imported)


@pytest.mark.skipif(not OTHER_TORCH, reason="`make wheel TORCH=2.11.0` tries the wheel with it")
def test_wheel_runs_with_another_torch():
    assert not torch.__version__.startswith(OTHER_TORCH)
    [wheel] = DIST.glob("*.whl")
    with tempfile.TemporaryDirectory() as folder:  # tmp_path would keep gigabytes
        run(sys.executable, "-m", "venv", folder)
        python = f"{folder}/bin/python"
        run(python, "-m", "pip", "install", f"torch=={OTHER_TORCH}", wheel)
        # Every public function on every backend, forward and backward. Not in the checkout.
        printed = run(python, "-m", "fusedskip", cwd=folder)
    assert f", torch {OTHER_TORCH}" in printed
    assert re.search("^  cpu +ok, ", printed, re.MULTILINE)

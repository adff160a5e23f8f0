"""The index arithmetic of the CUDA kernels, compiled as plain C++ and walked over without a GPU."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "cuda_index.cpp"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))


@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"no C++ compiler: {COMPILER[0]}")
def test_index_arithmetic(tmp_path):
    program = tmp_path / "cuda_index"
    subprocess.run(
        [*COMPILER, "-std=c++20", "-O2", "-Wall", str(SOURCE), "-o", str(program)], check=True
    )
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split()[0]) > 2000

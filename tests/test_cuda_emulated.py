"""The CUDA kernels compiled for the CPU, under the tests of values: all but the hardware."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .emulator.build import build

ROOT = Path(__file__).parent.parent
TESTS = (
    "test_functional.py", "test_semantics.py", "test_synchronised_stages.py", "test_on_chip.py"
)  # fmt: skip
# Many tiles take 10 s each: the dual norm has every stage in it, and channels-first a thread has
# several rounds in test_on_chip.py. Fibers run in one order: that two runs agree says nothing. And
# of megabytes written past caches, which the CPU's kernels are tested with, five minutes are waste.
SELECTED = (
    "cpu and not two_runs and not past_the_caches and not part_of_another "
    "and (not many_tiles or dual and channels_last)"
)


pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU of this machine runs them"),
    pytest.mark.skipif(
        not (shutil.which("nvcc") and shutil.which("c++")),
        reason="needs CUDA's headers, which come with nvcc, and a C++ compiler",
    ),
]


def library(name):
    """Path of a library of the C++ compiler's, or None."""
    command = ["c++", f"-print-file-name={name}"]
    path = Path(subprocess.check_output(command, text=True).strip())
    return path if path.is_absolute() else None


def test_kernels_on_the_cpu(tmp_path):
    """Where the compiler has it, under AddressSanitizer: no access is beyond a tensor."""
    libasan, environment = library("libasan.so"), {}
    if libasan:
        environment["LD_PRELOAD"] = f"{libasan} {library('libstdc++.so')}"
        environment["ASAN_OPTIONS"] = "detect_leaks=0"  # those of Python
    extension = build(tmp_path, "address" if libasan else None)
    environment["EMULATED_EXTENSION"] = str(extension)
    run(SELECTED, TESTS, environment)
    # Compiled on the spot from what is meant for an older GPU.
    environment["EMULATED_PTX_VERSION"] = "80"
    files = "test_on_chip.py", "test_synchronised_stages.py"
    run("cpu and (dual and not refused or test_stats)", files, environment)


def run(selected, files, environment):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-p", "tests.emulator.plugin", "-k", selected),
            *(f"tests/{name}" for name in files),
        ],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_races(tmp_path):
    """What no barrier orders, in a block or between blocks, ThreadSanitizer reports."""
    libtsan = library("libtsan.so") or pytest.skip("needs libtsan, which comes with gcc")
    done = subprocess.run(
        [sys.executable, "-m", "tests.sanitize"],
        cwd=ROOT,
        env=os.environ
        | {
            "EMULATED_EXTENSION": str(build(tmp_path, "thread")),
            "LD_PRELOAD": str(libtsan),
            "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 exitcode=66",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("12 steps") == 2

"""The benchmarks count traffic as PERFORMANCE.md does, run, and report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import traffic

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("function", "runner", "tensors", "masks"),
    [
        ("batch_norm_add_relu", "eager", 16, 0),
        ("batch_norm_add_relu", "compile", 12, 0),
        ("batch_norm_add_relu", "fused", 10, 3),
        ("batch_norm_add_relu", "floor", 7, 2),
        ("batch_norm_relu", "fused", 8, 0),
        ("add_relu", "eager", 8, 0),
        ("add_relu", "fused", 5, 2),
    ],
)
def test_traffic_of_forward_and_backward(function, runner, tensors, masks):
    both = traffic.FORWARD[function][runner] + traffic.BACKWARD[function][runner]
    assert both == traffic.Traffic(tensors, masks)


def test_bytes_of_a_mask_are_a_bit_an_element():
    assert traffic.Traffic(2, 1).bytes(numel=64, itemsize=2) == 2 * 64 * 2 + 8


def test_figures_of_a_runner_at_copy_speed():
    shape = (2, 3, 4, 4)  # 96 elements: a copy in fp32 moves 768 bytes, the fused step 5 x 384 + 24
    seconds = (5 * 384 + 24) / 768
    figures = traffic.figures("add_relu", "cpu", shape, 4, seconds, 2 * seconds, 1.0)
    assert figures["copy_share"] == pytest.approx(1)
    assert figures["over_floor"] == pytest.approx(1)
    assert figures["speed"] == pytest.approx(2)


def test_benchmarks_run_and_report(tmp_path):
    results = tmp_path / "results.json"
    malloc = {"MALLOC_MMAP_THRESHOLD_": "8000000000", "MALLOC_TRIM_THRESHOLD_": "16000000000"}
    # A run within a worker of xdist would be taken for one, and not measure.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | malloc

    def run(*arguments):
        process = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    chosen = "add_relu-2048x7x7-nchw-fp32-eager or 1x8x2x2-forward-nchw-eager"
    printed = run(
        "pytest", "benchmarks", "-p", "no:cacheprovider", "--benchmark-enable", "--benchmark-only",
        "--batch=1", "--benchmark-max-time=0.01", f"--benchmark-json={results}", "-k", chosen,
    )  # fmt: skip
    assert "speed relative to best eager" in printed
    measured = json.loads(results.read_text())["benchmarks"]
    assert all(benchmark["extra_info"]["speed"] > 0 for benchmark in measured)
    table = run("benchmarks.report", str(results))
    assert "| batch_norm_add_relu | 1x2048x7x7 | nchw | fp32 | eager |" in table
    assert "| batch_norm_add_relu, forward | 1x8x2x2 | nchw | fp32 | eager |" in table

"""Benchmarks count traffic as benchmarks/traffic.py says, run, and report; `make gpu` sums up."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, runners, traffic

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("function", "runner", "tensors", "masks"),
    [
        ("batch_norm_add_relu", "eager", 16, 0),
        ("batch_norm_add_relu", "compile", 10, 3 * 8),
        ("batch_norm_add_relu", "fused", 10, 3),
        ("batch_norm_add_relu", "floor", 7, 2),
        ("batch_norm_relu", "fused", 8, 0),
        ("dual_batch_norm_add_relu", "eager", 24, 0),
        ("dual_batch_norm_add_relu", "fused", 13, 3),
        ("dual_batch_norm_add_relu", "floor", 8, 2),
        ("batch_norm_add", "fused", 9, 0),
        ("cat_batch_norm_relu", "fused", 12, 0),
        ("bias_add_relu", "floor", 5, 2),
        ("relu_add", "fused", 5, 2),
        ("add_relu", "eager", 8, 0),
        ("add_relu", "fused", 5, 2),
    ],
)
def test_traffic_of_forward_and_backward(function, runner, tensors, masks):
    assert traffic.moved(function, "both", runner) == traffic.Traffic(tensors, masks)


def test_bytes_of_a_mask_are_a_bit_an_element():
    assert traffic.Traffic(2, 1).bytes(numel=64, itemsize=2) == 2 * 64 * 2 + 8


def test_figures_of_a_runner_at_copy_speed():
    shape = (2, 3, 4, 4)  # 96 elements: a copy in fp32 moves 768 bytes, the fused step 5 x 384 + 24
    seconds = (5 * 384 + 24) / 768
    figures = traffic.figures("add_relu", "both", "cpu", shape, 4, seconds, 2 * seconds, 1.0)
    assert figures["copy_share"] == pytest.approx(1)
    assert figures["over_floor"] == pytest.approx(1)
    assert figures["speed"] == pytest.approx(2)


def test_benchmarks_run_and_report(tmp_path):
    results = tmp_path / "results.json"
    malloc = {"MALLOC_MMAP_THRESHOLD_": "8000000000", "MALLOC_TRIM_THRESHOLD_": "16000000000"}
    # A run within a worker of xdist would be taken for one, and not measure.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | malloc
    environment["OMP_WAIT_POLICY"] = "passive"  # other tests want the cores
    environment["CUDA_VISIBLE_DEVICES"] = ""  # `make gpu` runs those of a GPU

    def run(*arguments):
        process = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    chosen = "batch_norm_relu-512x28x28-nchw-fp32 or 1x8x2x2-forward-nchw-eager"
    chosen = f"({chosen}) and not compile and not timm"
    printed = run(
        "pytest", "benchmarks/bench_ops.py", "benchmarks/bench_overhead.py",
        "-p", "no:cacheprovider", "--benchmark-enable", "--benchmark-only",
        "--batch=1", "--benchmark-max-time=0.01", f"--benchmark-json={results}", "-k", chosen,
        f"--so-far={tmp_path / gpu.SO_FAR}",
    )  # fmt: skip
    assert "speed relative to best eager" in printed
    measured = json.loads(results.read_text())["benchmarks"]
    assert all(benchmark["extra_info"]["speed"] > 0 for benchmark in measured)
    so_far = gpu.measured_so_far(tmp_path)["benchmarks"]
    assert so_far == [{name: b[name] for name in ("fullname", "extra_info")} for b in measured]
    table = run("benchmarks.report", str(results))
    for passes in runners.PASSES:
        assert f"| batch_norm_relu | 1x512x28x28 | nchw | fp32 | {passes} | cpu |" in table
    assert "| batch_norm_add_relu | 1x8x2x2 | nchw | fp32 | forward | eager |" in table
    assert "`cudnn` (it needs a cuda device)" in table


def test_part_of_make_gpu(tmp_path):
    """What became of it, and its last line; one that hangs is stopped."""

    def run(program, seconds=60):
        part = gpu.Part("tests", tmp_path / "log", 0, [sys.executable, "-c", program])
        part.run(time.monotonic() + seconds + gpu.GRACE)
        return part

    assert run("print('= 2 passed =\\n')").last_line == "2 passed"
    failed = run("print('FAILED test_that\\n1 failed'); exit(1)")
    assert (failed.result, failed.last_line) == ("failed", "1 failed")
    assert run("import time; time.sleep(60)", seconds=0.5).result == "failed: out of time"


def test_what_make_gpu_has_measured(tmp_path):
    """Each part's benchmarks join those before; one that came to no end left lines alone."""
    last, so_far = tmp_path / gpu.LAST, tmp_path / gpu.SO_FAR
    assert gpu.measured_so_far(tmp_path) == {"benchmarks": []}
    for written in ({"machine_info": 0, "benchmarks": [0]}, "", {"benchmarks": [1], "more": 2}):
        last.write_text(json.dumps(written) if written else "")
        gpu.collect(tmp_path)
        assert not last.exists()
    assert gpu.measured_so_far(tmp_path) == {"benchmarks": [0, 1], "more": 2}
    so_far.write_text("0\n7\n1\n")
    assert gpu.measured_so_far(tmp_path) == {"benchmarks": [0, 7, 1], "more": 2}


def test_parts_of_make_gpu(tmp_path):
    """Each has a name of its own and time beyond its grace; there is time for all but tuning."""
    parts = {part.name: part for part in gpu.plan(tmp_path)}
    assert tuple(parts) == (*gpu.BUILD, *gpu.PARTS)
    assert all(part.limit >= gpu.GRACE + 15 for part in parts.values())
    for left_out in (gpu.TUNE, set(gpu.PARTS) - set(gpu.TUNE)):
        assert sum(part.limit for name, part in parts.items() if name not in left_out) <= gpu.TOTAL


def test_summary_of_make_gpu(tmp_path):
    log = tmp_path / "tests.txt"
    log.write_text(
        "[gw1] [  5%] FAILED tests/test_a.py::test_that \n"
        "[gw0] [100%] FAILED tests/test_a.py::test_this \n"
        "FAILED tests/test_a.py::test_that - assert 0\n1 failed, 7 passed\n"
        "FAILED tests/test_a.py::test_it[cuda-(32, 64)] - a - b\n"
        "FAILED tests/test_a.py::test_it[cuda-(32, 128)]\n"
        "ERROR tests/test_b.py\n"
        "========= ERROR SUMMARY: 0 errors\n"
    )
    parts = [
        gpu.Part("tests", log, 0, [], result="failed", seconds=3, last_line="1 failed, 7 passed"),
        gpu.Part("memcheck", tmp_path / "memcheck.txt", 0, [], result="not run: no CUDA device"),
    ]
    case = {
        "function": "add_relu",
        "shape": "8x64",
        "layout": "nchw",
        "dtype": "bf16",
        "passes": "both",
    }
    figures = {"ms": 0.5, "gb_s": 2000.0, "copy_gb_s": 2500.0, "copy_share": 0.8}
    measured = {
        "benchmarks": [
            {
                "fullname": "benchmarks/bench_ops.py::test_op",
                "extra_info": {**case, **figures, **its},
            }
            for its in ({"runner": "compile", "speed": 1.5}, {"runner": "cuda", "speed": 1.8})
        ],
        "unavailable": {"flag_gems": "it is not installed"},
    }
    text = gpu.summary({"card": "H100", "torch": "2.11"}, parts, measured)
    for line in (
        "| H100 | 2.11 |",
        "| tests | failed | 3 | 1 failed, 7 passed |",
        "| memcheck | not run: no CUDA device | 0 |  |",
        "\n- `FAILED tests/test_a.py::test_that - assert 0`\n"
        "- `FAILED tests/test_a.py::test_this`\n"
        "- `FAILED tests/test_a.py::test_it[cuda-(32, 64)] - a - b`\n"
        "- `FAILED tests/test_a.py::test_it[cuda-(32, 128)]`\n"
        "- `ERROR tests/test_b.py`\n",
        "Not measured: `flag_gems` (it is not installed).",
        "A copy reached up to 2500 GB/s.",
        "| add_relu | 8x64 | nchw | bf16 | both | cuda | 500.0 | 2000.0 | 80% | 1.80 | 1.20 |",
    ):
        assert line in text

"""The README and its plots are what `make readme` makes of the committed results."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import bench_ops, choices, compare, report, runners

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "benchmarks/results").glob("*.json"))


@pytest.fixture
def results() -> list[dict]:
    return report.results_of(json.loads(RESULTS[0].read_text()))


def test_readme_shows_the_committed_results(tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "benchmarks/results"
    folder.mkdir(parents=True)
    copies = [folder / path.name for path in RESULTS]
    for path, copied in zip(RESULTS, copies, strict=True):
        copied.write_bytes(path.read_bytes())
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    command = [sys.executable, "-m", "benchmarks.report", "--readme", readme, *copies]
    subprocess.run(command, cwd=ROOT, check=True)
    assert readme.read_text() == (ROOT / "README.md").read_text(), "run `make readme`"
    plots = sorted(folder.glob("*.svg"))
    assert len(plots) == 2 * len(RESULTS)
    version = importlib.metadata.version("matplotlib")
    same_release = f"matplotlib=={version}\n" in (ROOT / "constraints.txt").read_text()
    for plot in plots:
        committed = (ROOT / "benchmarks/results" / plot.name).read_bytes()
        assert plot.read_bytes() == committed or not same_release, plot  # another draws otherwise


def test_losses_stand_beside_wins(results):
    slow = {**results[0], "runner": "slow", "speed": 0.5}
    table = report.table([results[0], slow], ("function",))
    assert f"| eager | slow |\n| --- | --- | --- |\n| {slow['function']} |" in table
    assert table.endswith("| 0.50 |\n")


def test_every_function_and_pass_has_its_usual_cases():
    usual = {case for case in bench_ops.CASES if bench_ops.usual(*case)}
    assert {case[0] for case in usual} == set(runners.FUNCTIONS)
    assert {case[4] for case in usual} == set(runners.PASSES)
    assert {case[5] for case in usual} == set(runners.RUNNERS) - {runners.TWO_LAUNCHES}


def test_launches_are_chosen_by_the_committed_results():
    written = (ROOT / "csrc/cuda/measured.h").read_text()
    launches = (ROOT / "benchmarks/results/launches").glob("*.json")
    assert written == choices.header(launches), "run `make choices`"


def test_choices_of_a_measured_pass(tmp_path):
    case = ("dual_batch_norm_add_relu", "512x28x28", "channels_last", "bf16", "backward")
    assert bench_ops.compares_launches(*case, runners.ON_CHIP)
    assert not bench_ops.usual(*case, runners.TWO_LAUNCHES)
    shown = dict(zip(bench_ops.NAMES, case, strict=False), shape="64x512x28x28")
    benchmarks = [
        {
            "fullname": "benchmarks/bench_ops.py::bench_op",
            "extra_info": shown | {"launched": "one launch"} | result,
        }
        for result in (
            {"runner": runners.ON_CHIP, "speed": 3.0},
            {"runner": runners.TWO_LAUNCHES, "speed": 2.0},
            {"runner": runners.ON_CHIP, "speed": 3.0, "dtype": "fp32"},  # interrupted
            # Where there is no room for one launch both are two, and differ by chance.
            {"runner": runners.ON_CHIP, "speed": 2.1, "layout": "nchw", "launched": "two launches"},
            {"runner": runners.TWO_LAUNCHES, "speed": 2.0, "layout": "nchw"},
        )
    ]
    measured = {"machine_info": {"architecture": 90}, "benchmarks": benchmarks}
    (tmp_path / "h100.json").write_text(json.dumps(measured))
    header = choices.header([tmp_path / "h100.json"])
    assert "std::array<Measured, 1>" in header
    assert "    {{90, true, Tail::kNorm, true, 2}, 512, 50176, 1.50},\n" in header


def test_comparison_has_a_median_and_its_spread():
    case = ("add_relu", "8x64", "nchw", "fp32", "both", "cpu")
    new = ("relu_add", *case[1:])
    turns = [({case: 1.0}, {case: speed, new: 2.0}) for speed in (1.0, 1.1, 1.2, 1.3, 1.4)]
    assert compare.ratios(turns).endswith("| cpu | 1.200 | 1.000 | 1.400 |\n")

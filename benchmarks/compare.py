"""`make bench-compare BASE=ref`: is the working tree faster than that commit, and how surely?

One process cannot load two builds, so processes of the two take turns, over the working tree's
benchmarks. Each gives a case's speed relative to the eager beside it; what is printed is the ratio
of neighbours: its median, and the least and the greatest. Where nothing has changed, all of n turns
fall on one side of 1 once in 2^(n - 1).
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).resolve().parent.parent
CASES = "bench_op and 512x28x28 and both and not eager and not compile and not timm"


def build(ref: str, folder: Path) -> Path:
    """A folder to import that commit's `fusedskip` from, and nothing else."""
    tree = folder / "tree"
    subprocess.run(["git", "worktree", "add", "--detach", tree, ref], cwd=ROOT, check=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, check=True)
    # Or it would be found where this environment has it, which is in the working tree.
    (tree / "fusedskip/triton_kernels").symlink_to(tree / "triton_kernels")
    return imports(tree, folder / "base")


def imports(tree: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "fusedskip").symlink_to(tree / "fusedskip")
    return folder


def speeds(package: Path, results: Path, options: list[str]) -> dict[tuple[str, ...], float]:
    """The speeds of the cases that ran: the other commit may lack a function."""
    # -P and importlib: the folder that this runs in must not come before `package`.
    command = [
        sys.executable, "-P", "-m", "pytest", "benchmarks", "--import-mode=importlib", "--quiet",
        "-p", "no:cacheprovider", "--benchmark-enable", "--benchmark-only",
        f"--benchmark-json={results}", *options,
    ]  # fmt: skip
    path = os.pathsep.join(map(str, (package, ROOT)))
    process = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    if not (results.exists() and results.stat().st_size):
        sys.exit(process.stdout + process.stderr)
    return {
        tuple(result[name] for name in (*report.CASE, "runner")): result["speed"]
        for result in report.results_of(json.loads(results.read_text()))
    }


def ratios(
    turns: list[tuple[dict[tuple[str, ...], float], dict[tuple[str, ...], float]]],
) -> str:
    """A table of the turns: each has the speeds of the base and of the working tree."""
    found = defaultdict(list)
    for base, here in turns:
        for case in here:
            if case in base:
                found[case].append(here[case] / base[case])
    rows = []
    for case, values in found.items():
        spread = statistics.median(values), min(values), max(values)
        rows.append([*case, *(f"{value:.3f}" for value in spread)])
    header = [*report.CASE, "runner", "speed over base", "least", "greatest"]
    return report.markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("base", help="a commit")
    parser.add_argument("-k", default=CASES, help="cases, as pytest chooses them")
    parser.add_argument("--turns", type=int, default=6, help="processes of each")
    options, others = parser.parse_known_args()
    arguments = ["-k", options.k, "--benchmark-max-time=0.2", *others]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            packages = build(options.base, folder), imports(ROOT, folder / "here")
            order = list(
                itertools.islice(itertools.cycle((packages, packages[::-1])), options.turns)
            )
            turns = []
            for pair in order:  # who begins, alternates
                measured = {p: speeds(p, folder / "results.json", arguments) for p in pair}
                turns.append(tuple(measured[p] for p in packages))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder / "tree"], cwd=ROOT)
    print(ratios(turns), end="")


if __name__ == "__main__":
    main()

"""`python -m benchmarks.report RESULTS.json`: the Markdown tables of a `--benchmark-json` file."""

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean

COLUMNS = {
    "ms": ("ms", "{:.3f}"),
    "us": ("µs", "{:.1f}"),
    "gb_s": ("GB/s", "{:.1f}"),
    "copy_share": ("of copy", "{:.0%}"),
    "over_floor": ("over floor", "{:.2f}"),
    "speed": ("vs eager", "{:.2f}"),
    "vs_compile": ("vs compile", "{:.2f}"),
}
CPU_COLUMNS = ("ms", "gb_s", "copy_share", "over_floor", "speed")
GPU_COLUMNS = ("us", "gb_s", "copy_share", "speed", "vs_compile")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def results_of(measured: dict) -> list[dict]:
    """What was measured to the end: an interrupted benchmark says nothing of itself."""
    return [
        benchmark["extra_info"] for benchmark in measured["benchmarks"] if benchmark["extra_info"]
    ]


def summary(results: list[dict]) -> str:
    """The geometric means of the speed relative to eager, a row for each operation and dtype."""

    def key(result: dict) -> tuple[str, ...]:
        return tuple(result[name] for name in ("function", "layout", "dtype", "runner"))

    groups = itertools.groupby(sorted(results, key=key), key)
    means = {
        group: f"{geometric_mean(result['speed'] for result in rows):.2f}" for group, rows in groups
    }
    runners = list(dict.fromkeys(result["runner"] for result in results))
    rows = [
        [*case, *(means.get((*case, runner), "") for runner in runners)]
        for case in dict.fromkeys(group[:-1] for group in means)
    ]
    return markdown(["operation", "layout", "dtype", *runners], rows)


def details(results: list[dict], columns: Sequence[str] = CPU_COLUMNS) -> str:
    """Every measurement, a row each."""
    names = ("function", "shape", "layout", "dtype", "runner")

    def case(result: dict) -> tuple[str, ...]:
        return tuple(result[name] for name in names[:-1])

    # Each is relative to the eager beside it: so is what they are compared by.
    compiled = {case(r): r["speed"] for r in results if r["runner"] == "compile"}
    rows = []
    for result in results:
        figures = {**result, "us": 1e3 * result["ms"]}
        if case(result) in compiled:
            figures["vs_compile"] = result["speed"] / compiled[case(result)]
        cells = (COLUMNS[key][1].format(figures[key]) if key in figures else "" for key in columns)
        rows.append([*case(result), result["runner"], *cells])
    return markdown([*names, *(COLUMNS[key][0] for key in columns)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, help="written by pytest --benchmark-json")
    measured = json.loads(parser.parse_args().results.read_text())
    machine, commit = measured["machine_info"], measured["commit_info"]
    results = results_of(measured)
    print(
        f"{machine['cpu']['brand_raw']}, {machine['cpu']['count']} cores; commit {commit['id']}, "
        f"{measured['datetime']:.10}.\n\n"
        "Speed relative to best eager, geometric mean over the shapes:\n\n"
        f"{summary(results)}\n"
        "Medians. GB/s: bytes by `benchmarks/traffic.py` over time; of copy: as a share of what a "
        "copy reaches in the same run (1 over it: time over the runner's own traffic at that "
        "bandwidth); over floor: time over that of reading and writing each tensor once.\n\n"
        f"{details(results)}",
        end="",
    )


if __name__ == "__main__":
    main()

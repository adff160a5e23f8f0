"""`python -m benchmarks.report RESULTS.json...`: tables and plots of what `make bench` wrote.

Prints Markdown; `--plots` draws, too; `--readme README.md` instead rewrites what stands in that
file between two comments, and the plots it shows. All follows from the results alone.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean

COLUMNS = {
    "ms": ("ms", "{:.3f}"),
    "us": ("µs", "{:.1f}"),
    "gb_s": ("GB/s", "{:.1f}"),
    "copy_share": ("of copy", "{:.0%}"),
    "over_floor": ("over floor", "{:.2f}"),
    "floor_share": ("of floor", "{:.0%}"),
    "speed": ("vs eager", "{:.2f}"),
    "vs_compile": ("vs compile", "{:.2f}"),
    "launched": ("as", "{}"),
}
CPU_COLUMNS = ("ms", "gb_s", "copy_share", "over_floor", "speed")
GPU_COLUMNS = ("us", "gb_s", "copy_share", "speed", "vs_compile", "launched")
CASE = ("function", "shape", "layout", "dtype", "passes")
MARKS = "<!-- speed: `make readme` writes what follows -->\n", "<!-- end of speed -->\n"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def results_of(measured: dict) -> list[dict]:
    """What was measured to the end: an interrupted benchmark says nothing of itself.

    The level is the file it stands in: ops, overhead, blocks, models.
    """
    return [
        {
            "passes": "both",
            **benchmark["extra_info"],
            "level": Path(benchmark["fullname"].partition("::")[0]).stem.removeprefix("bench_"),
        }
        for benchmark in measured["benchmarks"]
        if benchmark["extra_info"]
    ]


def at(results: list[dict], **fields: str) -> list[dict]:
    """The results that have these values."""
    return [r for r in results if all(r.get(name) == value for name, value in fields.items())]


def table(
    results: list[dict],
    names: Sequence[str],
    figure: str = "speed",
    mean: Callable[[Iterable[float]], float] = geometric_mean,
) -> str:
    """A row a case, a column a runner; where `names` leave several results, their mean."""

    def key(result: dict) -> tuple[str, ...]:
        return tuple(result[name] for name in (*names, "runner"))

    groups = itertools.groupby(sorted(results, key=key), key)
    cells = {
        group: COLUMNS[figure][1].format(mean(result[figure] for result in rows))
        for group, rows in groups
    }
    runners = list(dict.fromkeys(result["runner"] for result in results))
    rows = [
        [*case, *(cells.get((*case, runner), "") for runner in runners)]
        for case in dict.fromkeys(key(result)[:-1] for result in results)
    ]
    return markdown([*names, *runners], rows)


def details(results: list[dict], columns: Sequence[str] = CPU_COLUMNS) -> str:
    """Every measurement, a row each."""

    def case(result: dict) -> tuple[str, ...]:
        return tuple(result[name] for name in CASE)

    # Each is relative to the eager beside it: so is what they are compared by.
    compiled = {case(r): r["speed"] for r in at(results, runner="compile")}
    rows = []
    for result in results:
        figures = {**result, "us": 1e3 * result["ms"]}
        if case(result) in compiled:
            figures["vs_compile"] = result["speed"] / compiled[case(result)]
        cells = (COLUMNS[key][1].format(figures[key]) if key in figures else "" for key in columns)
        rows.append([*case(result), result["runner"], *cells])
    return markdown([*CASE, "runner", *(COLUMNS[key][0] for key in columns)], rows)


def summary(results: list[dict]) -> str:
    """The geometric means of the speed relative to eager, a row for each operation and dtype."""
    return table(results, ("function", "passes", "layout", "dtype"))


def missing(measured: dict) -> str:
    """What was left out, and why."""
    unavailable = measured.get("unavailable", {}).items()
    text = "; ".join(f"`{runner}` ({reason})" for runner, reason in unavailable)
    return f"\nNot measured: {text}.\n" if text else ""


def describe(measured: dict) -> str:
    """On what it was measured, and with what."""
    machine = measured["machine_info"]
    return (
        f"{machine.get('device') or machine['cpu']['brand_raw']}; torch "
        f"{machine.get('torch', 'unknown')}; commit {measured['commit_info']['id']:.10}, "
        f"{measured['datetime']:.10}.\n{missing(measured)}"
    )


def section(measured: dict, plots: Sequence[Path]) -> str:
    """The README's account of one machine: losses stand in the same tables as wins.

    What comes after the first table and the plots is folded.
    """
    results = results_of(measured)
    whole = at(results, level="ops", passes="both")
    apart = [r for r in at(results, level="ops") if r["passes"] != "both"]
    folded = []
    for text, chosen, names, figure in (
        (
            "Time over that of reading and writing each tensor once at the copy bandwidth of the "
            "same run, less is faster:",
            at(whole, function=whole[0]["function"]),
            ("function", "shape", "layout", "dtype"),
            "over_floor",
        ),
        ("Either pass by itself:", apart, ("function", "passes", "layout", "dtype"), "speed"),
        (
            "A call on a tensor too small to matter, beside eager's three calls:",
            at(results, level="overhead"),
            ("function", "passes", "shape"),
            "speed",
        ),
        (
            "Blocks, convolutions included, beside their eager twins:",
            at(results, level="blocks"),
            ("function", "shape", "layout", "dtype"),
            "speed",
        ),
        (
            "torchvision's models: as they are, compiled, fused, and both:",
            at(results, level="models"),
            ("function", "passes", "shape", "layout", "dtype"),
            "speed",
        ),
    ):
        if chosen:
            folded.append(f"{text}\n\n{table(chosen, names, figure)}")
    return "\n".join(
        [
            describe(measured),
            "Forward and backward in training, geometric mean over those batch norms of ResNet-50 "
            "that a runner was measured at:\n",
            table(whole, ("function", "layout", "dtype")),
            "".join(f"![{path.stem}]({path.as_posix()})\n" for path in plots),
            "<details><summary>By shape, either pass, small tensors, blocks, models</summary>\n",
            *folded,
            "</details>\n",
        ]
    )


def draw(results: list[dict], stem: Path) -> list[Path]:
    """Two SVGs, the same bytes for the same results: time over floor, and speed."""
    import matplotlib.pyplot as plt  # only plots take it

    whole = [r for r in results if r["level"] == "ops" and r["passes"] == "both"]
    whole = [
        r for r in whole if (r["layout"], r["dtype"]) == (whole[0]["layout"], whole[0]["dtype"])
    ]
    style = {"svg.fonttype": "none", "svg.hashsalt": "fusedskip", "font.size": 8}
    paths = []
    with plt.rc_context(style):
        for figure, label, name, best in (
            ("over_floor", "time over floor", "shape", "lower"),
            ("speed", "speed relative to best eager", "function", "higher"),
        ):
            chosen = at(whole, function=whole[0]["function"]) if name == "shape" else whole
            groups = list(dict.fromkeys(r[name] for r in chosen))
            runners = list(dict.fromkeys(r["runner"] for r in chosen))
            canvas, axes = plt.subplots(figsize=(7, 0.6 + 0.45 * len(groups)), layout="constrained")
            height = 0.8 / len(runners)
            for index, runner in enumerate(runners):
                found = [
                    (row, [r[figure] for r in at(chosen, runner=runner, **{name: group})])
                    for row, group in enumerate(groups)
                ]
                bars = [(row + index * height, geometric_mean(v)) for row, v in found if v]
                axes.barh(*zip(*bars, strict=True), height, label=runner)
            axes.set_yticks([row + 0.4 - height / 2 for row in range(len(groups))], groups)
            axes.invert_yaxis()
            axes.axvline(1, color="black", linewidth=0.8)
            case = " ".join(whole[0][key] for key in ("layout", "dtype"))
            subject = f"{whole[0]['function']}, " if name == "shape" else ""
            axes.set_xlabel(f"{label}, {best} is better: {subject}forward and backward, {case}")
            axes.legend()
            paths.append(stem.with_name(f"{stem.name}-{figure.replace('_', '-')}.svg"))
            canvas.savefig(paths[-1], metadata={"Date": None})
            plt.close(canvas)
    return paths


def rewritten(readme: str, sections: Iterable[str]) -> str:
    """The README with these sections between the two marks."""
    before, _, rest = readme.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    return "\n".join([before + MARKS[0], *sections, MARKS[1]]) + after


def page(measured: dict) -> str:
    results = results_of(measured)
    return (
        f"{describe(measured)}\n"
        "Speed relative to best eager, geometric mean over the shapes:\n\n"
        f"{summary(results)}\n"
        "Medians. GB/s: bytes by `benchmarks/traffic.py` over time; of copy: as a share of what a "
        "copy reaches in the same run (1 over it: time over the runner's own traffic at that "
        "bandwidth); over floor: time over that of reading and writing each tensor once.\n\n"
        f"{details(results)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="written by pytest --benchmark-json")
    parser.add_argument("--plots", action="store_true", help="draw SVGs beside the results")
    parser.add_argument("--readme", type=Path, help="rewrite this file's tables, and the SVGs")
    options = parser.parse_args()
    files = {path: json.loads(path.read_text()) for path in options.results}
    plots = {
        path: draw(results_of(measured), path.with_suffix(""))
        for path, measured in files.items()
        if options.plots or options.readme
    }
    if not options.readme:
        print(*map(page, files.values()), sep="\n", end="")
        return
    root = options.readme.resolve().parent
    sections = (
        section(measured, [plot.resolve().relative_to(root) for plot in plots[path]])
        for path, measured in files.items()
    )
    options.readme.write_text(rewritten(options.readme.read_text(), sections))


if __name__ == "__main__":
    main()

"""What a call costs where the tensor is too small to matter, beside eager's three calls."""

import itertools
from collections.abc import Callable

from benchmarks import runners

# So many calls are timed at once: one takes less than reading the clock is good for.
CALLS = 100
FUNCTION = "batch_norm_add_relu"
NAMES = ("shape", "passes", "layout", "runner")
CASES = list(
    itertools.product(
        ("1x8x2x2", "8x64x7x7"), ("both", "forward"), runners.LAYOUTS,
        ("eager", *runners.BACKENDS),
    )
)  # fmt: skip


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def bench_overhead(benchmark, measure, shape, passes, layout, runner):
    case = {
        "function": FUNCTION, "shape": shape, "layout": layout, "dtype": "fp32", "passes": passes,
    }  # fmt: skip
    benchmark.group = f"{CALLS} calls of {' '.join(case.values())}"
    inputs = (runners.Inputs.random(FUNCTION, tuple(map(int, shape.split("x"))), layout, "fp32"),)
    run, eager = (repeated(runners.step(r, FUNCTION, passes, inputs)) for r in (runner, "eager"))
    with runners.using(runner):
        measure(
            run,
            eager,
            describe=lambda seconds, eager_seconds, _: {
                **case,
                "runner": runner,
                "ms": 1e3 * seconds / CALLS,
                "speed": eager_seconds / seconds,
            },
            # The clock of a machine without a GPU changes from second to second.
            least_rounds={"cpu": 31, "cuda": 11}[runners.DEVICE],
        )

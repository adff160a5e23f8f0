"""What a call costs where the tensor is too small to matter, beside eager's three calls."""

import functools
from collections.abc import Callable

import pytest

import fusedskip
from benchmarks import runners

# So many calls are timed at once: one takes less than reading the clock is good for.
CALLS = 100

PASSES = {"forward": runners.forward, "forward+backward": runners.forward_backward}


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


@pytest.mark.parametrize("runner", ["eager", *runners.BACKENDS])
@pytest.mark.parametrize("layout", runners.LAYOUTS)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("shape", ["1x8x2x2", "8x64x7x7"])
def bench_overhead(benchmark, measure, shape, passes, layout, runner):
    function = "batch_norm_add_relu"
    case = {"function": f"{function}, {passes}", "shape": shape, "layout": layout, "dtype": "fp32"}
    benchmark.group = f"{CALLS} calls of {' '.join(case.values())}"
    inputs = runners.Inputs.random(tuple(map(int, shape.split("x"))), layout, "fp32")
    run, eager = (
        repeated(functools.partial(PASSES[passes](r, function), inputs)) for r in (runner, "eager")
    )
    with fusedskip.use_backend(runner if runner in runners.BACKENDS else "auto"):
        measure(
            run,
            eager,
            copy=lambda: None,
            describe=lambda seconds, eager_seconds, _: {
                **case,
                "runner": runner,
                "ms": 1e3 * seconds / CALLS,
                "speed": eager_seconds / seconds,
            },
        )

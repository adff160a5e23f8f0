"""Forward and backward of each operation at shapes of ResNet-50, beside eager and Inductor."""

import functools
import itertools

import pytest

import fusedskip
from benchmarks import runners, traffic

# Channels and plane, and with how large a batch.
SHAPES = {
    "cpu": {"64x56x56": 32, "256x56x56": 32, "512x28x28": 32, "2048x7x7": 32},
    "cuda": {"256x56x56": 256, "512x28x28": 256, "1024x14x14": 64, "2048x7x7": 64},
}[runners.DEVICE]

# Function, shape, layout, dtype. A GPU is for bf16 channels-last; the rest is sampled there.
CASES = {
    "cpu": list(itertools.product(runners.FUNCTIONS, SHAPES, runners.LAYOUTS, runners.DTYPES)),
    "cuda": [
        *itertools.product(runners.FUNCTIONS, SHAPES, ["channels_last"], ["bf16"]),
        *itertools.product(["batch_norm_add_relu"], list(SHAPES)[::2], ["nchw"], ["bf16"]),
        *itertools.product(["batch_norm_add_relu"], list(SHAPES)[::2], ["channels_last"], ["fp32"]),
    ],
}[runners.DEVICE]

# Inductor's own warnings are no reason to stop.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("runner", ["eager", "compile", *runners.BACKENDS])
@pytest.mark.parametrize(("function", "shape", "layout", "dtype"), CASES)
def bench_training(benchmark, measure, request, function, shape, layout, dtype, runner):
    batch = request.config.getoption("--batch") or SHAPES[shape]
    case = {"function": function, "shape": f"{batch}x{shape}", "layout": layout, "dtype": dtype}
    benchmark.group = " ".join(case.values())
    sizes = tuple(map(int, case["shape"].split("x")))
    inputs = itertools.cycle(runners.Inputs.rotation(sizes, layout, dtype))
    run, eager = (runners.forward_backward(r, function) for r in (runner, "eager"))
    itemsize = runners.DTYPES[dtype].itemsize
    figures = functools.partial(traffic.figures, function, runner, sizes, itemsize)
    with fusedskip.use_backend(runner if runner in runners.BACKENDS else "auto"):
        measure(
            lambda: run(next(inputs)),
            eager=lambda: eager(next(inputs)),
            copy=lambda: runners.copy(next(inputs)),
            describe=lambda *seconds: {**case, "runner": runner, **figures(*seconds)},
            before=runners.occupy,
        )

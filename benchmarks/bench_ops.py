"""Forward and backward of each operation at four shapes of ResNet-50, beside eager and Inductor."""

import functools

import pytest
import torch

import fusedskip
from benchmarks import runners, traffic

SHAPES = ["64x56x56", "256x56x56", "512x28x28", "2048x7x7"]

# Inductor's own warnings are no reason to stop.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("runner", ["eager", "compile", *runners.BACKENDS])
@pytest.mark.parametrize("dtype", runners.DTYPES)
@pytest.mark.parametrize("layout", runners.LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", runners.FUNCTIONS)
def bench_training(benchmark, measure, request, function, shape, layout, dtype, runner):
    batch = request.config.getoption("--batch")
    case = {"function": function, "shape": f"{batch}x{shape}", "layout": layout, "dtype": dtype}
    benchmark.group = " ".join(case.values())
    sizes = tuple(map(int, case["shape"].split("x")))
    inputs = runners.Inputs.random(sizes, layout, dtype)
    copied = torch.empty_like(inputs.x)
    figures = functools.partial(traffic.figures, function, runner, sizes, inputs.x.element_size())
    with fusedskip.use_backend(runner if runner in runners.BACKENDS else "auto"):
        measure(
            runners.forward_backward(runner, function, inputs),
            eager=runners.forward_backward("eager", function, inputs),
            copy=lambda: copied.copy_(inputs.x.detach()),
            describe=lambda *seconds: {**case, "runner": runner, **figures(*seconds)},
        )

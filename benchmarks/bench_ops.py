"""Each pass of each operation at the batch norms of ResNet-50, beside eager and others."""

import functools
import itertools

import pytest

from benchmarks import runners, traffic

# Channels and plane, and how many images: on a GPU, small planes fill it with fewer.
SHAPES = {
    shape: {"cpu": 32, "cuda": 256 if int(shape.rpartition("x")[2]) > 14 else 64}[runners.DEVICE]
    for shape in (
        "64x112x112", "64x56x56", "256x56x56", "128x56x56", "128x28x28", "512x28x28",
        "256x28x28", "256x14x14", "1024x14x14", "512x14x14", "512x7x7", "2048x7x7",
    )
}  # fmt: skip
NAMES = ("function", "shape", "layout", "dtype", "passes", "runner")
CASES = [
    case
    for case in itertools.product(
        runners.FUNCTIONS, SHAPES, runners.LAYOUTS, runners.DTYPES, runners.PASSES, runners.RUNNERS
    )
    if runners.has(case[-1], case[0])
]
MAIN = "batch_norm_add_relu"
TAILS = (MAIN, "batch_norm_relu", "dual_batch_norm_add_relu")
SAMPLE = "512x28x28"
CORE = {
    "cpu": ("64x56x56", "256x56x56", SAMPLE, "2048x7x7"),
    "cuda": ("256x56x56", SAMPLE, "1024x14x14", "2048x7x7"),
}[runners.DEVICE]
DTYPE = {"cpu": "fp32", "cuda": "bf16"}[runners.DEVICE]

# Inductor's own warnings are no reason to stop.
pytestmark = pytest.mark.filterwarnings("default")


def usual(function, shape, layout, dtype, passes, runner) -> bool:
    """What fits into minutes: tails at a few shapes, the rest, and the passes apart, at one."""
    sampled = shape == SAMPLE
    if runner == runners.TWO_LAUNCHES:
        return False
    if shape not in CORE or not (sampled or function in TAILS):
        return False
    if passes != "both" and not (sampled and function in TAILS and dtype == DTYPE):
        return False
    if runner == "compile" and function != MAIN and not (sampled and passes == "both"):
        return False
    if runners.DEVICE == "cuda":  # for bf16 channels-last
        return (layout, dtype) == ("channels_last", DTYPE) or (function == MAIN and sampled)
    return runner != "compile" or dtype == DTYPE or function == MAIN


def compares_launches(function, shape, layout, dtype, passes, runner) -> bool:
    """What `make choices` follows from."""
    launches = runners.ON_CHIP, runners.TWO_LAUNCHES
    return function in TAILS and passes != "both" and runner in launches


def bench_op(benchmark, measure, request, function, shape, layout, dtype, passes, runner):
    batch = request.config.getoption("--batch") or SHAPES[shape]
    case = {
        "function": function,
        "shape": f"{batch}x{shape}",
        "layout": layout,
        "dtype": dtype,
        "passes": passes,
    }
    benchmark.group = " ".join(case.values())
    sizes = tuple(map(int, case["shape"].split("x")))
    rotation = runners.Inputs.rotation(function, sizes, layout, dtype)
    turns = itertools.cycle(rotation)
    # Eager would else be given what the runner has just had.
    half = len(rotation) // 2
    half_round = rotation[half:] + rotation[:half]
    itemsize = runners.DTYPES[dtype].itemsize
    figures = functools.partial(traffic.figures, function, passes, runner, sizes, itemsize)
    with runners.using(runner):
        try:
            run = runners.step(runner, function, passes, rotation)
            run()
        except Exception as error:
            if runner not in runners.LIBRARIES:
                raise
            reason = runners.UNAVAILABLE[f"{runner}, {benchmark.group}"] = str(error).split("\n")[0]
            pytest.skip(reason)
        measure(
            run,
            # Second: what Inductor does to running statistics would spoil the graph of eager.
            eager=runners.step("eager", function, passes, half_round),
            copy=lambda: runners.copy(next(turns)),
            describe=lambda *seconds: {
                **case,
                "runner": runner,
                **figures(*seconds),
                **runners.launched(runner, function),
            },
            before=runners.occupy,
        )

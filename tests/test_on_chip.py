"""A pass in training as one launch of the CUDA kernels, which keep on the chip what fits."""

import importlib
import itertools
import os

import pytest
import torch

import fusedskip
from fusedskip import backends

from .support import CAT, LAYOUTS, NORMS, assert_as_good_as_eager, call, make_problem, run

on_gpu = torch.cuda.is_available() and backends.unavailable("cuda", "cuda") is None
if not (on_gpu or "EMULATED_EXTENSION" in os.environ):
    pytest.skip(
        "needs a CUDA device; test_cuda_emulated.py runs this without", allow_module_level=True
    )

extension = importlib.import_module("fusedskip._C")
FUNCTIONS = (*NORMS, CAT)
# Rows of whole accesses. Emulated, a part of them is kept, in registers and in shared memory: of
# (110, 72, 4, 4) channels-last, in two blocks of channels of which the second is nearly empty, two
# to eight of 10 rounds, or 9; of (2, 5, 72, 160) channels-first two of six in fp32 backward and of
# a dual norm. In clusters, all of (7, 128, 4, 24), and channels-first of (5, 3, 40, 80).
SHAPES = ((110, 72, 4, 4), (2, 5, 72, 160), (5, 3, 40, 80), (7, 128, 4, 24), (2, 8, 1, 8))
# Emulated, fp16 is bf16 but for its conversions, which other tests have seen.
DTYPES = [torch.float32, torch.bfloat16, *([torch.float16] if on_gpu else [])]
FILLING = ((32, 64, 56, 56), (32, 2048, 7, 7), (64, 256, 56, 56))  # a GPU


@pytest.fixture(params=["cuda" if torch.cuda.is_available() else "cpu"])
def device(request):
    with fusedskip.use_backend(request.param), backends.on_chip():
        yield request.param


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_forward_and_backward(device, function, dtype, layout):
    for shape in SHAPES:
        assert_as_good_as_eager(make_problem(function, shape, dtype, layout, device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_far_above_std(device, layout):
    """A thread's pivot is its own first element, wherever its first batch begins."""
    functions = "batch_norm_relu", "dual_batch_norm_add_relu"
    for shape, function in itertools.product(SHAPES, functions):
        problem = make_problem(function, shape, torch.float32, layout, device)
        problem.x.add_(1000)
        assert_as_good_as_eager(problem)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_it_does_not_take(device, function):
    """Forward in evaluation, gradients of parameters alone, narrow accesses and fp64: as ever."""
    for shape, dtype, training in (
        ((7, 64, 4, 8), torch.bfloat16, False),
        ((7, 13, 4, 7), torch.bfloat16, True),
        ((7, 64, 4, 8), torch.float64, True),
    ):
        for layout in LAYOUTS:
            assert_as_good_as_eager(make_problem(function, shape, dtype, layout, device, training))
    problem = make_problem(function, (7, 64, 4, 8), torch.bfloat16, "channels_last", device)
    want = run(problem)
    leaves = {name: leaf for name, leaf in problem.leaves().items() if "weight" in name}
    out = getattr(fusedskip, function)(
        **problem.tensors | leaves | problem.buffers(), training=True
    )
    gradients = torch.autograd.grad(out, leaves.values(), problem.dout)
    for name, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(gradient, want[f"d{name}"])


def launches():
    """Of the last operation, emulated."""
    return int(extension.cpu_instruction_set().split(": ")[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py counts the launches on a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", NORMS)
def test_one_launch_each_way(device, function, layout):
    problem = make_problem(function, (7, 64, 4, 8), torch.bfloat16, layout, device)
    leaves = problem.leaves()
    for allowed, count in ((True, 1), (False, 2)):
        with backends.on_chip(allowed):
            out = call(problem, **leaves, **problem.buffers())
            assert launches() == count
            torch.autograd.grad(out, leaves.values(), problem.dout)
            assert launches() == count


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU cannot be told to refuse")
@pytest.mark.parametrize(
    ("shape", "launched"),
    [((7, 64, 16, 24), "one launch"), ((7, 128, 4, 24), "one launch, in clusters")],
)
@pytest.mark.parametrize("function", NORMS)
def test_refused_by_the_driver(device, function, shape, launched, monkeypatch):
    """Two launches stand in, where blocks would have had to wait for each other."""
    problem = make_problem(function, shape, torch.bfloat16, "channels_last", device)
    run(problem)
    assert extension.cuda_launched() == launched
    monkeypatch.setenv("EMULATED_GPU_IS_SHARED", "1")
    assert_as_good_as_eager(problem)
    run(problem)
    assert launches() == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU cannot be told to be full")
def test_no_memory_to_load_a_kernel(device, monkeypatch):
    """What cannot be asked about it at first is asked again; no kernel is missing for that."""
    problem = make_problem("batch_norm_relu", (7, 64, 4, 8), torch.float16, "nchw", device)
    monkeypatch.setenv("EMULATED_GPU_IS_FULL", "1")
    assert extension.cuda_error() is None
    run(problem)
    assert "two launches" in extension.cuda_launched()
    monkeypatch.delenv("EMULATED_GPU_IS_FULL")
    run(problem)
    assert extension.cuda_launched() == "one launch, in clusters"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU cannot be told to be another")
def test_kernels_that_were_built_for_others(device, monkeypatch):
    assert extension.cuda_error() is None
    monkeypatch.setenv("EMULATED_GPU_IS_ANOTHER", "1")
    assert "emulated" in extension.cuda_error()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_like_two_launches(device, function, layout):
    """Bit for bit where the tensor is cut alike: for one norm, by a GPU that holds 384 blocks.

    Clusters, which 7x7 fits in, cut their own way.
    """
    for shape, dtype in itertools.product(FILLING, (torch.float32, torch.bfloat16)):
        problem = make_problem(function, shape, dtype, layout, device)
        one_launch = run(problem)
        with backends.on_chip(False):
            two_launches = run(problem)
        many = torch.cuda.get_device_properties(0).multi_processor_count >= 128
        cut_alike = layout == "channels_last" and shape[-1] > 7 and many and not problem.is_dual
        if cut_alike:
            assert all(torch.equal(one_launch[name], two_launches[name]) for name in one_launch)
        assert_as_good_as_eager(problem)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_several_streams(device):
    """Launches that need the whole GPU wait for each other, not within each other."""
    problem = make_problem(
        "batch_norm_add_relu", (32, 64, 56, 56), torch.bfloat16, "channels_last", device
    )
    want = run(problem)
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    torch.cuda.synchronize()
    for stream in 10 * streams:
        with torch.cuda.stream(stream):
            results.append(run(problem))
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(result[name], want[name]) for name in want)

"""What only a GPU can show: graphs, streams, launches, sizes, devices."""

import importlib
import re
import subprocess
import sys

import pytest
import torch

import fusedskip
from fusedskip import backends
from fusedskip.__main__ import main

from .support import (
    FUNCTIONS,
    LAYOUTS,
    assert_as_good_as_eager,
    call,
    make_problem,
    parameter,
    run,
)

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu


ON_CHIP = "cuda_on_chip"  # each pass in training in one launch


@pytest.fixture(
    params=[
        *map(parameter, ("cuda", "triton")),
        pytest.param(ON_CHIP, marks=parameter("cuda").marks),
    ]
)
def backend(request):
    if request.param == "triton":
        with fusedskip.use_backend("triton"):
            yield "triton"
    else:
        with fusedskip.use_backend("cuda"), backends.on_chip(request.param == ON_CHIP):
            yield request.param


def test_auto_takes_cuda_when_built_else_triton():
    with fusedskip.use_backend("auto"):
        built = backends.unavailable("cuda", "cuda") is None
        assert backends.select(torch.ones(1, device="cuda")) == ("cuda" if built else "triton")


def test_cpu_kernels_refuse_a_gpu():
    x = torch.ones(2, device="cuda")
    with (
        fusedskip.use_backend("cpu"),
        pytest.raises(RuntimeError, match="cannot take cuda tensors: it takes cpu tensors only"),
    ):
        fusedskip.add_relu(x, x)


@pytest.mark.parametrize("name", ["residual", "weight", "bias", "running_mean", "running_var"])
def test_tensors_on_different_devices(backend, device, name):
    problem = make_problem("batch_norm_add_relu", (2, 3, 4, 5), device=device)
    before = problem.buffers()
    for here, there in (("cuda:0", "cpu"), ("cpu", "cuda:0")):
        tensors = {n: t.to(here) for n, t in (problem.leaves() | problem.buffers()).items()}
        error = f"{name}: expected device {here} like x, got {there}"
        with pytest.raises(ValueError, match=re.escape(error)):
            call(problem, **tensors | {name: tensors[name].to(there)})
        for buffer, value in before.items():
            assert torch.equal(tensors[buffer], value.to(here))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_graph_capture(backend, device, function):
    """A captured step, replayed on other inputs, gives what the step itself gives."""
    problem = make_problem(function, (8, 64, 14, 14), torch.bfloat16, "channels_last", device)
    leaves, buffers = problem.leaves(), problem.buffers()

    def step():
        out = call(problem, **leaves, **buffers)
        return out, *torch.autograd.grad(out, leaves.values(), problem.dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # Triton compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(2):
        with torch.no_grad():
            leaves["x"].normal_()
        before = {name: buffer.clone() for name, buffer in buffers.items()}
        graph.replay()
        got = dict(zip(["out", *(f"d{name}" for name in leaves)], results, strict=True)) | buffers
        for name, want in run(problem.replaced(x=leaves["x"].detach(), **before)).items():
            assert torch.equal(got[name], want), name


COLD_CAPTURE = """
import sys, torch, fusedskip
from fusedskip import backends

x, residual = torch.randn(2, 8, 64, 14, 14, device="cuda", dtype=torch.bfloat16)
x.requires_grad_()
graph = torch.cuda.CUDAGraph()
with fusedskip.use_backend("cuda"), backends.on_chip(sys.argv[1] == "one"):
    with torch.cuda.graph(graph):
        out = fusedskip.batch_norm_add_relu(x, residual, None, None, training=True)
        (dx,) = torch.autograd.grad(out, x, residual)
    graph.replay()
    want = fusedskip.batch_norm_add_relu(x, residual, None, None, training=True)
    assert torch.equal(out, want)
    assert torch.equal(dx, torch.autograd.grad(want, x, residual)[0])
"""


@pytest.mark.parametrize("launches", ["one", "two"])
def test_graph_capture_of_the_first_call(launches):
    """What is asked of the device, once, may be asked then."""
    if (reason := backends.unavailable("cuda", "cuda")) is not None:
        pytest.skip(reason)
    subprocess.run([sys.executable, "-c", COLD_CAPTURE, launches], check=True)


@pytest.mark.skipif(torch.cuda.get_device_capability() < (9, 0), reason="needs sm_90 or later")
def test_launched_as_intended():
    """Clusters and the early start are not given up in silence."""
    if (reason := backends.unavailable("cuda", "cuda")) is not None:
        pytest.skip(reason)
    extension = importlib.import_module("fusedskip._C")

    def launched(shape, on_chip):
        problem = make_problem(
            "batch_norm_add_relu", shape, torch.bfloat16, "channels_last", "cuda"
        )
        with fusedskip.use_backend("cuda"), backends.on_chip(on_chip):
            call(problem, **problem.leaves(), **problem.buffers())
        return extension.cuda_launched()

    assert launched((64, 2048, 7, 7), True) == "one launch, in clusters"
    assert launched((64, 256, 56, 56), True) == "one launch"
    assert launched((64, 256, 56, 56), False) == "two launches, overlapping"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_current_stream(backend, device, function):
    """What a slow stream has yet to write is waited for there, and nowhere else."""
    problem = make_problem(function, (8, 64, 14, 14), torch.bfloat16, "channels_last", device)
    want = run(problem)
    late = torch.full_like(problem.x, float("nan"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(problem.x)
        got = run(problem.replaced(x=late))
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_another_than_the_current_device(backend, function):
    problem = make_problem(function, (8, 64, 14, 14), torch.bfloat16, "channels_last", "cuda:0")
    want, got = run(problem), run(problem.map(lambda tensor: tensor.to("cuda:1")))
    assert all(torch.equal(got[name].to("cuda:0"), want[name]) for name in want)


def launches(function):
    """The names of the kernels and memory operations that a call puts on the GPU."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == on_gpu]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_at_most_two_launches_each_way(backend, device, function, layout):
    """At 7x7 the launches are the cost: no torch arithmetic stands around them."""
    problem = make_problem(function, (8, 64, 7, 7), torch.bfloat16, layout, device)
    leaves, buffers = problem.leaves(), problem.buffers()
    outs = [call(problem, **leaves, **buffers)]
    torch.autograd.grad(outs[0], leaves.values(), problem.dout)  # Triton compiles
    forward = launches(lambda: outs.append(call(problem, **leaves, **buffers)))
    backward = launches(lambda: torch.autograd.grad(outs[1], leaves.values(), problem.dout))
    # Rows of 49 are not whole octets.
    most = 1 if backend == ON_CHIP and layout == "channels_last" else 2
    assert 1 <= len(forward) <= most, forward
    assert 1 <= len(backward) <= most, backward


@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (32, 2048, 7, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_shapes_that_fill_a_gpu(backend, device, function, layout, dtype, shape):
    """Few channels of many rows and many of few: against fp64, and two runs bit for bit."""
    problem = make_problem(function, shape, dtype, layout, device)
    assert_as_good_as_eager(problem)
    first, second = run(problem), run(problem)
    assert all(torch.equal(first[name], second[name]) for name in first)


# (N, H, W, C): 2**31 + 2**20 elements; with one channel also as many positions of a channel.
HUGE = [((2049, 64, 64, 256), True), ((2049, 64, 64, 256), False), ((2049, 1024, 1024, 1), False)]


@pytest.mark.parametrize(("shape", "channels_last"), HUGE)
@pytest.mark.usefixtures("much_memory")
def test_more_than_two_to_the_31_elements(backend, device, shape, channels_last):
    """The statistics of all, and the first and the last elements, forward and backward."""
    n, height, width, n_channels = shape

    def activation():
        size = shape if channels_last else (n, n_channels, height, width)
        tensor = torch.randn(size, dtype=torch.bfloat16, device=device)
        return tensor.movedim(-1, 1) if channels_last else tensor

    x, dout = activation().requires_grad_(), activation()
    residual = x.detach()
    out = fusedskip.add_relu(x, residual)
    (dx,) = torch.autograd.grad(out, x, dout)
    for part in (slice(2), slice(-2, None)):
        assert torch.equal(out[part], (x[part] + residual[part]).relu())
        assert torch.equal(dx[part], torch.where(out[part] > 0, dout[part], 0))
    del out, dx

    weight = torch.empty(n_channels, device=device).uniform_(0.5, 1.5).requires_grad_()
    bias = torch.empty(n_channels, device=device).uniform_(-1, 1).requires_grad_()
    out = fusedskip.batch_norm_add_relu(x, residual, None, None, weight, bias, training=True)
    dx, dweight, dbias = torch.autograd.grad(out, (x, weight, bias), dout)

    def per_channel(tensor):
        return tensor.double().sum((0, 2, 3))

    def wide(vector):
        return vector.double().view(1, -1, 1, 1)

    with torch.no_grad():
        parts = [slice(start, start + 32) for start in range(0, n, 32)]
        count = n * height * width
        mean = sum(per_channel(x[p]) for p in parts) / count
        variance = sum(per_channel((x[p] - wide(mean)).square()) for p in parts) / count
        rstd = (variance + 1e-5).rsqrt()
        sums = torch.zeros(4, n_channels, dtype=torch.float64, device=device)
        for p in parts:
            g, x_hat = torch.where(out[p] > 0, dout[p], 0), (x[p] - wide(mean)) * wide(rstd)
            g_x_hat = g * x_hat
            sums += torch.stack([per_channel(t) for t in (g, g_x_hat, g.abs(), g_x_hat.abs())])
        sum_g, sum_gx, *magnitudes = sums
        for got, want, terms in zip((dbias, dweight), (sum_g, sum_gx), magnitudes, strict=True):
            assert torch.all((got - want).abs() <= 4 * torch.finfo(torch.float32).eps * terms)
        for p in (slice(2), slice(-2, None)):
            g, x_hat = torch.where(out[p] > 0, dout[p], 0), (x[p] - wide(mean)) * wide(rstd)
            want = (wide(weight) * x_hat + wide(bias) + residual[p]).relu()
            through_statistics = (wide(sum_g) + x_hat * wide(sum_gx)) / count
            want_dx = wide(weight) * wide(rstd) * (g - through_statistics)
            rtol = torch.finfo(torch.bfloat16).eps
            torch.testing.assert_close(out[p].double(), want, rtol=rtol, atol=1e-5)
            torch.testing.assert_close(dx[p].double(), want_dx, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("room", [0.5, 1.01], ids=["not_for_out", "not_for_the_mask"])
def test_out_of_memory(backend, device, room):
    """The error is torch's, and nothing has been updated."""
    n = 1 << 26
    x, running = torch.ones(n >> 10, 1 << 10, device=device), torch.zeros(1 << 10, device=device)
    torch.cuda.empty_cache()
    size, total = 4 * n, torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room * size) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            fusedskip.batch_norm_add_relu(
                x, x, running, running, x.new_ones(1 << 10).requires_grad_(), None, training=True
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not running.any()


@pytest.mark.usefixtures("much_memory")
def test_demo(capsys, tmp_path):
    """Its CPU twin is in test_main.py; here it also times a ResNet-50."""
    plot = tmp_path / "plot.png"
    assert main(["demo", "--steps", "5", "--output", str(plot)]) == 0
    assert plot.stat().st_size
    printed = capsys.readouterr().out
    assert "The loss curves agree" in printed
    assert "ResNet-50" in printed

"""What torch offers around a training loop works on fused networks as on eager ones."""

import copy
import gc
import json

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fusedskip

from .libraries import torchvision
from .networks import twins

fp64 = {"dtype": torch.float64}


def images(device, n=4):
    return torch.randn(n, 3, 8, 8, device=device, **fp64)


def results(network, out, x):
    """Everything that a training step leaves behind."""
    out.square().mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **gradients, **network.state_dict()}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(compiled_backend, device, use_reentrant):
    """Recomputing included, which updates running statistics a second time, as in eager mode."""
    x = images(device)
    steps = []
    for network in twins(device=device, **fp64):
        leaf = x.clone().requires_grad_()
        out = checkpoint_sequential(network, 2, leaf, use_reentrant=use_reentrant)
        steps.append(results(network, out, leaf))
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_a_function(compiled_backend, device, use_reentrant):
    x, residual = torch.randn(2, 4, 3, 5, 5, device=device, **fp64)
    x.requires_grad_()
    weight = torch.randn(3, device=device, **fp64).requires_grad_()

    def tail(x):
        return fusedskip.batch_norm_add_relu(x, residual, None, None, weight, training=True)

    want = torch.autograd.grad(tail(x).square().sum(), (x, weight))
    out = checkpoint(tail, x, use_reentrant=use_reentrant)
    out.square().sum().backward()
    torch.testing.assert_close((x.grad, weight.grad), want)


def test_saved_tensor_hooks(compiled_backend, device):
    """All that is saved goes through the hooks, and may come back as a copy from elsewhere."""
    saved = []

    def pack(tensor):
        saved.append(tensor.nbytes)
        return tensor.detach().cpu().clone()

    x = images(device)
    steps = []
    for hooked in (True, False):
        torch.manual_seed(0)
        _, network = twins(device=device, **fp64)
        leaf = x.clone().requires_grad_()
        if hooked:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.to(device)):
                out = network(leaf)
        else:
            out = network(leaf)
        steps.append(results(network, out, leaf))
    assert saved
    torch.testing.assert_close(*steps, rtol=0, atol=0)


def test_saved_tensor_hook_that_fails_once(compiled_backend, device):
    """Its error comes through, and kernels that have updated statistics do not run again."""

    def pack(tensor):
        if not failures:
            failures.append(tensor)
            raise RuntimeError("no room")
        return tensor

    failures = []
    x = images(device).requires_grad_()
    running = torch.zeros(3, device=device, **fp64), torch.ones(3, device=device, **fp64)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        pytest.raises(RuntimeError, match="no room"),
    ):
        fusedskip.batch_norm_relu(x, *running, training=True)
    torch.testing.assert_close(running[0], 0.1 * x.detach().mean((0, 2, 3)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_without_gradients(compiled_backend, device, mode, training):
    x = images(device)
    outs = []
    for network in twins(device=device, **fp64):
        network.train(training)
        with mode():
            out = network(x)
        assert not out.requires_grad
        assert out.is_inference() == (mode is torch.inference_mode)
        outs.append((out.clone(), network.state_dict()))
    torch.testing.assert_close(*outs)


def test_update_bn(compiled_backend, device):
    """It takes cumulative averages: every norm has `momentum=None` while it runs.

    A batch without images is counted, and else changes nothing.
    """
    loader = [images(device, n) for n in (2, 5, 0, 3)]
    states = []
    for network in twins(device=device, **fp64):
        update_bn(loader, network)
        states.append(network.state_dict())
    torch.testing.assert_close(*states)
    assert states[1]["1.num_batches_tracked"] == 4


@pytest.mark.parametrize("use_buffers", [True, False])
def test_exponential_moving_average(compiled_backend, device, use_buffers):
    """A copy of a fused network is a fused network."""
    x = images(device)
    averages = []
    for network in twins(device=device, **fp64):
        ema = AveragedModel(
            network,
            multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5),
            use_buffers=use_buffers,
        )
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
            ema.update_parameters(network)
        averages.append((ema.state_dict(), ema.eval()(x)))
    torch.testing.assert_close(*averages)
    assert all(row.fused for row in fusedskip.explain(ema))


def test_data_parallel(compiled_backend, device):
    """Its replicas, on however many GPUs, are shallow copies without parameters of their own."""
    _, network = twins(device=device, **fp64)
    block = network[3]
    x = torch.randn(2, 8, 6, 6, device=device, **fp64)
    replica = block._replicate_for_data_parallel()
    torch.testing.assert_close(replica.eval()(x), block.eval()(x))
    if device == "cuda" or not torch.cuda.is_available():  # it takes GPUs where there are any
        wrapped = nn.DataParallel(network)
        torch.testing.assert_close(wrapped(images(device)).shape, network(images(device)).shape)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_cuda_graph_of_a_training_step(name):
    """Captured once and replayed on new images, a step is bitwise the step that it captured.

    The twin without a GPU: no kernel's launcher keeps state or waits (tests/test_gpu.py has what
    only a GPU can show).
    """
    steps = []
    batches = [torch.randn(4, 3, 16, 16, device="cuda") for _ in range(4)]
    _, network = twins(device="cuda")
    for captured in (False, True):
        model = copy.deepcopy(network)
        x = batches[0].clone()

        def step(model=model, x=x):
            model.zero_grad(set_to_none=False)
            model(x).square().mean().backward()

        with fusedskip.use_backend(name):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            if captured:
                with torch.cuda.graph(graph):
                    step()
            for batch in batches[1:]:
                x.copy_(batch)
                graph.replay() if captured else step()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        steps.append({**gradients, **model.state_dict()})
    torch.testing.assert_close(*steps, rtol=0, atol=0)


def allocations(step, tmp_path):
    """Bytes that a step on the CPU has allocated at its peak, and still after it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
        gc.collect()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    live = peak = 0
    for event in events:
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak, live


def allocations_on_gpu(step):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_peak_memory_of_a_resnet50_step(compiled_backend, device, memory_format, tmp_path):
    """Not above eager's with in-place ReLU but for the mask bits, and nothing is left behind."""
    network = torchvision.models.resnet50().to(device, memory_format=memory_format)
    x = torch.randn(2, 3, 64, 64, device=device).contiguous(memory_format=memory_format)
    masks = []

    def step():
        network(x).square().mean().backward()
        network.zero_grad()

    def measure():
        step()  # cuDNN's workspaces and the like
        return allocations(step, tmp_path) if device == "cpu" else allocations_on_gpu(step)

    eager, left_by_eager = measure()
    fusedskip.fuse(network, strict=True)
    fused, left = measure()

    def count(tensor):
        if tensor.dtype == torch.uint8:
            masks.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        network(x)
    assert len(masks) == 16  # one for each block
    assert fused <= eager + sum(masks)
    assert left <= left_by_eager


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpoint_that_ends_in_a_norm(compiled_backend, device, momentum):
    """Recomputation stops when all is saved, inside the call; torch has counted by then."""
    x, residual = images(device), images(device)
    states = []
    for fused in (False, True):
        norm = nn.BatchNorm2d(3, momentum=momentum, device=device, **fp64)
        block = nn.Sequential(norm, nn.ReLU())
        if fused:
            fusedskip.fuse(block, strict=True)
        leaf = x.clone().requires_grad_()
        checkpoint(block, leaf, use_reentrant=False).backward(residual)
        states.append({"dx": leaf.grad, **norm.state_dict()})
    torch.testing.assert_close(*states)
    assert states[0]["num_batches_tracked"] == 2

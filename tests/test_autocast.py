"""Fused networks under autocast give the dtypes, values and gradients that eager ones give."""

import copy

import pytest
import torch

from .networks import twins


def train_step(network, x, dtype):
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        out = network(x)
    out.float().square().mean().backward()
    gradients = {f"d{name}": p.grad for name, p in network.named_parameters()}
    buffers = {name: b for name, b in network.named_buffers() if b.is_floating_point()}
    return {"out": out.detach(), "dx": x.grad, **gradients, **buffers}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_values_and_gradients(compiled_backend, device, dtype, training):
    eager, fused = (network.train(training) for network in twins(device=device))
    x = torch.randn(4, 3, 8, 8, device=device)
    truth = train_step(copy.deepcopy(eager).double(), x.double(), None)
    ours, theirs = (train_step(network, x, dtype) for network in (fused, eager))
    assert ours["out"].dtype == dtype
    for name, want in truth.items():
        assert ours[name].dtype == theirs[name].dtype, name
        error, bound = ((got[name].double() - want).norm() for got in (ours, theirs))
        assert error <= 2 * bound + torch.finfo(dtype).eps * want.norm(), name


def test_input_that_autocast_leaves_alone(compiled_backend, device):
    """An fp32 input is the residual of a 16-bit branch: the sum has the dtype that eager gives."""
    eager, fused = (network[3] for network in twins(device=device))
    x = torch.randn(2, 8, 6, 6, device=device)
    with torch.autocast(device, torch.bfloat16):
        ours, theirs = fused(x), eager(x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_overflow_reaches_grad_scaler(compiled_backend, device, poison):
    """The step is left out and the scale halved: a gradient must not lose its Inf or NaN."""
    _, network = twins(device=device)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    before = copy.deepcopy(network.state_dict())
    with torch.autocast(device, torch.float16):
        out = network(torch.randn(2, 3, 8, 8, device=device))
    dout = torch.zeros_like(out)
    dout.view(-1)[out.detach().view(-1).argmax()] = poison  # where ReLU passes
    scaler.scale((out * dout).sum()).backward()
    first = network[0].weight.grad
    assert not torch.isfinite(first).all()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]), name

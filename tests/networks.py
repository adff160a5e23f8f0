"""Small networks of torchvision's blocks, their fused twins, and training both alike."""

import copy

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedskip

from .libraries import torchvision
from .support import randomise_norms

resnet = torchvision.models.resnet


def skip_network():
    """`(N, 3, H, W)` to `(N, 16, H/2, W/2)`: a stem and two blocks, every kernel of a ResNet."""
    projection = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        resnet.BasicBlock(8, 8),
        resnet.Bottleneck(8, 4, 2, projection),
    )
    randomise_norms(network)
    return network


def twins(make=skip_network, **to):
    """The same network twice: eager, and fused."""
    eager = make().to(**to)
    return eager, fusedskip.fuse(copy.deepcopy(eager))


def output(model, x):
    out = model(x)
    if isinstance(out, torch.Tensor):
        return out
    if "feature_maps" in out:
        return out["feature_maps"][-1]
    return out["out"] if "out" in out else out["logits"]


def assert_equal(ours, theirs, rtol=1e-10, floor=0.0):
    """As close as rtol of the largest element; what is rounding noise itself, as `floor` says."""
    assert ours.dtype == theirs.dtype
    if theirs.is_floating_point():
        assert (ours - theirs).abs().max() <= rtol * theirs.abs().max() + floor
    else:
        assert torch.equal(ours, theirs)


def train_alike(fused, eager, batches, lr=1e-3):
    optimizers = [torch.optim.SGD(model.parameters(), lr=lr) for model in (fused, eager)]
    for x in batches:
        outs = []
        for model, optimizer in zip((fused, eager), optimizers, strict=True):
            optimizer.zero_grad()
            outs.append(output(model, x))
            outs[-1].square().mean().backward()
            optimizer.step()
        assert_equal(*outs)
        ours, theirs = (dict(model.named_parameters()) for model in (fused, eager))
        grads = {name: p.grad for name, p in theirs.items() if p.grad is not None}
        assert grads.keys() == {name for name, p in ours.items() if p.grad is not None}
        # A bias before a norm has a gradient of 0, of which only rounding is to be seen: in eager,
        # too, up to 2e-14 of the largest of the others, which is what these are sums of.
        floor = 1e-13 * max(grad.abs().max() for grad in grads.values())
        for name, grad in grads.items():
            assert_equal(ours[name].grad, grad, floor=floor)
    ours = fused.state_dict()
    for name, value in eager.state_dict().items():
        assert_equal(ours[name], value, floor=lr * 1e-12)


class CountCalls(TorchDispatchMode):
    """Counts the norms, sums and ReLUs that torch itself computes on images."""

    def __init__(self):
        super().__init__()
        self.counts = {"batch_norm": 0, "add": 0, "relu": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.removesuffix("_")
        name = name if name in self.counts else "batch_norm" if "batch_norm" in name else None
        if name and function.namespace == "aten" and args[0].dim() == 4 and args[0].shape[2] > 1:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def count_calls(model, x):
    with CountCalls() as calls:
        output(model, x).sum()
    return calls.counts

"""The blocks against their eager twins: values, gradients, buffers, checkpoints."""

import copy
import importlib.util
import itertools
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedskip
from fusedskip import blocks

# torchvision's compiled operators need its own build of torch; its models do not, but for names.
try:
    torch.ops.load_library(
        *Path(importlib.util.find_spec("torchvision").origin).parent.glob("_C*.so")
    )
except OSError:
    _torchvision_operators = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _torchvision_operators.define(
            f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )

from torchvision.models import resnet as torchvision_resnet


class EagerResidualBlock(nn.Module):
    """ResidualBlock from torch.nn alone."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1)
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(out)) + self.shortcut(x)).relu()


def randomise_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)


def assert_trains_alike(fused, eager, shape, steps=3, rtol=1e-10, device="cpu"):
    """Steps of SGD from the same weights in fp64, then evaluation."""
    fused, eager = fused.double().to(device), eager.double().to(device)
    randomise_norms(fused)
    assert list(fused.state_dict()) == list(eager.state_dict())
    eager.load_state_dict(fused.state_dict())
    models = (fused, eager)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in models]
    for step in range(steps):
        x = torch.randn(shape, dtype=torch.float64, device=device)
        if step % 2:
            x = x.to(memory_format=torch.channels_last)
        outs, grads = [], []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            out = model(leaf)
            out.square().mean().backward()
            optimizer.step()
            outs.append(out.detach())
            grads.append([leaf.grad] + [p.grad for p in model.parameters()])
        torch.testing.assert_close(*outs, rtol=rtol, atol=rtol)
        for ours, theirs in zip(*grads, strict=True):
            assert (ours - theirs).norm() <= rtol * (1 + theirs.norm())
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=rtol, atol=rtol)
    x = torch.randn(shape, dtype=torch.float64, device=device)
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), eager.eval()(x), rtol=rtol, atol=rtol)


def downsample(inplanes, planes, stride):
    return nn.Sequential(
        nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes)
    )


@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("stride", [1, 2])
def test_torchvision_blocks(backend, device, kind, stride):
    ours, theirs = getattr(blocks, kind), getattr(torchvision_resnet, kind)
    assert ours.expansion == theirs.expansion
    inplanes = 8 * ours.expansion if stride == 1 else 12
    pair = [
        block(
            inplanes, 8, stride,
            downsample(inplanes, 8 * ours.expansion, stride) if stride == 2 else None,
        )
        for block in (ours, theirs)
    ]  # fmt: skip
    assert_trains_alike(*pair, (3, inplanes, 6, 5), device=device)


def test_bottleneck_with_groups_and_dilation():
    pair = [
        module.Bottleneck(64, 16, groups=4, base_width=24, dilation=2)
        for module in (blocks, torchvision_resnet)
    ]
    assert_trains_alike(*pair, (2, 64, 5, 5))


@pytest.mark.parametrize("out_channels", [6, 9])
def test_residual_block(backend, device, out_channels):
    pair = [block(6, out_channels) for block in (blocks.ResidualBlock, EagerResidualBlock)]
    assert_trains_alike(*pair, (3, 6, 5, 7), device=device)


def test_two_block_network():
    def network(block):
        return nn.Sequential(
            block(3, 64), block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)
        )

    assert_trains_alike(network(blocks.ResidualBlock), network(EagerResidualBlock), (2, 3, 16, 16))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_trains_as_torchvision(name):
    pair = [getattr(module, name)(num_classes=7) for module in (blocks, torchvision_resnet)]
    assert_trains_alike(*pair, (4, 3, 64, 64), steps=2)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_resnets_have_torchvisions_parameters(name):
    """Same names, shapes, and initial values from the same seed."""
    with torch.device("meta"):
        ours, theirs = getattr(blocks, name)(), getattr(torchvision_resnet, name)()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


def test_resnet_options():
    options = {
        "num_classes": 3, "zero_init_residual": True, "groups": 2, "width_per_group": 32,
        "replace_stride_with_dilation": [False, True, True],
    }  # fmt: skip
    states = []
    for module in (blocks, torchvision_resnet):
        torch.manual_seed(0)
        states.append(module.resnet50(**options))
    for ours, theirs in zip(*(m.state_dict().values() for m in states), strict=True):
        assert torch.equal(ours, theirs)
    assert not states[0].layer1[0].bn3.weight.any()
    x = torch.randn(2, 3, 64, 64)
    outs = [model.eval()(x) for model in states]
    torch.testing.assert_close(*outs)
    with pytest.raises(ValueError, match="replace_stride_with_dilation: expected 3 elements"):
        blocks.resnet50(replace_stride_with_dilation=[True])


def test_torchvision_resnet_takes_our_blocks():
    for ours, theirs, layers in (
        (blocks.BasicBlock, torchvision_resnet.BasicBlock, [1, 1, 1, 1]),
        (blocks.Bottleneck, torchvision_resnet.Bottleneck, [1, 1, 1, 1]),
    ):
        fused, eager = (
            torchvision_resnet.ResNet(block, layers, num_classes=5).eval()
            for block in (ours, theirs)
        )
        fused.load_state_dict(eager.state_dict())
        eager.load_state_dict(fused.state_dict())
        x = torch.randn(2, 3, 40, 40)
        torch.testing.assert_close(fused(x), eager(x))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"groups": 2}, ValueError, "expected groups=1 and base_width=64, got 2 and 64"),
        ({"base_width": 32}, ValueError, "expected groups=1 and base_width=64, got 1 and 32"),
        ({"dilation": 2}, NotImplementedError, "expected dilation=1, got 2"),
    ],
)
def test_basic_block_refuses(arguments, error, text):
    with pytest.raises(error, match=text):
        blocks.BasicBlock(4, 4, **arguments)


def test_mismatched_residual_is_refused():
    """stride 2 without a downsample: eager fails deep in an addition, or broadcasts."""
    block = blocks.BasicBlock(4, 4, stride=2)
    with pytest.raises(ValueError, match=r"residual: expected shape \(2, 4, 3, 3\)"):
        block(torch.randn(2, 4, 6, 6))


def fused_calls(monkeypatch, block, x):
    """How many tails of one forward ran fused."""
    calls = []
    kernel = fusedskip.functional._batch_norm
    monkeypatch.setattr(
        fusedskip.functional, "_batch_norm", lambda *a, **k: calls.append(1) or kernel(*a, **k)
    )
    block(x)
    monkeypatch.undo()
    return len(calls)


class TestGuard:
    """Whatever replaces or observes a child is honoured: that tail runs as it stands."""

    x = torch.randn(4, 6, 5, 5)

    @pytest.fixture
    def block(self):
        return blocks.BasicBlock(6, 6)

    def test_plain_block_is_fused(self, monkeypatch, block):
        assert fused_calls(monkeypatch, block, self.x) == 2

    def test_hooks_fire(self, monkeypatch, block):
        seen = []
        handle = block.bn2.register_forward_hook(lambda *_: seen.append("bn2"))
        assert fused_calls(monkeypatch, block, self.x) == 1
        assert seen == ["bn2"]
        handle.remove()
        assert fused_calls(monkeypatch, block, self.x) == 2
        block.relu = nn.ReLU()  # in place, torch itself refuses a backward hook
        block.relu.register_full_backward_hook(lambda *_: seen.append("relu"))
        assert fused_calls(monkeypatch, block, self.x) == 0

    def test_global_hooks_fire(self, monkeypatch, block):
        seen = []
        hook = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
        try:
            assert fused_calls(monkeypatch, block, self.x) == 0
        finally:
            hook.remove()
        assert seen.count(nn.BatchNorm2d) == 2
        assert fused_calls(monkeypatch, block, self.x) == 2

    def test_patched_forward(self, monkeypatch, block):
        block.bn1.forward = lambda x: x * 0
        assert fused_calls(monkeypatch, block, self.x) == 1

    def test_other_norms_and_activations(self, monkeypatch, block):
        block.bn1 = nn.GroupNorm(2, 6)
        assert fused_calls(monkeypatch, block, self.x) == 1
        block.relu = nn.GELU()
        assert fused_calls(monkeypatch, block, self.x) == 0

    def test_norm_layer(self):
        block = blocks.Bottleneck(8, 2, norm_layer=lambda planes: nn.GroupNorm(2, planes))
        twin = torchvision_resnet.Bottleneck(
            8, 2, norm_layer=lambda planes: nn.GroupNorm(2, planes)
        )
        twin.load_state_dict(block.state_dict())
        x = torch.randn(2, 8, 4, 4)
        assert torch.equal(block(x), twin(x))

    def test_sync_batch_norm(self, monkeypatch, block):
        block = nn.SyncBatchNorm.convert_sync_batchnorm(block).eval()
        assert isinstance(block.bn1, nn.SyncBatchNorm)
        assert fused_calls(monkeypatch, block, self.x) == 0

    def test_frozen_norm_is_still_fused(self, monkeypatch, block):
        block.train()
        block.bn1.eval()
        before = block.bn1.running_mean.clone()
        assert fused_calls(monkeypatch, block, self.x) == 2
        assert torch.equal(block.bn1.running_mean, before)

    def test_parametrized_weight(self, monkeypatch, block):
        class Double(nn.Module):
            def forward(self, weight):
                return 2 * weight

        nn.utils.parametrize.register_parametrization(block.bn1, "weight", Double())
        assert fused_calls(monkeypatch, block, self.x) == 1


@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck", "ResidualBlock"])
def test_copies(kind):
    block = getattr(blocks, kind)(8, 2 if kind == "Bottleneck" else 8).eval()
    x = torch.randn(2, 8, 4, 4)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(other) is type(block)
        assert torch.equal(other(x), block(x))


def test_layout_is_kept_through_a_block():
    for layout, kind in itertools.product(
        (torch.contiguous_format, torch.channels_last), ("BasicBlock", "ResidualBlock")
    ):
        block = getattr(blocks, kind)(8, 8).to(memory_format=layout)
        x = torch.randn(2, 8, 4, 5).to(memory_format=layout)
        assert block(x).is_contiguous(memory_format=layout)

"""The blocks against their eager twins: values, gradients, buffers, checkpoints."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from fusedskip import blocks

from .libraries import torchvision
from .support import assert_trains_alike, fused_calls

torchvision_resnet = torchvision.models.resnet

# The functions behind the fused operations, and which of them a BasicBlock without downsample runs.
ONE_NORM, TWO_NORMS = "_batch_norm", "dual_batch_norm_add_relu"
FUSED = {ONE_NORM: 2}


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


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_trains_as_torchvision(name):
    pair = [getattr(module, name)(num_classes=7) for module in (blocks, torchvision_resnet)]
    assert_trains_alike(*pair, (4, 3, 64, 64), steps=2)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_resnets_have_torchvisions_parameters(name):
    """Same names and shapes, in the same order."""
    with torch.device("meta"):
        ours, theirs = getattr(blocks, name)(), getattr(torchvision_resnet, name)()
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]


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


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_resnet_with_torchvisions_weights(name, monkeypatch):
    theirs = getattr(torchvision_resnet, name)()
    got = []

    def get_state_dict(weights, **options):  # no network
        got.append((str(weights), options))
        return theirs.state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    build, weights = getattr(blocks, name), torchvision.models.get_model_weights(name)
    for given, options in (
        ("DEFAULT", {"progress": False, "num_classes": 1000}),
        (weights.IMAGENET1K_V1, {}),
    ):
        ours = build(weights=given, **options)
        for key, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[key], value)
    assert got == [
        (str(weights.DEFAULT), {"progress": False, "check_hash": True}),
        (str(weights.IMAGENET1K_V1), {"progress": True, "check_hash": True}),
    ]
    with pytest.raises(ValueError, match="num_classes: expected 1000"):
        build(weights="DEFAULT", num_classes=10)
    with pytest.raises(KeyError):
        build(weights="IMAGENET2K")


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


@pytest.mark.parametrize(("kind", "pairs"), [("BasicBlock", 1), ("Bottleneck", 2)])
def test_downsample_and_branch_end_in_one_operation(monkeypatch, kind, pairs):
    """relu(bn(x) + bn'(z)), behind a BN+ReLU for each convolution but the last."""
    block = getattr(blocks, kind)
    block = block(8, 4, 2, downsample(8, 4 * block.expansion, 2))
    x = torch.randn(2, 8, 4, 4)
    assert fused_calls(monkeypatch, block, x) == {ONE_NORM: pairs, TWO_NORMS: 1}
    seen = []
    block.downsample[1].register_forward_hook(lambda *_: seen.append("norm"))
    assert fused_calls(monkeypatch, block, x) == {}
    assert seen == ["norm"]


class TestGuard:
    """Whatever replaces or observes a child is honoured: the block then runs as it stands."""

    x = torch.randn(4, 6, 5, 5)

    @pytest.fixture
    def block(self):
        return blocks.BasicBlock(6, 6)

    def test_plain_block_is_fused(self, monkeypatch, block):
        assert fused_calls(monkeypatch, block, self.x) == FUSED

    def test_hooks_fire(self, monkeypatch, block):
        seen = []
        handle = block.bn2.register_forward_hook(lambda *_: seen.append("bn2"))
        assert fused_calls(monkeypatch, block, self.x) == {}
        assert seen == ["bn2"]
        handle.remove()
        assert fused_calls(monkeypatch, block, self.x) == FUSED
        block.relu = nn.ReLU()  # in place, torch itself refuses a backward hook
        block.relu.register_full_backward_hook(lambda *_: seen.append("relu"))
        assert fused_calls(monkeypatch, block, self.x) == {}

    def test_global_hooks_fire(self, monkeypatch, block):
        seen = []
        hook = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
        try:
            assert fused_calls(monkeypatch, block, self.x) == {}
        finally:
            hook.remove()
        assert seen.count(nn.BatchNorm2d) == 2
        assert fused_calls(monkeypatch, block, self.x) == FUSED

    def test_patched_forward(self, monkeypatch, block):
        block.bn1.forward = lambda x: x * 0
        assert fused_calls(monkeypatch, block, self.x) == {}

    def test_other_norms_and_activations(self, monkeypatch, block):
        block.bn1 = nn.GroupNorm(2, 6)
        assert fused_calls(monkeypatch, block, self.x) == {}
        block.relu = nn.GELU()  # takes what bn2 and the sum are one operation of
        assert fused_calls(monkeypatch, block, self.x) == {ONE_NORM: 1}

    def test_norm_layer(self):
        block = blocks.Bottleneck(8, 2, norm_layer=lambda planes: nn.GroupNorm(2, planes))
        twin = torchvision_resnet.Bottleneck(
            8, 2, norm_layer=lambda planes: nn.GroupNorm(2, planes)
        )
        twin.load_state_dict(block.state_dict())
        x = torch.randn(2, 8, 4, 4)
        assert torch.equal(block(x), twin(x))

    def test_sync_batch_norm(self, monkeypatch, block):
        block = nn.SyncBatchNorm.convert_sync_batchnorm(block)
        assert isinstance(block.bn1, nn.SyncBatchNorm)
        assert fused_calls(monkeypatch, block, self.x) == FUSED

    def test_frozen_norm_is_still_fused(self, monkeypatch, block):
        block.train()
        block.bn1.eval()
        before = block.bn1.running_mean.clone()
        assert fused_calls(monkeypatch, block, self.x) == FUSED
        assert torch.equal(block.bn1.running_mean, before)

    def test_parametrized_weight(self, monkeypatch, block):
        class Double(nn.Module):
            def forward(self, weight):
                return 2 * weight

        nn.utils.parametrize.register_parametrization(block.bn1, "weight", Double())
        assert fused_calls(monkeypatch, block, self.x) == {}


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

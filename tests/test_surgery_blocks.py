"""What the blocks of a library can be besides what whole models show of them."""

import copy
import importlib
from functools import partial

import pytest
import torch
from torch import nn

import fusedskip
from fusedskip.surgery.fused import Fused

from .libraries import timm, torchvision
from .networks import assert_equal, train_alike
from .support import randomise_norms

tv = torchvision.models
byobnet = timm.models.byobnet
googlenet = importlib.import_module("torchvision.models.googlenet")


def twins(eager):
    randomise_norms(eager)
    eager = eager.double()
    return eager, fusedskip.fuse(copy.deepcopy(eager))


def batches(*shape):
    return [torch.randn(shape, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_a_dense_layer(memory_efficient):
    eager, fused = twins(tv.densenet._DenseBlock(2, 8, 2, 4, 0.0, memory_efficient))
    train_alike(fused, eager, batches(3, 8, 7, 5))


def test_a_dense_layer_drops_what_eager_drops():
    eager, fused = twins(tv.densenet._DenseLayer(8, 4, 2, drop_rate=0.5))
    (x, _), outs = batches(3, 8, 7, 5), []
    for layer in (eager, fused):
        torch.manual_seed(0)
        outs.append(layer(x))
    assert_equal(*outs)


@pytest.mark.parametrize("half", [1, 2])
@pytest.mark.parametrize("act", [nn.SiLU, nn.Identity])
def test_a_dense_layer_with_another_activation(half, act):
    eager = tv.densenet._DenseLayer(8, 4, 2, 0.0)
    setattr(eager, f"relu{half}", act())
    eager, fused = twins(eager)
    assert fusedskip.explain(fused).rows[0].kernels == ("K1",)
    train_alike(fused, eager, batches(3, 8, 7, 5))


def mb_conv(p):
    config = tv.efficientnet.MBConvConfig(2, 3, 1, 8, 8, 1)
    return tv.efficientnet.MBConv(config, p, partial(nn.BatchNorm2d))


def inverted_residual(p):
    return timm.models._efficientnet_blocks.InvertedResidual(8, 8, drop_path_rate=p)


def basic_block(p):
    return timm.models.resnet.BasicBlock(
        8, 8, drop_path=timm.layers.DropPath(p), drop_block=timm.layers.DropBlock2d
    )


@pytest.mark.parametrize("make", [mb_conv, inverted_residual, basic_block])
def test_what_drops_paths_is_passed_over_where_it_drops_none(make):
    eager, fused = twins(make(0.5))
    x, _ = batches(4, 8, 9, 9)
    assert not {"K2", "K3"} & set(fusedskip.explain(fused).rows[0].kernels)
    for mode in (True, False):
        outs = []
        for block in (eager.train(mode), fused.train(mode)):
            torch.manual_seed(0)
            outs.append(block(x))
        assert_equal(*outs)
    assert fusedskip.explain(fused).rows[0].kernels[-1] in ("K2", "K3")
    assert_equal(fused(x), eager(x))
    fused.train()
    eager.train()
    for block in (eager, fused):
        for module in block.modules():
            for rate in ("p", "drop_prob"):
                if hasattr(module, rate):
                    setattr(module, rate, 0.0)
    assert fusedskip.explain(fused).rows[0].kernels[-1] in ("K2", "K3")
    train_alike(fused, eager, batches(4, 8, 9, 9))


def rep_vgg(in_channels=8, attn=None, **options):
    layers = byobnet.LayerFn(attn=attn)
    return byobnet.RepVggBlock(in_channels, 8, layers=layers, **options)


@pytest.mark.parametrize(
    ("make", "kernels"),
    [
        (rep_vgg, ("K3", "K2")),
        (partial(rep_vgg, attn=timm.layers.SEModule), ("K3", "K3")),
        (partial(rep_vgg, 4), ("K6",)),
        (partial(rep_vgg, 4, attn=timm.layers.SEModule), ("K3",)),
        (partial(rep_vgg, drop_path_rate=0.5), ("K3", "K4")),
    ],
    ids=["identity", "attention", "another width", "both", "drop path"],
)
def test_rep_vgg(make, kernels):
    eager, fused = twins(make())
    assert fusedskip.explain(fused).rows[0].kernels == kernels
    x, _ = batches(3, eager.conv_1x1.conv.in_channels, 7, 5)
    for mode in (True, False):
        outs = []
        for block in (eager.train(mode), fused.train(mode)):
            torch.manual_seed(0)
            out = block(x)
            out.square().sum().backward()
            outs.append(out)
        assert_equal(*outs)
    for ours, theirs in zip(fused.parameters(), eager.parameters(), strict=True):
        assert_equal(ours.grad, theirs.grad, floor=1e-12)
    assert_equal(fused.conv_kxk.bn.running_var, eager.conv_kxk.bn.running_var)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_rep_vgg_calls_in_eager_order(p):
    """Whatever stands for its parts, even where they share statistics or draw random numbers."""
    eager, fused = twins(rep_vgg(drop_path_rate=p))
    x, _ = batches(4, 8, 7, 5)
    for block in (eager, fused):
        block.conv_kxk.bn.running_mean = block.conv_1x1.bn.running_mean
        block.identity = nn.Sequential(block.identity, nn.Dropout(0.5))
        block.identity[0].running_mean = block.conv_1x1.bn.running_mean
        block.calls = []
        for module in (block.identity, block.conv_1x1.conv, block.conv_kxk.conv):
            module.register_forward_hook(lambda m, *_, calls=block.calls: calls.append(type(m)))
        torch.manual_seed(0)
        block.out = block(x)
    # Where paths are dropped, what they share is in the way.
    assert fusedskip.explain(fused).rows[0].fused == (p == 0)
    assert fused.calls == eager.calls
    assert_equal(fused.out, eager.out)
    assert_equal(fused.conv_1x1.bn.running_mean, eager.conv_1x1.bn.running_mean)


@pytest.mark.parametrize("name", ["drop_path", "attn", "act", "identity", "conv_kxk"])
def test_rep_vgg_with_a_hook(name):
    eager, fused = twins(rep_vgg())
    x, _ = batches(4, 8, 7, 5)
    for block in (eager, fused):
        getattr(block, name).register_forward_hook(lambda module, args, out: out * 2)
    assert_equal(fused(x), eager(x))


def test_rep_vgg_made_one_convolution():
    eager, fused = twins(rep_vgg().eval())
    x, _ = batches(3, 8, 7, 5)
    for block in (eager, fused):
        block.reparameterize()
    assert torch.equal(fused(x), eager(x))
    assert fusedskip.explain(fused).rows[0].reason == "it has no tail any more"


def test_rep_vgg_under_autocast():
    eager = rep_vgg().train()
    fused, x = fusedskip.fuse(copy.deepcopy(eager)), torch.randn(4, 8, 7, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = fused(x), eager(x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-5)


def test_a_block_of_byobnet_without_shortcut_is_no_candidate():
    block = byobnet.BasicBlock(4, 8, downsample="")
    assert "BasicBlock" not in [row.type for row in fusedskip.explain(block)]


@pytest.mark.parametrize("radix", [1, 2])
def test_resnest(radix):
    eager, fused = twins(timm.models.resnest.ResNestBottleneck(16, 4, radix=radix))
    assert isinstance(fused, Fused)
    train_alike(fused, eager, batches(3, 16, 7, 5))


@pytest.mark.parametrize("radix", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_split_attention(radix, layout):
    eager, fused = twins(
        timm.layers.SplitAttn(8, 8, 3, 1, 1, radix=radix, norm_layer=nn.BatchNorm2d)
    )
    x, _ = batches(3, 8, 7, 5)
    ours, theirs = (block(x.contiguous(memory_format=layout)) for block in (fused, eager))
    assert_equal(ours, theirs)
    assert ours.stride() == theirs.stride()


def test_a_space_to_depth_convolution_is_left_alone():
    block = timm.models._efficientnet_blocks.InvertedResidual(8, 8, s2d=1)
    assert "InvertedResidual" not in [row.type for row in fusedskip.explain(block)]


INCOMPLETE = {
    "resnet": lambda: tv.resnet.BasicBlock(8, 8),
    "dense layer": lambda: tv.densenet._DenseLayer(8, 4, 2, 0.0),
    "convolution": lambda: googlenet.BasicConv2d(8, 8, kernel_size=1),
    "sequential": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
    "mobilenet": lambda: inverted_residual(0.0),
    "timm": lambda: timm.models.resnet.BasicBlock(8, 8),
    "byobnet": lambda: byobnet.BasicBlock(8, 8),
    "rep vgg": rep_vgg,
    "split attention": lambda: timm.layers.SplitAttn(8, 8, 3, 1, 1, norm_layer=nn.BatchNorm2d),
    "hgnet": lambda: timm.models.hgnet.ConvBNAct(8, 8, 3),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_without_a_child(name):
    """Eager passes over a child that is None, or fails: so does what is fused."""
    eager, _ = twins(INCOMPLETE[name]())
    x, _ = batches(4, 8, 7, 5)
    for child in eager._modules:
        outs = []
        for block in (copy.deepcopy(eager), fusedskip.fuse(copy.deepcopy(eager))):
            setattr(block, child, None)
            try:
                outs.append(block(x))
            except Exception as error:
                outs.append(type(error))
        if isinstance(outs[0], torch.Tensor):
            assert_equal(*outs)
        else:
            assert outs[0] is outs[1], child

"""What happens to classes and modules around `fuse`: a fused model does what the eager one does."""

import copy
import functools
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedskip
from fusedskip import blocks
from fusedskip.surgery.fused import FUSED

from .libraries import timm, torchvision

tv = torchvision.models
ROOT = Path(__file__).parent.parent


def basic_block(downsample=False):
    projection = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    block = tv.resnet.BasicBlock(4, 4, downsample=projection if downsample else None)
    return block.double().eval()


def halved(forward):
    """`forward`, its results halved, under its name and documentation."""

    @functools.wraps(forward)
    def patched(self, x):
        return forward(self, x) / 2

    return patched


def test_a_class_that_is_patched_later(monkeypatch):
    block, x = basic_block(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    eager = copy.deepcopy(block)
    fusedskip.fuse(block)
    monkeypatch.setattr(tv.resnet.BasicBlock, "forward", halved(tv.resnet.BasicBlock.forward))
    assert torch.equal(block(x), eager(x))
    (row,) = fusedskip.explain(block)
    assert row.reason == "BasicBlock.forward is not the one that fusedskip knows"


@pytest.mark.parametrize(
    "kind", ["nn.ReLU", "nn.BatchNorm2d", "nn.Sequential", "torchvision.models.resnet.BasicBlock"]
)
def test_a_class_that_was_patched_before_the_import(kind):
    code = f"""
import functools, torch
from torch import nn
from tests.libraries import torchvision
forward = {kind}.forward
{kind}.forward = functools.wraps(forward)(lambda self, x: forward(self, x) / 2)
import fusedskip
downsample = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
model = torchvision.models.resnet.BasicBlock(3, 3, downsample=downsample).eval()
x = torch.randn(2, 3, 5, 5)
eager = model(x)
assert torch.equal(fusedskip.fuse(model)(x), eager)
assert not any(row.fused for row in fusedskip.explain(model))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)


FLAGS = {
    "mobilenetv2": (lambda: tv.mobilenetv2.InvertedResidual(8, 8, 1, 2), "use_res_connect", False),
    "mnasnet": (lambda: tv.mnasnet._InvertedResidual(8, 8, 3, 1, 2), "apply_residual", False),
    "regnet": (lambda: timm.models.regnet.Bottleneck(8, 8, group_size=8), "downsample", None),
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_skip_that_is_switched_off(name):
    make, flag, off = FLAGS[name]
    block = make().double().eval()
    if name == "regnet":
        block.downsample = nn.Identity()
    eager, x = copy.deepcopy(block), torch.randn(2, 8, 5, 5, dtype=torch.float64)
    fusedskip.fuse(block)
    torch.testing.assert_close(block(x), eager(x), rtol=1e-12, atol=1e-12)
    for module in (block, eager):
        setattr(module, flag, off)
    torch.testing.assert_close(block(x), eager(x), rtol=1e-12, atol=1e-12)
    row = fusedskip.explain(block).rows[0]
    assert (row.fused, row.reason) == (False, "it has no tail any more")


@pytest.mark.parametrize("library", ["torchvision", "timm", "transformers"])
def test_methods_are_called_as_those_they_replace(library):
    """By name, too: transformers' layers take `hidden_state`."""
    module = importlib.import_module(f"fusedskip.surgery.{library}").__name__
    classes = [(x, fused) for x, fused in FUSED.items() if fused.__module__ == module]
    assert len(classes) > 10
    for replaced, fused in classes:
        for method in fused._fused_methods:
            ours, theirs = (inspect.signature(getattr(c, method)) for c in (fused, replaced))
            assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
                (p.name, p.default, p.kind) for p in theirs.parameters.values()
            ], fused


def test_unfuse_refuses_a_forward_that_may_call_the_fused_one():
    block = fusedskip.fuse(basic_block())
    fused_class, forward = type(block), block.forward
    block.forward = lambda x: forward(x)
    with pytest.raises(ValueError, match=r"\(the model\) has got a forward of its own"):
        fusedskip.unfuse(block)
    assert type(block) is fused_class
    del block.forward
    assert type(fusedskip.unfuse(block)) is tv.resnet.BasicBlock


def test_norms_that_share_running_statistics():
    """Both would update them, one after the other."""
    block = basic_block(downsample=True).train()
    for name in ("running_mean", "running_var"):
        setattr(block.downsample[1], name, getattr(block.bn2, name))
    with pytest.raises(ValueError, match="bn2 shares running statistics with the shortcut's norm"):
        fusedskip.fuse(copy.deepcopy(block), strict=True)
    fused, x = fusedskip.fuse(copy.deepcopy(block)), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert torch.equal(fused(x), block(x))
    assert torch.equal(fused.bn2.running_mean, block.bn2.running_mean)


@pytest.mark.parametrize(
    "make",
    [
        basic_block,
        lambda: tv.regnet_y_400mf(),
        lambda: timm.create_model("resnetv2_18", num_classes=10),
    ],
    ids=["resnet", "regnet", "resnetv2"],
)
def test_hooks_are_called_in_eager_order(make):
    model, seen = make().eval(), []
    for name, child in model.named_modules():
        if isinstance(child, nn.Conv2d):
            child.register_forward_hook(lambda *_, name=name: seen.append(name))
    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    x = torch.randn(1, channels, 64, 64, dtype=next(model.parameters()).dtype)
    model(x)
    eager = seen.copy()
    seen.clear()
    fusedskip.fuse(model)(x)
    assert seen == eager


def test_blocks_of_its_own_are_no_candidates():
    model = blocks.SkipSequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    assert fusedskip.fuse(model, strict=True) is model
    assert len(fusedskip.explain(model)) == 0

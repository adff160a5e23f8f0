"""What a fused module that is changed later does: what eager does."""

import copy
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedskip
from fusedskip.surgery.fused import Fused

from .libraries import timm, torchvision

tv = torchvision.models
ROOT = Path(__file__).parent.parent


def basic_block(downsample=False):
    projection = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    block = tv.resnet.BasicBlock(4, 4, downsample=projection if downsample else None)
    return block.double().eval()


def types(model):
    return [type(module) for module in model.modules()]


def replace_bn2_by_group_norm(block):
    block.bn2 = nn.GroupNorm(4, block.bn2.num_features).double()


def hook_bn2(block):
    block.bn2.register_forward_hook(lambda module, args, out: out * 2)


def pre_hook_bn1(block):
    block.bn1.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def hook_relu(block):
    block.relu.register_forward_hook(lambda module, args, out: out * 0.5)


def hook_downsample(block):
    block.downsample.register_forward_hook(lambda module, args, out: out * 3)


def hook_downsample_norm(block):
    block.downsample[1].register_forward_hook(lambda module, args, out: out * 3)


def backward_hook_bn1(block):
    block.relu.inplace = False  # torch allows no hook before a ReLU in place
    block.bn1.register_full_backward_hook(lambda module, dx, dout: (dx[0] * 2,))


def patch_bn1(block):
    norm = block.bn1
    norm.forward = lambda x: nn.BatchNorm2d.forward(norm, x) * 2


def patch_block(block):
    block.forward = lambda x: block.conv1(x)


def parametrize_bn2(block):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(block.bn2, "weight", Doubled())


def fold_bn1(block):
    block.eval()
    block.conv1 = nn.utils.fuse_conv_bn_eval(block.conv1, block.bn1)
    block.bn1 = nn.Identity()


CHANGES = {
    replace_bn2_by_group_norm: "bn2 is GroupNorm",
    hook_bn2: "bn2 has hooks",
    pre_hook_bn1: "bn1 has hooks",
    hook_relu: "relu has hooks",
    hook_downsample: "downsample has hooks",
    hook_downsample_norm: "downsample.1 has hooks",
    backward_hook_bn1: "bn1 has hooks",
    patch_bn1: "bn1 has a forward of its own",
    patch_block: "it has a forward of its own",
    parametrize_bn2: "bn2 is ParametrizedBatchNorm2d",
    fold_bn1: "bn1 is Identity",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_changed_runs_the_blocks_own_forward(change, when):
    """Changed after fusing, it runs the eager forward; changed before, it is not fused at all."""
    torch.manual_seed(0)
    downsample = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
    eager = tv.resnet.BasicBlock(8, 16, downsample=downsample).double()
    nn.init.uniform_(eager.bn2.bias)
    block = copy.deepcopy(eager)
    change(eager)
    if when == "after":
        fusedskip.fuse(block)
    change(block)
    if when == "before":
        fusedskip.fuse(block)
    assert isinstance(block, Fused) == (when == "after")
    (row,) = fusedskip.explain(block)
    assert row.reason.startswith(CHANGES[change])
    assert (row.fused, row.kernels) == (False, ())

    results = []
    for module in (block, eager):
        x = torch.arange(8.0 * 8 * 5 * 5).view(8, 8, 5, 5).sin().double().requires_grad_()
        out = module(x)
        out.square().sum().backward()
        grads = [x.grad, *(p.grad for p in module.parameters())]
        results.append([out, *(g for g in grads if g is not None), *module.buffers()])
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_global_hook(resnet):
    fused = fusedskip.fuse(copy.deepcopy(resnet))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        assert {row.reason for row in fusedskip.explain(fused)} == {
            "torch has a global module hook"
        }
        x = torch.randn(2, 3, 64, 64).double()
        ours = fused(x)
        n_norms = seen.count(nn.BatchNorm2d)
        assert torch.equal(ours, resnet(x))
    finally:
        handle.remove()
    assert n_norms == 20


@pytest.mark.parametrize("inside", [False, True])
def test_a_norm_that_the_shortcut_calls_too(inside):
    """Its running statistics see the branch first, as eager calls it."""
    shortcut = nn.Sequential(nn.Conv2d(8, 8, 1))
    eager = tv.resnet.BasicBlock(8, 8, downsample=shortcut)
    shortcut.extend([eager.bn2, nn.ReLU(), nn.Conv2d(8, 8, 1)] if inside else [eager.bn2])
    fused = copy.deepcopy(eager.double())
    assert not fusedskip.explain(fused).rows[0].fused
    fusedskip.fuse(fused)
    assert "bn2 is in the shortcut, too" in {row.reason for row in fusedskip.explain(fused)}
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(fused(x), eager(x))
    torch.testing.assert_close(fused.state_dict(), eager.state_dict())


@pytest.mark.parametrize("which", ["norm", "statistics"])
def test_a_norm_that_the_branch_calls_too(which):
    """The other way round, where eager calls the shortcut first."""
    eager = tv.regnet.ResBottleneckBlock(8, 12, 1, nn.BatchNorm2d, nn.ReLU, group_width=4).double()
    if which == "norm":
        eager.proj[1] = eager.f.a[1]
    else:
        eager.proj[1].running_mean = eager.f.a[1].running_mean
    fused = fusedskip.fuse(copy.deepcopy(eager))
    row = next(row for row in fusedskip.explain(fused) if row.name == "")
    assert "of the branch" in row.reason or "in the branch, too" in row.reason
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(fused(x), eager(x))
    torch.testing.assert_close(fused.state_dict(), eager.state_dict())


def test_a_class_that_is_patched(resnet, monkeypatch):
    """As guided backpropagation does: eager would call what the class has now."""
    eager, fused = resnet.eval(), fusedskip.fuse(copy.deepcopy(resnet)).eval()
    x = torch.randn(1, 3, 33, 33, dtype=next(resnet.parameters()).dtype)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x.clamp(-0.5, 0.5))
    with torch.no_grad():
        assert torch.equal(fused(x), eager(x))


def test_a_class_that_changed_since_is_not_overwritten():
    """A parametrization derives a class from the fused one: without it, the weight is another."""

    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    model = nn.Sequential(timm.layers.BatchNormAct2d(4), timm.layers.BatchNormAct2d(4)).eval()
    fusedskip.fuse(model)
    nn.utils.parametrize.register_parametrization(model[1], "weight", Half())
    before, x = types(model), torch.randn(2, 4, 3, 3)
    want = model(x)
    assert types(fusedskip.fuse(model)) == before
    with pytest.raises(ValueError, match="1 has become a Parametrized"):
        fusedskip.unfuse(model)
    assert types(model) == before
    torch.testing.assert_close(model(x), want)
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert type(fusedskip.unfuse(model)[1]) is timm.layers.BatchNormAct2d
    torch.testing.assert_close(model(x), want)


def halved(forward):
    """`forward`, its results halved, under its name and documentation."""

    @functools.wraps(forward)
    def patched(self, x):
        return forward(self, x) / 2

    return patched


def test_every_call_is_patched(monkeypatch):
    """Who watches the calls of all modules, as FX does, sees those of the model as it was."""
    block, x = basic_block(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    fused, call, calls = fusedskip.fuse(copy.deepcopy(block)), nn.Module.__call__, []
    monkeypatch.setattr(nn.Module, "__call__", lambda m, *a: calls.append(m) or call(m, *a))
    assert torch.equal(fused(x), block(x))
    assert len(calls) == 14
    assert [type(m) for m in calls[1:7]] == [type(m) for m in calls[8:]]
    assert {row.reason for row in fusedskip.explain(fused)} == {"nn.Module.__call__ is patched"}


def test_a_class_that_is_patched_later(monkeypatch):
    block, x = basic_block(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    eager = copy.deepcopy(block)
    fusedskip.fuse(block)
    monkeypatch.setattr(tv.resnet.BasicBlock, "forward", halved(tv.resnet.BasicBlock.forward))
    assert torch.equal(block(x), eager(x))
    (row,) = fusedskip.explain(block)
    assert row.reason == "BasicBlock.forward is not the one that fusedskip knows"


def regnet_block():
    return tv.regnet.ResBottleneckBlock(4, 4, 1, nn.BatchNorm2d, nn.ReLU, group_width=2)


def timm_regnet_block():
    return timm.models.regnet.Bottleneck(4, 4, group_size=2)


def mnasnet_block():
    return tv.mnasnet._InvertedResidual(4, 4, 3, 1, 2)


LOOKED_THROUGH = [
    (regnet_block, tv.regnet.BottleneckTransform),
    (regnet_block, torchvision.ops.misc.Conv2dNormActivation),
    (timm_regnet_block, timm.layers.BatchNormAct2d),
    (timm_regnet_block, timm.layers.ConvNormAct),
    (mnasnet_block, nn.Sequential),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("make", "kind"), LOOKED_THROUGH, ids=lambda each: each.__name__)
def test_a_class_that_is_patched_inside_a_block(make, kind, when, monkeypatch):
    fusedskip.fuse(make())  # its library is known from then on
    eager, x = make().double().eval(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    fused = copy.deepcopy(eager)
    if when == "after":
        fusedskip.fuse(fused)
    monkeypatch.setattr(kind, "forward", halved(kind.forward))
    if when == "before":
        fusedskip.fuse(fused)
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["conv1", "bn1", "relu", "conv2", "bn2", "downsample"])
def test_a_function_in_place_of_a_child(name, when):
    eager, x = basic_block(downsample=True), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    fused = copy.deepcopy(eager)
    if when == "after":
        fusedskip.fuse(fused)
    for block in (eager, fused):
        delattr(block, name)
        setattr(block, name, lambda x: 2 * x + 1)
    if when == "before":
        fusedskip.fuse(fused)
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-12, atol=1e-12)


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
    "mobilenetv3": (
        lambda: tv.mobilenetv3.InvertedResidual(
            tv.mobilenetv3.InvertedResidualConfig(8, 3, 16, 8, False, "RE", 1, 1, 1), nn.BatchNorm2d
        ), "use_res_connect", False,
    ),
    "efficientnet": (
        lambda: timm.models._efficientnet_blocks.InvertedResidual(8, 8), "has_skip", False,
    ),
    "mnasnet": (lambda: tv.mnasnet._InvertedResidual(8, 8, 3, 1, 2), "apply_residual", False),
    "regnet": (lambda: timm.models.regnet.Bottleneck(8, 8, group_size=8), "downsample", None),
    "byobnet": (lambda: timm.models.byobnet.BasicBlock(8, 8), "shortcut", None),
}  # fmt: skip


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


def test_unfuse_refuses_a_forward_that_may_call_the_fused_one():
    block = fusedskip.fuse(basic_block())
    fused_class, forward = type(block), block.forward
    block.forward = lambda x: forward(x)
    with pytest.raises(ValueError, match=r"\(the model\) has got a forward of its own"):
        fusedskip.unfuse(block)
    assert type(block) is fused_class
    del block.forward
    assert type(fusedskip.unfuse(block)) is tv.resnet.BasicBlock


def test_unfuse_refuses_another_method_that_may_call_the_fused_one(resnet):
    fusedskip.fuse(resnet)
    forward = resnet._forward_impl
    resnet._forward_impl = lambda x: 2 * forward(x)
    row = fusedskip.explain(resnet).rows[0]
    assert (row.fused, row.reason) == (False, "it has a _forward_impl of its own")
    with pytest.raises(ValueError, match=r"\(the model\) has got a _forward_impl of its own"):
        fusedskip.unfuse(resnet)


def test_a_norm_of_what_the_other_side_changes():
    """Eager has normalised the input before the branch changes it in place."""
    block = tv.regnet.ResBottleneckBlock(8, 8, 1, nn.BatchNorm2d, nn.ReLU, 8)
    block.proj = nn.BatchNorm2d(8)
    block.f = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    text = "proj has the input of the branch, which may change it in place"
    assert fusedskip.explain(block).rows[0].reason == text
    fused = fusedskip.fuse(copy.deepcopy(block))
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(fused(x.clone()), block(x.clone()))


@pytest.mark.parametrize("index", [0, 1], ids=["another", "last"])
def test_norms_that_share_running_statistics(index):
    """Both would update them, one after the other; eager calls the whole branch first."""
    block = basic_block(downsample=True)
    block.downsample = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    block.double().train()
    for name in ("running_mean", "running_var"):
        setattr(block.downsample[2 * index], name, getattr(block.bn2, name))
    text = "bn2 shares running statistics with a norm of the shortcut"
    with pytest.raises(ValueError, match=text):
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

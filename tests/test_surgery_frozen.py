"""Norms that are frozen for good, in the blocks that `fuse` knows: those of detectors."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedskip
from fusedskip import blocks
from fusedskip.surgery.fused import Fused

from .libraries import timm, torchvision, transformers
from .networks import assert_equal, count_calls, resnet, train_alike

FrozenBatchNorm2d = torchvision.ops.FrozenBatchNorm2d
detection = torchvision.models.detection
NORMS = {
    "torchvision": FrozenBatchNorm2d,
    "transformers": transformers.models.detr.modeling_detr.DetrFrozenBatchNorm2d,
}


def randomise(model):
    for module in model.modules():
        if "BatchNorm" in type(module).__name__:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def bottleneck(norm=FrozenBatchNorm2d, projection_norm=None):
    """`(N, 8, H, W)` to `(N, 16, H, W)`: every tail of a ResNet."""
    torch.manual_seed(0)
    projection = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), (projection_norm or norm)(16))
    block = resnet.Bottleneck(8, 4, downsample=projection, norm_layer=norm)
    return randomise(block)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_trains_like_eager(norm):
    eager = bottleneck(norm).double()
    fused = fusedskip.fuse(copy.deepcopy(eager), strict=True)
    assert fusedskip.explain(fused).rows[0].kernels == ("K1", "K1", "K6")
    train_alike(fused, eager, [torch.randn(3, 8, 7, 5, dtype=torch.float64) for _ in range(2)])
    x = torch.randn(3, 8, 7, 5, dtype=torch.float64)
    assert count_calls(fused, x) == {"batch_norm": 0, "add": 0, "relu": 0}
    assert_equal(fused.eval()(x), eager.eval()(x))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_an_input_that_is_changed_before_backward(norm):
    """Eager reads nothing of it any more."""
    eager = nn.Sequential(randomise(norm(4)), nn.ReLU(), nn.Conv2d(4, 4, 1)).double()
    fused = fusedskip.fuse(copy.deepcopy(eager), strict=True)
    start, gradients = torch.randn(2, 4, 5, 5, dtype=torch.float64), []
    for branch in (eager, fused):
        leaf = start.clone().requires_grad_()
        x = 2 * leaf
        x += branch(x)
        gradients += torch.autograd.grad(x.square().sum(), leaf)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_no_less_accurate_than_eager(dtype, layout):
    """A tail alone, in the dtype of its buffers."""
    eager = nn.Sequential(randomise(FrozenBatchNorm2d(24)), nn.ReLU()).to(dtype)
    fused = fusedskip.fuse(copy.deepcopy(eager))
    x = torch.randn(4, 24, 9, 7).to(dtype, memory_format=layout)
    ours, theirs, exact = fused(x), eager(x), copy.deepcopy(eager).double()(x.double())
    assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= (theirs - exact).abs().max() + rounding


def test_what_is_saved():
    """One bit an element for the gate of the sum, and no activation."""
    tail = fusedskip.fuse(bottleneck()).bn3
    x, residual = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 16, 8, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), lambda t: t):
        fusedskip.modules.apply_norm(tail, x, residual, relu=True)
    assert max(saved) == x.numel() // 8


def test_in_another_dtype_as_eager():
    """Under autocast convolutions give bf16, of which eager's norm makes fp32."""
    eager = bottleneck()
    fused = fusedskip.fuse(copy.deepcopy(eager))
    x = torch.randn(3, 8, 7, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = fused(x), eager(x)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("relu", [True, False])
def test_one_image_alone_as_eager(relu):
    eager = nn.Sequential(randomise(FrozenBatchNorm2d(4)), nn.ReLU() if relu else nn.Identity())
    fused = fusedskip.fuse(copy.deepcopy(eager))
    x = torch.randn(4, 5, 6)
    assert torch.equal(fused(x), eager(x))


def half_frozen(frozen):
    kinds = (FrozenBatchNorm2d, nn.BatchNorm2d)
    return bottleneck(*(kinds if frozen == "branch" else kinds[::-1]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", ["branch", "projection", "projection alone"])
def test_beside_another_norm_under_autocast(frozen, training):
    eager = half_frozen(frozen)
    if frozen == "projection alone":
        eager.bn3 = nn.Sequential(eager.bn3, nn.Sigmoid())
    fused = fusedskip.fuse(copy.deepcopy(eager.train(training)))
    x = torch.randn(3, 8, 7, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = fused(x), eager(x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-5)


def with_activation():
    return timm.layers.FrozenBatchNormAct2d(4)


def without_activation():
    return nn.Sequential(FrozenBatchNorm2d(4), nn.ReLU())


def promote(norm):
    return torch.randn(2, 4, 5, 6).bfloat16()


def one_image(norm):
    return torch.randn(4, 5, 6)


def other_strides(norm):
    return torch.randn(2, 4, 5, 6).transpose(2, 3)


def broadcast_input(norm):
    return torch.randn(2, 1, 5, 6)


def broadcast_bias(norm):
    norm.bias = norm.bias[:1]
    return torch.randn(2, 4, 5, 6)


def parameter(norm):
    weight = norm.weight.bfloat16()
    del norm.weight
    norm.weight = nn.Parameter(weight)
    return torch.randn(2, 4, 5, 6)


def differentiate_statistics(norm):
    norm.running_mean.requires_grad_()
    return torch.randn(2, 4, 5, 6)


@pytest.mark.parametrize("make", [with_activation, without_activation])
@pytest.mark.parametrize(
    "change",
    [
        promote, one_image, other_strides, broadcast_input, broadcast_bias, parameter,
        differentiate_statistics,
    ],
)  # fmt: skip
def test_arithmetic_of_torch(make, change):
    """What only the arithmetic that eager writes does: it is called then."""
    eager = randomise(make())
    x = change(eager if make is with_activation else eager[0]).requires_grad_()
    fused = fusedskip.fuse(copy.deepcopy(eager))
    ours, theirs = fused(x), eager(x)
    assert torch.equal(ours, theirs)
    assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
    gradients = torch.autograd.grad(ours.sum(), x), torch.autograd.grad(theirs.sum(), x)
    assert torch.equal(*(gradient for (gradient,) in gradients))


def test_a_checkpoint_loaded_before_backward():
    eager = bottleneck().double()
    fused, other = fusedskip.fuse(copy.deepcopy(eager)), randomise(copy.deepcopy(eager))
    x, gradients = torch.randn(3, 8, 7, 5, dtype=torch.float64, requires_grad=True), []
    for block in (fused, eager):
        loss = block(x).square().sum()
        for norm in (block.bn1, block.bn3, block.downsample[1]):
            norm.load_state_dict(
                other.bn3.state_dict() if norm is not block.bn1 else other.bn1.state_dict()
            )
        gradients += torch.autograd.grad(loss, x)
    assert_equal(*gradients)


def test_buffers_made_in_inference_mode():
    with torch.inference_mode():
        eager = randomise(FrozenBatchNorm2d(4))
    fused = fusedskip.fuse(nn.Sequential(eager, nn.ReLU()))
    x = torch.randn(2, 4, 5, 6, requires_grad=True)
    ours, theirs = (
        torch.autograd.grad(f(x).sum(), x)[0] for f in (fused, lambda x: eager(x).relu())
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_eps(norm):
    """Those of transformers have their own, whatever an attribute says."""
    eager = bottleneck(norm).double()
    fused = fusedskip.fuse(copy.deepcopy(eager))
    fused.bn3.eps = eager.bn3.eps = 0.1
    x = torch.randn(3, 8, 7, 5, dtype=torch.float64)
    assert_equal(fused(x), eager(x))


@pytest.mark.parametrize("frozen", ["branch", "projection"])
def test_beside_a_norm_that_is_trained(frozen):
    eager = half_frozen(frozen).double()
    fused = fusedskip.fuse(copy.deepcopy(eager), strict=True)
    train_alike(fused, eager, [torch.randn(3, 8, 7, 5, dtype=torch.float64) for _ in range(2)])


def test_norms_of_another_forward_are_refused(monkeypatch):
    class Shifted(FrozenBatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    class ShiftedFrozenBatchNorm2d(Shifted):
        pass

    for norm in (Shifted, ShiftedFrozenBatchNorm2d):
        (row,) = fusedskip.explain(bottleneck(norm))
        assert "norm that no kernel computes" in row.reason
    block = fusedskip.fuse(bottleneck())
    monkeypatch.setattr(FrozenBatchNorm2d, "forward", Shifted.forward)
    (row,) = fusedskip.explain(block)
    assert (row.fused, row.reason) == (False, "bn1 has a forward of its own")


def test_a_detectors_backbone():
    backbone = detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    report = fusedskip.explain(fusedskip.fuse(backbone))
    assert report.n_covered == report.n_norms == 20
    assert all(row.fused for row in report)


def test_loaded_where_nothing_has_been_fused(tmp_path):
    """A pickled model is as fused in the process that loads it."""
    block, x = fusedskip.fuse(bottleneck(NORMS["transformers"])), torch.randn(3, 8, 7, 5)
    torch.save((block, x, block(x)), tmp_path / "block.pt")
    code = f"""
import torch
from tests import libraries
from tests.networks import count_calls
block, x, out = torch.load({str(tmp_path / "block.pt")!r}, weights_only=False)
assert count_calls(block, x) == {{"batch_norm": 0, "add": 0, "relu": 0}}
assert torch.equal(block(x), out)
"""
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=root, check=True)


def test_concatenated():
    layers = nn.Conv2d(3, 4, 1), randomise(FrozenBatchNorm2d(4)), nn.ReLU()
    fused, x = blocks.SkipSequential(*layers), torch.randn(2, 3, 5, 5)
    fusedskip.explain(fused)  # from here on the norm is known
    want = torch.cat([x, nn.Sequential(*layers)(x)], dim=1)
    torch.testing.assert_close(fused(x), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused(x).dtype == torch.float32


def test_compiles_without_a_graph_break():
    block, x = fusedskip.fuse(bottleneck()), torch.randn(3, 8, 7, 5)
    assert isinstance(block, Fused)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))

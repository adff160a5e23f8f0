"""Whole models of torchvision, timm and transformers, fused: they train as they did."""

import copy
import importlib
import io
from functools import partial

import pytest
import torch
from torch import nn

import fusedskip
from fusedskip.surgery.fused import Fused

from .libraries import timm, torchvision, transformers
from .networks import assert_equal, count_calls, output, train_alike

tv = torchvision.models
frozen_norm = torchvision.ops.FrozenBatchNorm2d
# Functions of these names hide the modules.
googlenet, inception = (
    importlib.import_module(f"torchvision.models.{name}") for name in ("googlenet", "inception")
)

# How to build a model, and how many of its norms are computed by fused kernels, of how many.
MODELS = {
    "torchvision:resnet18": (partial(tv.resnet18, num_classes=10), 20, 20),
    "torchvision:resnet50": (partial(tv.resnet50, num_classes=10), 53, 53),
    "torchvision:resnext50_32x4d": (partial(tv.resnext50_32x4d, num_classes=10), 53, 53),
    # wide_resnet50_2 with a block a stage: all of it has 67 million parameters, and 13 seconds.
    "torchvision:wide_resnet": (
        partial(tv.ResNet, tv.resnet.Bottleneck, [1] * 4, 10, width_per_group=128), 17, 17,
    ),
    "torchvision:regnet_y_400mf": (partial(tv.regnet_y_400mf, num_classes=10), 53, 53),
    "torchvision:mobilenet_v2": (partial(tv.mobilenet_v2, num_classes=10), 10, 52),
    "torchvision:mnasnet0_5": (partial(tv.mnasnet0_5, num_classes=10), 45, 52),
    "torchvision:r3d_18": (partial(tv.video.r3d_18, num_classes=10), 20, 20),
    "torchvision:r2plus1d_18": (partial(tv.video.r2plus1d_18, num_classes=10), 37, 37),
    "torchvision:fcn_resnet50": (
        partial(tv.segmentation.fcn_resnet50, weights_backbone=None, num_classes=10), 54, 54,
    ),
    "torchvision:mobilenet_v3_small": (partial(tv.mobilenet_v3_small, num_classes=10), 11, 34),
    "torchvision:densenet": (partial(tv.DenseNet, 8, (2, 2), 16, num_classes=10), 10, 11),
    "torchvision:googlenet": (
        lambda: nn.Sequential(
            googlenet.BasicConv2d(3, 8, kernel_size=3), googlenet.Inception(8, 4, 4, 8, 4, 8, 4)
        ), 7, 7,
    ),
    "torchvision:inception_v3": (
        lambda: nn.Sequential(
            inception.BasicConv2d(3, 8, kernel_size=3), inception.InceptionA(8, 8)
        ), 8, 8,
    ),
    "torchvision:resnet18, frozen": (
        partial(tv.resnet18, norm_layer=frozen_norm, num_classes=10), 20, 20,
    ),
    "timm:resnet26": (partial(timm.create_model, "resnet26", num_classes=10), 29, 29),
    "timm:resnet50d": (partial(timm.create_model, "resnet50d", num_classes=10), 55, 55),
    "timm:seresnet50": (partial(timm.create_model, "seresnet50", num_classes=10), 37, 53),
    "timm:res2net50_26w_4s": (
        partial(timm.create_model, "res2net50_26w_4s", num_classes=10), 85, 85,
    ),
    "timm:regnety_002": (partial(timm.create_model, "regnety_002", num_classes=10), 44, 44),
    "timm:resnetv2_50": (partial(timm.create_model, "resnetv2_50", num_classes=10), 49, 49),
    "timm:resnetv2_50d_gn": (partial(timm.create_model, "resnetv2_50d_gn", num_classes=10), 0, 51),
    "timm:dla34": (partial(timm.create_model, "dla34", num_classes=10), 33, 37),
    "timm:resnest14d": (partial(timm.create_model, "resnest14d", num_classes=10), 23, 23),
    "timm:skresnet18": (partial(timm.create_model, "skresnet18", num_classes=10), 28, 36),
    "timm:gernet_s": (partial(timm.create_model, "gernet_s", num_classes=10), 45, 45),
    "timm:repvgg_a0": (partial(timm.create_model, "repvgg_a0", num_classes=10), 44, 61),
    "timm:hgnetv2_b0": (partial(timm.create_model, "hgnetv2_b0", num_classes=10), 30, 42),
    "timm:efficientnet_es": (partial(timm.create_model, "efficientnet_es", num_classes=10), 43, 49),
    "timm:mobilenetv3_small_050": (
        partial(timm.create_model, "mobilenetv3_small_050", num_classes=10), 12, 34,
    ),
    "timm:mobilenetv4_conv_small_035": (
        partial(timm.create_model, "mobilenetv4_conv_small_035", num_classes=10), 40, 46,
    ),
    "timm:regnety_002, frozen": (
        lambda: timm.layers.freeze_batch_norm_2d(
            timm.create_model("regnety_002", num_classes=10)
        ), 44, 44,
    ),
    "transformers:resnet": (
        lambda: transformers.ResNetForImageClassification(
            transformers.ResNetConfig(num_labels=10)
        ), 53, 53,
    ),
    "transformers:regnet": (
        lambda: transformers.RegNetForImageClassification(
            transformers.RegNetConfig(num_labels=10)
        ), 71, 71,
    ),
    "transformers:rt_detr_resnet": (
        lambda: transformers.RTDetrResNetBackbone(transformers.RTDetrResNetConfig()), 55, 55,
    ),
    "transformers:hgnet_v2": (
        lambda: transformers.HGNetV2Backbone(transformers.HGNetV2Config()), 53, 80,
    ),
}  # fmt: skip


def build(name):
    """The model in fp64. Its norms are scaled so that rounding is not amplified from step to step.

    As it is initialised, ResNet-50 turns a difference of 1e-16 into one of 1e-9 in three steps.
    """
    torch.manual_seed(0)
    model = MODELS[name][0]().double()
    for module in model.modules():
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            nn.init.uniform_(module.weight, 0.2, 0.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def images(name):
    """As small as leaves the last stage of a ResNet 2 x 2 pixels: 17, 9, 5, 3 before it."""
    if name.endswith("d_18"):
        return torch.randn(2, 3, 4, 17, 17, dtype=torch.float64)
    size = 64 if "dla" in name else 33  # DLA takes multiples of 32
    return torch.randn(4, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_trains_like_eager(name):
    """Outputs, every gradient, every buffer and parameter; then evaluation and checkpoints."""
    eager = build(name)
    fused = fusedskip.fuse(copy.deepcopy(eager))
    report = fusedskip.explain(fused)
    assert (report.n_covered, report.n_norms) == MODELS[name][1:]
    assert any(row.fused for row in report) == (MODELS[name][1] > 0)
    # MNASNet turns a change of a parameter into a thousand times that of the next step's gradients.
    lr = 1e-6 if "mnasnet" in name else 1e-3
    train_alike(fused, eager, [images(name) for _ in range(2)], lr)

    assert list(fused.state_dict()) == list(eager.state_dict())
    x = images(name)[:2]
    with torch.no_grad():
        want = output(fused.eval(), x)
        assert_equal(want, output(eager.eval(), x))
        assert torch.equal(output(copy.deepcopy(fused), x), want)
        saved = io.BytesIO()
        torch.save(fused, saved)
        saved.seek(0)
        loaded = torch.load(saved, weights_only=False)
        assert [type(m) for m in loaded.modules()] == [type(m) for m in fused.modules()]
        assert torch.equal(output(loaded, x), want)
        eager.load_state_dict(fused.state_dict())
        unfused = fusedskip.unfuse(fused)
        assert not any(isinstance(m, Fused) for m in unfused.modules())
        assert [type(m) for m in unfused.modules()] == [type(m) for m in eager.modules()]
        assert torch.equal(output(unfused, x), output(eager, x))


@pytest.mark.parametrize("name", MODELS)
def test_falls_back_to_eager(name):
    """Hooked all over, every block runs the forward it had, which finds its children."""
    eager = build(name).eval()
    fused = fusedskip.fuse(copy.deepcopy(eager))
    for module in fused.modules():
        module.register_forward_pre_hook(lambda *_: None)
        for child, value in module._modules.items():
            assert getattr(module, child) is value, child
    assert not any(row.fused for row in fusedskip.explain(fused) if row.reason is None)
    with torch.no_grad():
        x = images(name)[:1]
        assert torch.equal(output(fused, x), output(eager, x))


def test_every_tail_of_resnet50_is_fused():
    model = build("torchvision:resnet50")
    x = images("")
    assert count_calls(model, x) == {"batch_norm": 53, "add": 16, "relu": 49}
    kernels = [kernel for row in fusedskip.explain(fusedskip.fuse(model)) for kernel in row.kernels]
    assert {kernel: kernels.count(kernel) for kernel in kernels} == {"K1": 33, "K2": 12, "K6": 4}
    assert count_calls(model, x) == {"batch_norm": 0, "add": 0, "relu": 0}


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("torchvision:mobilenet_v2", {"batch_norm": 42, "add": 0, "relu": 0}),  # ReLU6
        ("timm:seresnet50", {"batch_norm": 16, "add": 0, "relu": 0}),  # the norms before SE
        ("timm:regnety_002", {"batch_norm": 0, "add": 0, "relu": 0}),
        ("transformers:resnet", {"batch_norm": 0, "add": 0, "relu": 0}),
    ],
)
def test_what_is_left_of_other_models(name, left):
    assert count_calls(fusedskip.fuse(build(name)), images(name)) == left


def test_resnetv2_with_group_norm_is_refused():
    model = MODELS["timm:resnetv2_50d_gn"][0]()
    with pytest.raises(ValueError, match="norm1 is GroupNormAct"):
        fusedskip.fuse(model, strict=True)

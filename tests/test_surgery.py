"""fuse, unfuse and explain."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import fusedskip
from fusedskip import surgery
from fusedskip.__main__ import main
from fusedskip.surgery.fused import Fused

from .libraries import timm, torchvision
from .networks import assert_equal, count_calls, train_alike

tv = torchvision.models


def types(model):
    return [type(module) for module in model.modules()]


def test_fuse_twice_and_unfuse(resnet):
    before = types(resnet)
    assert fusedskip.fuse(resnet) is resnet
    once = types(resnet)
    assert types(fusedskip.fuse(resnet)) == once != before
    assert fusedskip.unfuse(resnet) is resnet
    assert types(resnet) == before


def test_explain_changes_nothing(resnet):
    before = types(resnet)
    report = fusedskip.explain(resnet)
    assert types(resnet) == before
    assert not any(row.fused for row in report)
    assert all(row.reason is None and row.kernels for row in report)
    assert [row.fused for row in fusedskip.explain(fusedskip.fuse(resnet))] == [True] * len(report)


def test_report(resnet):
    assert "20 of 20 normalisation layers fusible" in str(fusedskip.explain(resnet))
    assert "fuse knows no module" in str(fusedskip.explain(nn.LayerNorm(3)))
    report = fusedskip.explain(fusedskip.fuse(resnet))
    assert report.to_dicts()[1] == {
        "name": "layer1.0",
        "type": "BasicBlock",
        "kernels": ("K1", "K2"),
        "fused": True,
        "reason": None,
    }
    assert [row.name for row in report][:2] == ["", "layer1.0"]
    table = str(report)
    assert "layer2.0" in table
    assert "K1 K6" in table
    assert "20 of 20 normalisation layers in fused kernels" in table


def test_filter_fn(resnet):
    seen = []

    def only_the_first_layer(module, name):
        seen.append((module, name))
        return name.startswith("layer1")

    fusedskip.fuse(resnet, filter_fn=only_the_first_layer)
    fused = [name for name, module in resnet.named_modules() if isinstance(module, Fused)]
    assert fused == ["layer1.0", "layer1.1"]
    assert {name: module for module, name in seen}["layer4.1"] is resnet.layer4[1]


def test_strict_raises_and_changes_nothing(resnet):
    resnet.layer1[1].bn2 = nn.GroupNorm(4, 64)
    resnet.layer3[0].relu = nn.SiLU()
    before = types(resnet)
    with pytest.raises(ValueError, match="1 modules cannot be fused") as error:
        fusedskip.fuse(resnet, strict=True)
    assert "layer1.1 (BasicBlock): bn2 is GroupNorm, a norm that no kernel" in str(error.value)
    assert types(resnet) == before
    # What the filter leaves out need not be fused.
    fusedskip.fuse(resnet, lambda module, name: name != "layer1.1", strict=True)
    assert type(resnet.layer1[1]) is tv.resnet.BasicBlock


@pytest.mark.parametrize("when", ["before", "after"])
def test_sync_batch_norm(when):
    """Converted before or after fusing; without other processes it is a batch norm."""
    torch.manual_seed(0)
    downsample = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
    eager = tv.resnet.BasicBlock(8, 16, downsample=downsample).double()
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    steps = (convert, fusedskip.fuse) if when == "before" else (fusedskip.fuse, convert)
    fused = copy.deepcopy(eager)
    for step in steps:
        fused = step(fused)
    eager = convert(eager)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in fused.modules()) == 3
    (row,) = fusedskip.explain(fused)
    assert (row.fused, row.reason, row.kernels) == (True, None, ("K1", "K6"))
    x = torch.randn(4, 8, 5, 5).double()
    assert count_calls(fused, x) == {"batch_norm": 0, "add": 0, "relu": 0}
    eager.load_state_dict(fused.state_dict())
    train_alike(fused, eager, [torch.randn(4, 8, 5, 5).double() for _ in range(2)])
    assert_equal(fused.eval()(x), eager.eval()(x))


def test_grad_cam(resnet):
    """A forward hook that keeps an activation, and its gradient, on the last norm of the trunk."""

    def cam(model):
        kept = {}

        def keep(module, args, out):
            kept["activation"] = out.detach().clone()
            out.register_hook(lambda gradient: kept.update(gradient=gradient.clone()))

        handle = model.layer4[1].bn2.register_forward_hook(keep)
        model(torch.ones(2, 3, 64, 64).double().sin())[:, 3].sum().backward()
        handle.remove()
        return kept["activation"], kept["gradient"]

    fused = fusedskip.fuse(copy.deepcopy(resnet)).eval()
    for ours, theirs in zip(cam(fused), cam(resnet.eval()), strict=True):
        assert_equal(ours, theirs)


def test_a_sequential_without_norm_and_activation_is_no_candidate():
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU())
    assert len(fusedskip.explain(plain)) == 0


def test_plain_sequentials():
    """Several pairs, an Identity between, another activation, a slice of the fused one."""
    torch.manual_seed(0)
    eager = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Identity(), nn.ReLU(),
        nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5), nn.SiLU(),
    ).double()  # fmt: skip
    fused = fusedskip.fuse(copy.deepcopy(eager))
    (row,) = fusedskip.explain(fused)
    assert row.kernels == ("K1", "K1")
    train_alike(fused, eager, [torch.randn(4, 3, 9, 8).double() for _ in range(2)])
    x = torch.randn(4, 3, 9, 8).double()
    assert_equal(fused[:3](x), eager[:3](x))
    (row,) = fusedskip.explain(eager[4:7])
    assert row.kernels == ("K1",)


@pytest.mark.parametrize("in_place", [True, False], ids=["resnet", "regnet"])
def test_input_in_another_dtype_under_autocast(in_place):
    """The branch comes in bf16, the shortcut in fp32: the sum's dtype is eager's."""
    torch.manual_seed(0)
    if in_place:
        eager = tv.resnet.BasicBlock(8, 8)
    else:
        eager = tv.regnet.ResBottleneckBlock(8, 8, 1, nn.BatchNorm2d, nn.ReLU, group_width=4)
    fused = fusedskip.fuse(copy.deepcopy(eager))
    x = torch.randn(4, 8, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = fused(x), eager(x)
    assert ours.dtype == theirs.dtype == (torch.bfloat16 if in_place else torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6)


def test_a_shortcut_that_eager_broadcasts():
    """As DLA's may, given an odd size."""
    torch.manual_seed(0)
    downsample = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))
    eager = tv.resnet.BasicBlock(8, 16, downsample=downsample).double()
    fused = fusedskip.fuse(copy.deepcopy(eager))
    train_alike(fused, eager, [torch.randn(4, 8, 5, 5).double() for _ in range(2)])


@pytest.mark.parametrize("layer", ["bn1", "relu", "maxpool"])
def test_a_backbone_that_hands_out_its_stem(layer):
    """The result of a norm without its ReLU can be handed out only by calling one by one."""
    getter = tv._utils.IntermediateLayerGetter
    torch.manual_seed(0)
    backbone = tv.resnet18().double()
    eager = getter(backbone, {layer: "early", "layer1": "late"})
    fused = fusedskip.fuse(copy.deepcopy(eager))
    assert isinstance(fused, Fused) == (layer != "bn1")
    x = torch.randn(2, 3, 32, 32).double()
    ours, theirs = fused(x), eager(x)
    assert list(ours) == list(theirs)
    for name in ("early", "late"):
        # The ReLU that follows works in place on what eager has handed out.
        assert_equal(ours[name].relu(), theirs[name].relu())


def test_a_backbone_that_calls_a_layer_twice():
    """Under the name by which it was to hand out another."""
    getter = tv._utils.IntermediateLayerGetter
    stem = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
    layers = nn.Sequential(*stem, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    eager = getter(layers, {"3": "once", "4": "twice"})
    eager["4"] = eager["3"]
    fused = fusedskip.fuse(copy.deepcopy(eager))
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(fused(x), eager(x))


def test_a_backbone_without_a_layer_that_it_was_to_hand_out():
    getter = tv._utils.IntermediateLayerGetter
    fused = fusedskip.fuse(getter(tv.resnet18(), {"layer1": "early", "layer4": "late"}))
    del fused["layer4"]
    assert isinstance(fused, Fused)
    assert list(fused(torch.randn(2, 3, 32, 32))) == ["early"]


def test_libraries_are_known_before_anything_is_judged():
    """A Sequential is judged by what is inside, which may be of a library not yet seen."""
    code = """
import fusedskip, timm
from torch import nn
norm = timm.layers.BatchNormAct2d(4, apply_act=False)
model = fusedskip.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU()))
assert type(model).__name__ == "FusedSequential"
"""
    libraries = "from tests.libraries import timm, torchvision"
    subprocess.run([sys.executable, "-W", "ignore", "-c", libraries + code], check=True)


def test_a_container_of_the_name_of_a_norm():
    class ConvNorm(nn.Sequential):
        pass

    model = nn.Sequential(
        ConvNorm(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.ReLU(),
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(),
    )  # fmt: skip
    report = fusedskip.explain(model)
    assert [row.kernels for row in report] == [("K1",)]
    assert (report.n_covered, report.n_norms) == (1, 2)


def test_a_norm_called_fused_and_by_itself_before_backward():
    """Its cumulative average is updated in place twice, which no backward pass minds."""
    norm = nn.BatchNorm2d(4, momentum=None).double()
    fused = fusedskip.fuse(nn.Sequential(norm, nn.ReLU()))
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    (norm(x) + fused(x)).square().sum().backward()
    twin, leaf = nn.BatchNorm2d(4, momentum=None).double(), x.detach().requires_grad_()
    (twin(leaf) + twin(leaf).relu()).square().sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad)
    torch.testing.assert_close(norm.state_dict(), twin.state_dict())


def test_mkldnn_tensors_run_eagerly():
    eager = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).eval()
    fused = fusedskip.fuse(copy.deepcopy(eager))
    x = torch.randn(2, 3, 5, 5).to_mkldnn()
    with torch.no_grad():
        torch.testing.assert_close(fused(x).to_dense(), eager(x).to_dense())


def test_frozen_downsample():
    """The two norms of a tail in different modes: one normalises with running statistics."""
    torch.manual_seed(0)
    downsample = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
    eager = tv.resnet.BasicBlock(8, 16, downsample=downsample).double()
    fused = fusedskip.fuse(copy.deepcopy(eager))
    for block in (eager, fused):
        block.downsample.eval()
    train_alike(fused, eager, [torch.randn(4, 8, 5, 5).double() for _ in range(2)])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiles_without_a_graph_break(resnet):
    fused = fusedskip.fuse(resnet)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64, 64).double()
    buffers = copy.deepcopy(fused.state_dict())
    ours = compiled(x)
    fused.load_state_dict(buffers)
    assert_equal(ours, fused(x))


def test_explain_command(capsys):
    assert main(["explain", "torchvision:resnet18"]) == 0
    assert "20 of 20 normalisation layers" in capsys.readouterr().out
    assert main(["explain", "timm:resnet10t"]) == 0
    assert "(the model)" in capsys.readouterr().out
    assert main(["explain", "torchvision:wide_resnet50_2"]) == 0
    assert "53 of 53 normalisation layers" in capsys.readouterr().out
    assert main(["explain", "transformers:microsoft/resnet-50"]) == 0
    assert "53 of 53 normalisation layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet18", "expected LIBRARY:NAME"),
        ("jax:resnet18", "expected LIBRARY:NAME"),
        ("torchvision:resnet19", "Unknown model resnet19"),
        ("timm:resnet19", "Unknown model"),
        ("transformers:nobody/nothing-1", "no model type of transformers"),
    ],
)
def test_explain_command_refuses(model, message, capsys):
    assert main(["explain", model]) == 2
    assert message in capsys.readouterr().err


def test_no_library_is_imported_for_a_model_that_does_not_use_it():
    code = (
        "import sys, fusedskip; from torch import nn;"
        "fusedskip.fuse(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()));"
        "print(sorted({'torchvision', 'timm', 'transformers', 'rich'} & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"


@pytest.mark.parametrize("error", [ImportError, AttributeError])
def test_an_unknown_release_of_a_library_is_announced(monkeypatch, error):
    def fail(name):
        raise error("cannot find 'resnet'")

    monkeypatch.setattr(surgery.importlib, "import_module", fail)
    surgery._load.cache_clear()
    with pytest.warns(UserWarning, match="fusedskip knows another timm than this: cannot find"):
        surgery._load("timm")
    surgery._load.cache_clear()


def test_a_sequential_takes_its_input_by_name():
    model = fusedskip.fuse(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model.eval()(input=x), model(x))


@pytest.mark.parametrize("act", [nn.Identity, nn.ReLU, nn.SiLU])
def test_res2net_with_another_activation(act):
    eager = timm.create_model("res2net50_26w_4s", num_classes=10).double().eval().layer1[0]
    eager.relu = act()
    fused = fusedskip.fuse(copy.deepcopy(eager), strict=True)
    x = torch.randn(1, 64, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), eager(x))

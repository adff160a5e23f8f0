"""What `fuse` refuses: classes of which it does not know that they compute what it fuses."""

import importlib
import inspect
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import fusedskip
from fusedskip import blocks
from fusedskip.surgery.fingerprints import fingerprint
from fusedskip.surgery.fused import FUSED, FusedSkip

from .libraries import torchvision

tv = torchvision.models


def test_blocks_of_its_own_are_no_candidates():
    model = blocks.SkipSequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    assert fusedskip.fuse(model, strict=True) is model
    assert len(fusedskip.explain(model)) == 0


def fused_classes(library):
    name = importlib.import_module(f"fusedskip.surgery.{library}").__name__
    return [cls for cls in FUSED.values() if f"{cls.__module__}.".startswith(f"{name}.")]


@pytest.mark.parametrize("library", ["torchvision", "timm", "transformers"])
def test_methods_are_called_as_those_they_replace(library):
    """By name, too: transformers' layers take `hidden_state`."""
    classes = fused_classes(library)
    assert len(classes) > 10
    for fused in classes:
        for method in fused._fused_methods:
            both = fused, fused._fused_replaces
            ours, theirs = (inspect.signature(getattr(c, method)) for c in both)
            assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
                (p.name, p.default, p.kind) for p in theirs.parameters.values()
            ], fused


@pytest.mark.parametrize("library", ["torch", "torchvision", "timm", "transformers"])
def test_fingerprints_hold_for_the_installed_libraries(library):
    classes = fused_classes(library)
    assert classes
    assert [cls._fused_changed() for cls in classes] == [None] * len(classes)
    # Unpickling finds a class by its name.
    assert all(getattr(sys.modules[cls.__module__], cls.__name__) is cls for cls in classes)


def test_fingerprint_sees_what_is_computed_and_nothing_else():
    class Plain:
        def forward(self, x):
            return self.bn(x) + x

    class Documented:
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """The same."""
            # But for this.
            return self.bn(x)+x  # fmt: skip

    class Different:
        def forward(self, x):
            return self.bn(x) - x

    assert fingerprint(Plain.forward) == fingerprint(Documented.forward)
    assert fingerprint(Plain.forward) != fingerprint(Different.forward)
    assert fingerprint(len) is None


@contextmanager
def known_classes():
    saved = dict(FUSED)
    try:
        yield
    finally:
        FUSED.clear()
        FUSED.update(saved)


class Upgraded(tv.resnet.BasicBlock):
    """As if a new release of the library had changed the block."""

    def forward(self, x):
        return super().forward(x) * 2


def test_a_changed_forward_is_refused():
    with known_classes():

        class FusedUpgraded(FusedSkip, Upgraded, forward="e469bbb0e395"):
            _fused_branch = ("conv1", "bn1", "relu", "conv2", "bn2")
            _fused_act = "relu"

        block = Upgraded(4, 4)
        (row,) = fusedskip.explain(fusedskip.fuse(block))
        assert row.reason == "Upgraded.forward is not the one that fusedskip knows"
        assert type(block) is Upgraded
        # As when a model that was saved fused is loaded beside the new release.
        block.__class__ = FusedUpgraded
        x = torch.randn(2, 4, 3, 3)
        fused, eager = block.eval()(x), fusedskip.unfuse(block)(x)
        assert torch.equal(fused, eager)


def test_a_subclass_is_refused():
    (row,) = fusedskip.explain(fusedskip.fuse(Upgraded(4, 4)))
    assert row.type == "Upgraded"
    assert row.reason == "it is a subclass of BasicBlock and may compute something else"


def test_a_quantizable_model_is_refused():
    quantizable = tv.quantization.resnet18(weights=None, quantize=False)
    report = fusedskip.explain(fusedskip.fuse(quantizable))
    reasons = {row.reason for row in report if row.type.startswith("Quantizable")}
    assert len(reasons) == 2
    assert not any(row.fused for row in report if "Quantizable" in row.type)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_script_module_is_refused(resnet):
    report = fusedskip.explain(torch.jit.script(resnet))
    assert {row.type for row in report} == {"BasicBlock", "ResNet"}
    assert {row.reason for row in report} == {"it is a ScriptModule: fuse before scripting"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_fused_model_is_not_scripted(resnet):
    with pytest.raises(RuntimeError, match=r"fusedskip\.unfuse\(model\) before"):
        torch.jit.script(fusedskip.fuse(resnet))
    assert torch.jit.script(fusedskip.unfuse(resnet)).code


@pytest.mark.parametrize(
    "norm",
    [nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.LazyBatchNorm2d()],
    ids=lambda norm: type(norm).__name__,
)
def test_other_norms_in_a_sequential_are_refused(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU())
    (row,) = fusedskip.explain(fusedskip.fuse(model))
    assert row.reason == f"1 is {type(norm).__name__}, a norm that no kernel computes"
    assert type(model) is nn.Sequential

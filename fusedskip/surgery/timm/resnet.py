"""timm's ResNets, and RegNets, whose blocks end as theirs do."""

from typing import Any

from timm.layers.norm_act import BatchNormAct2d
from timm.models import regnet, resnet, resnetv2
from timm.models._manipulate import checkpoint_seq
from torch import Tensor

from fusedskip import tails
from fusedskip.surgery.fused import Fused, FusedSkip
from fusedskip.surgery.timm.layers import FusedOneInput
from fusedskip.tails import Plan


class FusedBasicBlock(FusedSkip, resnet.BasicBlock, forward="459b888dd004"):
    """The block of ResNet-18 and -34."""

    _fused_branch = (
        "conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2", "se?", "drop_path?",
    )  # fmt: skip
    _fused_shortcut = ("downsample?",)
    _fused_act = "act2"


class FusedBottleneck(FusedSkip, resnet.Bottleneck, forward="58c1c81d9c8b"):
    """The block of ResNet-50 and up, with squeeze-and-excitation or without."""

    _fused_branch = (
        "conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa",
        "conv3", "bn3", "se?", "drop_path?",
    )  # fmt: skip
    _fused_shortcut = ("downsample?",)
    _fused_act = "act3"


class FusedResNet(Fused, resnet.ResNet, forward_features="b3983db7730c"):
    """The stem of a ResNet."""

    _fused_children = ("conv1", "bn1", "act1", "maxpool")

    def forward_features(self, x: Tensor) -> Tensor:
        plan = self._fused_plan(x)
        if plan is None:
            return super().forward_features(x)
        x = tails.run_chain(plan, x)
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        if self.grad_checkpointing:
            return checkpoint_seq(stages, x, flatten=True)
        for stage in stages:
            x = stage(x)
        return x


class FusedRegNetBottleneck(FusedSkip, regnet.Bottleneck, forward="0017c95c5740"):
    """The block of RegNet X and Y, where it has a skip connection."""

    _fused_branch = ("conv1", "conv2", "se", "conv3", "drop_path")
    _fused_shortcut = ("downsample?",)
    _fused_act = "act3"
    _fused_inplace = False

    @classmethod
    def _fused_applies(cls, module: Any) -> bool:
        return module.downsample is not None


class FusedDownsampleConv(FusedOneInput, resnetv2.DownsampleConv, forward="95f6b4f2a5e1"):
    """A projection of ResNet V2."""

    _fused_children = ("conv", "norm")


class FusedDownsampleAvg(FusedOneInput, resnetv2.DownsampleAvg, forward="2e8645cf7ffc"):
    """A projection of ResNet V2, variant D."""

    _fused_children = ("pool", "conv", "norm")


class FusedResNetV2Bottleneck(FusedSkip, resnetv2.Bottleneck, forward="edff604fc22b"):
    """The post-activation block of ResNet V2; its first two norms bring their activations."""

    _fused_branch = ("conv1", "norm1", "conv2", "norm2", "conv3", "norm3", "drop_path")
    _fused_shortcut = ("downsample?",)
    _fused_act = "act3"
    _fused_inplace = False
    _fused_shortcut_first = True


class FusedPreActBottleneck(Fused, resnetv2.PreActBottleneck, forward="a7bd6ec7bcb8"):
    """A block without a tail: it ends in a convolution, and its norms bring their activations.

    Each `BatchNormAct2d` in it is fused by itself. It is a candidate only to say of the others that
    they are not.
    """

    @classmethod
    def _fused_applies(cls, module: Any) -> bool:
        return not isinstance(module.norm1, BatchNormAct2d)

    @classmethod
    def _fused_plan_of(cls, module: Any) -> Plan:
        return tails.plan_chain(())._replace(norms=[module.norm1])

"""What `fuse` makes of timm's blocks (1.0)."""

from typing import Any

import torch
from timm.layers.conv_bn_act import ConvNormAct
from timm.layers.norm_act import BatchNormAct2d
from timm.models import dla, regnet, res2net, resnet, resnetv2
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from fusedskip import tails
from fusedskip.modules import apply_norm
from fusedskip.surgery.fused import Fused, FusedChain, FusedSkip
from fusedskip.tails import Plan


def _is_norm_alone(norm: BatchNormAct2d) -> bool:
    return all(type(m) is nn.Identity and tails.is_plain(m) for m in (norm.act, norm.drop))


class FusedBatchNormAct2d(Fused, BatchNormAct2d, forward="aab01662c2e6"):
    """A norm with an activation of its own."""

    @classmethod
    def _fused_applies(cls, module: Any) -> bool:
        return type(module.act) is not nn.Identity

    @classmethod
    def _fused_plan_of(cls, module: Any) -> Plan:
        if type(module.act) is not nn.ReLU or type(module.drop) is not nn.Identity:
            return tails.plan_chain(())
        children = [module.act, module.drop]
        return tails.plan_chain(())._replace(branch=[(module, module.act)], bypassed=children)

    def forward(self, x: Tensor) -> Tensor:
        plan = self._fused_plan_of(self)
        if plan.branch and self._may_run(plan, x):
            return apply_norm(self, x, None, relu=True)
        return super().forward(x)


if FusedBatchNormAct2d._fused_changed() is None:
    tails.NORMS[BatchNormAct2d] = _is_norm_alone
    tails.FORWARDS[BatchNormAct2d] = BatchNormAct2d.forward


class _FusedConv(FusedChain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class FusedConvNormAct(_FusedConv, ConvNormAct, forward="db6ac5abd927"):
    """Convolution and norm; the norm brings its own activation."""

    _fused_names = ("conv", "bn", "aa")


class FusedDownsampleConv(_FusedConv, resnetv2.DownsampleConv, forward="95f6b4f2a5e1"):
    """A projection of ResNet V2."""

    _fused_names = ("conv", "norm")


class FusedDownsampleAvg(_FusedConv, resnetv2.DownsampleAvg, forward="2e8645cf7ffc"):
    """A projection of ResNet V2, variant D."""

    _fused_names = ("pool", "conv", "norm")


class FusedBasicBlock(FusedSkip, resnet.BasicBlock, forward="459b888dd004"):
    """The block of ResNet-18 and -34."""

    _fused_branch = ("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2", "se", "drop_path")
    _fused_shortcut = ("downsample",)
    _fused_act = "act2"


class FusedBottleneck(FusedSkip, resnet.Bottleneck, forward="58c1c81d9c8b"):
    """The block of ResNet-50 and up, with squeeze-and-excitation or without."""

    _fused_branch = (
        "conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa",
        "conv3", "bn3", "se", "drop_path",
    )  # fmt: skip
    _fused_shortcut = ("downsample",)
    _fused_act = "act3"


class FusedResNet(Fused, resnet.ResNet, forward_features="b3983db7730c"):
    """The stem of a ResNet."""

    @classmethod
    def _fused_plan_of(cls, module: Any) -> Plan:
        return tails.plan_chain((module.conv1, module.bn1, module.act1, module.maxpool))

    def forward_features(self, x: Tensor) -> Tensor:
        plan = self._fused_plan_of(self)
        if not self._may_run(plan, x):
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
    _fused_shortcut = ("downsample",)
    _fused_act = "act3"
    _fused_inplace = False

    @classmethod
    def _fused_applies(cls, module: Any) -> bool:
        return module.downsample is not None


class FusedResNetV2Bottleneck(FusedSkip, resnetv2.Bottleneck, forward="edff604fc22b"):
    """The post-activation block of ResNet V2; its first two norms bring their activations."""

    _fused_branch = ("conv1", "norm1", "conv2", "norm2", "conv3", "norm3", "drop_path")
    _fused_shortcut = ("downsample",)
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


class _FusedScales(FusedSkip):
    """A block whose middle convolutions each see what the one before them gave (Res2Net)."""

    _fused_branch = ("drop_block", "conv3", "bn3", "se", "drop_path")
    _fused_act = "relu"

    @classmethod
    def _fused_plans_of(cls, module: Any) -> tuple[Plan, list[Plan]]:
        """That of the tail, and those of the convolutions before it, with norm and activation."""
        pairs = [(module.conv1, module.bn1), *zip(module.convs, module.bns, strict=True)]
        scales = [
            tails.plan_chain((conv, bn, module.relu))._replace(norms=[bn]) for conv, bn in pairs
        ]
        return super()._fused_plan_of(module), scales

    @classmethod
    def _fused_plan_of(cls, module: Any) -> Plan:
        return _joined(*cls._fused_plans_of(module))

    def _run_scales(self, tail: Plan, scales: list[Plan], x: Tensor, skip: Tensor) -> Tensor:
        first, *scales = scales
        parts = torch.split(tails.run_steps(first.branch, x), self.width, 1)
        outs: list[Tensor] = []
        for i, scale in enumerate(scales):
            part = parts[i] if i == 0 or self.is_first else outs[-1] + parts[i]
            outs.append(tails.run_steps(scale.branch, part))
        if self.scale > 1:
            outs.append(parts[-1] if self.pool is None else self.pool(parts[-1]))
        return tails.run_skip(tail, torch.cat(outs, 1), skip)


def _joined(tail: Plan, scales: list[Plan]) -> Plan:
    plans = [*scales, tail]
    return tail._replace(
        branch=[step for plan in plans for step in plan.branch],
        norms=[norm for plan in plans for norm in plan.norms],
        bypassed=[child for plan in plans for child in plan.bypassed],
    )


class FusedBottle2neck(_FusedScales, res2net.Bottle2neck, forward="168a6143acc4"):
    """The block of Res2Net."""

    _fused_shortcut = ("downsample",)

    def forward(self, x: Tensor) -> Tensor:
        plans = self._fused_plans_of(self)
        if self._may_run(_joined(*plans), x):
            return self._run_scales(*plans, x, x)
        return super().forward(x)


class _FusedDla(FusedSkip):
    """A block whose tree may give it the shortcut."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None, children: Any = None) -> Tensor:
        plan = self._fused_plan_of(self)
        if self._may_run(plan, x):
            return tails.run_skip(plan, x, shortcut)
        return self._fused_replaces.forward(self, x, shortcut, children)


class FusedDlaBasic(_FusedDla, dla.DlaBasic, forward="5c96cf31c5ff"):
    """The block of DLA-34."""

    _fused_branch = ("conv1", "bn1", "relu", "conv2", "bn2")
    _fused_act = "relu"


class FusedDlaBottleneck(_FusedDla, dla.DlaBottleneck, forward="b59a497d765d"):
    """The block of DLA-60 and DLA-X."""

    _fused_branch = ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3")
    _fused_act = "relu"


class FusedDlaBottle2neck(_FusedScales, dla.DlaBottle2neck, forward="b9e18ad8018c"):
    """The block of DLA with Res2Net's convolutions."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None, children: Any = None) -> Tensor:
        plans = self._fused_plans_of(self)
        if self._may_run(_joined(*plans), x):
            return self._run_scales(*plans, x, x if shortcut is None else shortcut)
        return self._fused_replaces.forward(self, x, shortcut, children)


class FusedDlaRoot(Fused, dla.DlaRoot, forward="213e409ad18a"):
    """Where the branches of a DLA tree are joined."""

    @classmethod
    def _fused_plan_of(cls, module: Any) -> Plan:
        if module.shortcut:
            return tails.plan_skip((module.conv, module.bn), (), module.relu)
        return tails.plan_chain((module.conv, module.bn, module.relu))

    def forward(self, x_children: list[Tensor]) -> Tensor:
        plan = self._fused_plan_of(self)
        if not self._may_run(plan, x_children[0]):
            return super().forward(x_children)
        x = torch.cat(x_children, 1)
        return tails.run_skip(plan, x, x_children[0]) if self.shortcut else tails.run_chain(plan, x)

"""timm's blocks whose convolution weighs its parts: ResNeSt and SKNet."""

from typing import Any

from timm.layers.split_attn import SplitAttn
from timm.models import resnest, sknet
from torch import Tensor

from fusedskip import tails
from fusedskip.surgery.fused import Fused, FusedSkip
from fusedskip.tails import Plan


class FusedSplitAttn(Fused, SplitAttn, forward="c6246ddd9739"):
    """Parts of a grouped convolution, added up as their pooled sum says (ResNeSt)."""

    _fused_children = ("conv", "bn0", "drop", "act0", "fc1", "bn1", "act1", "fc2")

    @classmethod
    def _fused_plan_of(cls, module: Any) -> Plan:
        """That of the convolution, and that of what weighs its parts."""
        children = tails.children(module, cls._fused_children)
        return tails.joined(tails.plan_chain(children[:4]), tails.plan_chain(children[4:]))

    def forward(self, x: Tensor) -> Tensor:
        plan = self._fused_plan(x)
        if plan is None:
            return super().forward(x)
        (weighing,) = plan.others
        x = tails.run_chain(plan, x)
        n, _, height, width = x.shape
        is_split, in_parts = self.radix > 1, (n, self.radix, -1, height, width)
        parts = x.reshape(in_parts) if is_split else x
        pooled = (parts.sum(1) if is_split else parts).mean((2, 3), keepdim=True)
        weights = self.rsoftmax(tails.run_chain(weighing, pooled)).view(n, -1, 1, 1)
        if is_split:
            weights = weights.view(n, self.radix, -1, 1, 1)
        out = parts * weights
        return (out.sum(1) if is_split else out).contiguous()


class FusedResNestBottleneck(FusedSkip, resnest.ResNestBottleneck, forward="38cda47c39b3"):
    """The block of ResNeSt, where it drops no paths."""

    _fused_branch = (
        "conv1", "bn1", "act1", "avd_first?", "conv2", "bn2", "drop_block", "act2", "avd_last?",
        "conv3", "bn3",
    )  # fmt: skip
    _fused_norms = (1, 10)  # bn2 is in the convolution
    _fused_shortcut = ("downsample?",)
    _fused_act = "act3"

    @classmethod
    def _fused_applies(cls, module: Any) -> bool:
        return module.drop_path is None


class _FusedSelectiveKernel(FusedSkip):
    _fused_shortcut = ("downsample?",)
    _fused_act = "act"


class FusedSelectiveKernelBasic(
    _FusedSelectiveKernel, sknet.SelectiveKernelBasic, forward="0bac9387891d"
):
    """The block of SKNet-18 and -34."""

    _fused_branch = ("conv1", "conv2", "se?", "drop_path?")


class FusedSelectiveKernelBottleneck(
    _FusedSelectiveKernel, sknet.SelectiveKernelBottleneck, forward="d5645c8da8ce"
):
    """The block of SKNet-50."""

    _fused_branch = ("conv1", "conv2", "conv3", "se?", "drop_path?")

"""timm's "bring your own blocks" networks: ResNets of all kinds, GENet, RepVGG."""

from typing import Any

from timm.models import byobnet
from torch import Tensor

from fusedskip import tails
from fusedskip.surgery.fused import Fused, FusedSkip
from fusedskip.surgery.timm.layers import FusedOneInput
from fusedskip.tails import Plan


class FusedDownsampleAvg(FusedOneInput, byobnet.DownsampleAvg, forward="301923584166"):
    """A projection after pooling, to which the blocks look through."""

    _fused_names = ("pool", "conv")


class _FusedBlock(FusedSkip):
    _fused_shortcut = ("shortcut",)
    _fused_act = "act"
    _fused_inplace = False

    @classmethod
    def _fused_applies(cls, module: Any) -> bool:
        return module.shortcut is not None


class FusedBasicBlock(_FusedBlock, byobnet.BasicBlock, forward="7f9cb4ebb85f"):
    """Two convolutions."""

    _fused_branch = ("conv1_kxk", "attn", "conv2_kxk", "attn_last", "drop_path")


class FusedBottleneckBlock(_FusedBlock, byobnet.BottleneckBlock, forward="2f646e2d7345"):
    """A convolution between two of 1x1."""

    _fused_branch = (
        "conv1_1x1", "conv2_kxk", "conv2b_kxk", "attn", "conv3_1x1", "attn_last", "drop_path",
    )  # fmt: skip


class FusedSelfAttnBlock(_FusedBlock, byobnet.SelfAttnBlock, forward="6816f71c697b"):
    """The same with attention in the middle."""

    _fused_branch = (
        "conv1_1x1", "conv2_kxk", "self_attn", "post_attn", "conv3_1x1", "drop_path",
    )  # fmt: skip


class FusedRepVggBlock(Fused, byobnet.RepVggBlock, forward="476ae3225668"):
    """Two convolutions side by side, and the input where it has their shape; a norm for each."""

    @classmethod
    def _fused_applies(cls, module: Any) -> bool:
        return module.reparam_conv is None

    @classmethod
    def _fused_plans_of(cls, module: Any) -> tuple[Plan, Plan, Plan | None]:
        """Those of the attention, of the sum of the convolutions, and of that and the input."""
        attn = tails.plan_chain((module.attn,))
        act = None if attn.branch else module.act
        convs = (module.conv_1x1,), (module.conv_kxk,)
        if module.identity is None:
            return attn, tails.plan_skip(*convs, act), None
        return attn, tails.plan_skip(*convs, None), tails.plan_skip((module.identity,), (), act)

    @classmethod
    def _fused_plan_of(cls, module: Any) -> Plan:
        return _judged_together(*cls._fused_plans_of(module))

    def forward(self, x: Tensor) -> Tensor:
        if not self._fused_applies(self):
            return super().forward(x)
        attn, convs, both = plans = self._fused_plans_of(self)
        if not self._may_run(_judged_together(*plans), x):
            return super().forward(x)
        out = tails.run_skip(convs, x, add=Tensor.add)
        if both is not None:
            out = tails.run_skip(both, x, self.drop_path(out), add=_add_to_second)
        return self.act(tails.run_chain(attn, out)) if attn.branch else out


def _judged_together(attn: Plan, convs: Plan, both: Plan | None) -> Plan:
    return tails.joined(convs, attn) if both is None else tails.joined(both, convs, attn)


def _add_to_second(x: Tensor, out: Tensor) -> Tensor:
    return out.add_(x)

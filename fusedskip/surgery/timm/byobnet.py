"""timm's "bring your own blocks" networks: ResNets of all kinds, GENet, RepVGG."""

from typing import Any

import torch
from timm.models import byobnet
from torch import Tensor

from fusedskip import tails
from fusedskip.surgery.fused import Fused, FusedSkip
from fusedskip.surgery.timm.layers import FusedOneInput
from fusedskip.tails import Plan


class FusedDownsampleAvg(FusedOneInput, byobnet.DownsampleAvg, forward="301923584166"):
    """A projection after pooling, to which the blocks look through."""

    _fused_children = ("pool", "conv")


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
    def _fused_plans_of(cls, module: Any, under_autocast: bool = False) -> dict[str, Plan]:
        """Of the attention; of the sum of the convolutions, or of what is added one by one."""
        names = ("conv_1x1", "conv_kxk", "drop_path", "attn", "act")
        first, second, drop_path, attn, act = tails.children(module, names)
        plans = {"attn": tails.plan_chain((attn,))}
        last_act = None if plans["attn"].branch else act
        if module.identity is None:
            return plans | {"both": tails.plan_skip((first,), (second,), last_act)}
        plans["drop_path"] = tails.plan_chain((drop_path,))
        # Under autocast the input has another dtype than the sum to which it is added.
        if under_autocast or plans["drop_path"].branch:
            both = tails.plan_skip((first,), (second,), None)
            return plans | {"both": both, "sum": tails.plan_skip((), (), last_act)}
        return plans | {
            "first": tails.plan_skip((first,), (), None),
            "second": tails.plan_skip((second,), (), last_act),
        }

    @classmethod
    def _fused_plan_of(cls, module: Any) -> Plan:
        return _judged_together(cls._fused_plans_of(module))

    def forward(self, x: Tensor) -> Tensor:
        if not self._fused_applies(self) or not isinstance(x, Tensor):
            return super().forward(x)
        plans = self._fused_plans_of(self, torch.is_autocast_enabled(x.device.type))
        if not self._may_run(_judged_together(plans), x):
            return super().forward(x)
        if self.identity is None:
            out = tails.run_skip(plans["both"], x, add=Tensor.add)
        else:
            identity = self.identity(x)
            if "both" in plans:
                out = tails.run_skip(plans["both"], x, add=Tensor.add)
                out = tails.run_chain(plans["drop_path"], out)
                out = tails.run_skip(plans["sum"], out, identity)
            else:
                out = tails.run_skip(plans["first"], x, identity, add=Tensor.add)
                out = tails.run_skip(plans["second"], x, out, add=Tensor.add)
        return self.act(tails.run_chain(plans["attn"], out)) if plans["attn"].branch else out


def _judged_together(plans: dict[str, Plan]) -> Plan:
    *others, last = plans.values()
    return tails.joined(last, *others)

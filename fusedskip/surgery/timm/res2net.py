"""timm's Res2Net and DLA, which takes its block, too."""

from typing import Any

import torch
from timm.models import dla, res2net
from torch import Tensor

from fusedskip import tails
from fusedskip.surgery.fused import Fused, FusedSkip
from fusedskip.tails import Plan


class _FusedScales(FusedSkip):
    """A block whose middle convolutions each see what the one before them gave (Res2Net)."""

    _fused_branch = ("drop_block?", "conv3", "bn3", "se?", "drop_path?")
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
        tail, scales = cls._fused_plans_of(module)
        return tails.joined(tail, *scales)

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


class FusedBottle2neck(_FusedScales, res2net.Bottle2neck, forward="168a6143acc4"):
    """The block of Res2Net."""

    _fused_shortcut = ("downsample?",)

    def forward(self, x: Tensor) -> Tensor:
        plans = self._fused_plans_of(self)
        if self._may_run(tails.joined(plans[0], *plans[1]), x):
            return self._run_scales(*plans, x, x)
        return super().forward(x)


class _FusedDla(FusedSkip):
    """A block whose tree may give it the shortcut."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None, children: Any = None) -> Tensor:
        plan = self._fused_plan(x)
        if plan is not None:
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
        if self._may_run(tails.joined(plans[0], *plans[1]), x):
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

"""timm's layers: norms that bring their own activation, and a convolution with one."""

from typing import Any

from timm.layers.conv_bn_act import ConvNormAct
from timm.layers.drop import DropBlock2d, DropPath
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from timm.models import hgnet
from torch import Tensor, nn

from fusedskip import tails
from fusedskip.modules import apply_norm, is_torchs
from fusedskip.surgery.fused import Fused, FusedChain, know_idle
from fusedskip.tails import Plan


def _drops_nothing(module: Any) -> bool:
    return not module.training or module.drop_prob == 0


know_idle(DropPath, _drops_nothing, forward="b32966c16888")
know_idle(DropBlock2d, _drops_nothing, forward="ab8612db997f")


class _FusedNormAct(Fused):
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
        if plan.branch and self._may_run(plan, x) and not is_torchs(self, x):
            return apply_norm(self, x, None, relu=True)
        return super().forward(x)


class FusedBatchNormAct2d(_FusedNormAct, BatchNormAct2d, forward="aab01662c2e6"):
    """A norm with an activation of its own."""


class FusedFrozenBatchNormAct2d(_FusedNormAct, FrozenBatchNormAct2d, forward="cf7f2995c056"):
    """The same, frozen for good."""


def _is_norm_alone(norm: Any) -> bool:
    return all(type(m) is nn.Identity and tails.is_plain(m) for m in (norm.act, norm.drop))


for _fused in (FusedBatchNormAct2d, FusedFrozenBatchNormAct2d):
    if _fused._fused_changed() is None:
        tails.NORMS[_fused._fused_replaces] = _is_norm_alone
        tails.FORWARDS[_fused._fused_replaces] = _fused._fused_replaces.forward


class FusedOneInput(FusedChain):
    """A chain whose input is called `x`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class FusedConvNormAct(FusedOneInput, ConvNormAct, forward="db6ac5abd927"):
    """Convolution and norm; the norm brings its own activation."""

    _fused_children = ("conv", "bn", "aa?")


class FusedConvBNAct(FusedOneInput, hgnet.ConvBNAct, forward="de6dcb38c2d2"):
    """Convolution, norm, activation and a learnable affine map of HGNet."""

    _fused_children = ("conv", "bn", "act", "lab")

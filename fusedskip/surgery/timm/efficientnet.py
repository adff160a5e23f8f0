"""timm's inverted residuals: MobileNets, MNASNet, EfficientNets. Their sums have no activation."""

from typing import Any

from timm.models import _efficientnet_blocks as blocks

from fusedskip.surgery.fused import FusedSkip


class _FusedResidual(FusedSkip):
    _fused_inplace = False

    @classmethod
    def _fused_applies(cls, module: Any) -> bool:
        # Variants that begin with a space-to-depth convolution are left alone.
        return bool(module.has_skip) and getattr(module, "conv_s2d", None) is None


class FusedDepthwiseSeparableConv(
    _FusedResidual, blocks.DepthwiseSeparableConv, forward="c30157d5e615"
):
    """A depthwise convolution and one of 1x1."""

    _fused_branch = (
        "conv_dw", "bn1", "aa", "se", "conv_pw", "bn2", "drop_path",
    )  # fmt: skip


class FusedInvertedResidual(_FusedResidual, blocks.InvertedResidual, forward="13224c704521"):
    """A depthwise convolution between two of 1x1."""

    _fused_branch = (
        "conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl", "bn3",
        "drop_path",
    )  # fmt: skip


class FusedUniversalInvertedResidual(
    _FusedResidual, blocks.UniversalInvertedResidual, forward="ab6bc80c5d0a"
):
    """The block of MobileNet V4, whose depthwise convolutions stand anywhere."""

    _fused_branch = (
        "dw_start", "pw_exp", "dw_mid", "se", "pw_proj", "dw_end", "layer_scale", "drop_path",
    )  # fmt: skip


class FusedEdgeResidual(_FusedResidual, blocks.EdgeResidual, forward="388cc0472119"):
    """A full convolution and one of 1x1."""

    _fused_branch = ("conv_exp", "bn1", "aa", "se", "conv_pwl", "bn2", "drop_path")

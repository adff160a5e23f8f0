"""What `fuse` makes of transformers' convolutional backbones (5.x)."""

from torch import Tensor
from transformers.models.hgnet_v2 import modeling_hgnet_v2 as hgnet
from transformers.models.regnet import modeling_regnet as regnet
from transformers.models.resnet import modeling_resnet as resnet
from transformers.models.rt_detr import modeling_rt_detr_resnet as rtdetr

from fusedskip.surgery.fused import FusedChain, FusedSkip

_CONV_LAYER = "b8a5ee764a62 527228c80d57"
_SHORT_CUT = "dced3a8f7208"
_LAYER = "cf73c25d27ae"


class _FusedConvLayer(FusedChain):
    _fused_children = ("convolution", "normalization", "activation")

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)


class _FusedShortCut(FusedChain):
    _fused_children = ("convolution", "normalization")


class _FusedLayer(FusedSkip):
    _fused_branch = ("layer",)
    _fused_shortcut = ("shortcut",)
    _fused_act = "activation"

    def forward(self, hidden_state: Tensor) -> Tensor:
        return super().forward(hidden_state)


class FusedResNetConvLayer(_FusedConvLayer, resnet.ResNetConvLayer, forward=_CONV_LAYER):
    """Convolution, norm and activation of ResNet."""


class FusedResNetShortCut(_FusedShortCut, resnet.ResNetShortCut, forward=_SHORT_CUT):
    """The projection of ResNet, to which its layers look through."""


class FusedResNetBasicLayer(_FusedLayer, resnet.ResNetBasicLayer, forward=_LAYER):
    """The block of ResNet-18 and -34."""


class FusedResNetBottleNeckLayer(_FusedLayer, resnet.ResNetBottleNeckLayer, forward=_LAYER):
    """The block of ResNet-50 and up."""


class FusedRegNetConvLayer(_FusedConvLayer, regnet.RegNetConvLayer, forward=_CONV_LAYER):
    """Convolution, norm and activation of RegNet."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        return super().forward(hidden_state)


class FusedRegNetShortCut(_FusedShortCut, regnet.RegNetShortCut, forward=_SHORT_CUT):
    """The projection of RegNet."""


class FusedRegNetXLayer(_FusedLayer, regnet.RegNetXLayer, forward=_LAYER):
    """The block of RegNet X."""


class FusedRegNetYLayer(_FusedLayer, regnet.RegNetYLayer, forward=_LAYER):
    """The block of RegNet Y, with squeeze-and-excitation inside the branch."""


class FusedRTDetrResNetConvLayer(
    _FusedConvLayer, rtdetr.RTDetrResNetConvLayer, forward=_CONV_LAYER
):
    """Convolution, norm and activation of RT-DETR's backbone."""


class FusedRTDetrResNetShortCut(_FusedShortCut, rtdetr.RTDetrResNetShortCut, forward=_SHORT_CUT):
    """The projection of RT-DETR's backbone."""


class FusedRTDetrResNetBasicLayer(_FusedLayer, rtdetr.RTDetrResNetBasicLayer, forward=_LAYER):
    """The block of RT-DETR's small backbones."""


class FusedRTDetrResNetBottleNeckLayer(
    _FusedLayer, rtdetr.RTDetrResNetBottleNeckLayer, forward=_LAYER
):
    """The block of RT-DETR's large backbones."""


class FusedHGNetV2ConvLayer(FusedChain, hgnet.HGNetV2ConvLayer, forward="af686d9ae0a6"):
    """Convolution, norm, activation and a learnable affine map of HGNet V2."""

    _fused_children = ("convolution", "normalization", "activation", "lab")

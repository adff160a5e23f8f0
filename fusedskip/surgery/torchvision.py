"""What `fuse` makes of torchvision's blocks (0.28)."""

from collections import OrderedDict
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import (
    densenet,
    efficientnet,
    mnasnet,
    mobilenetv2,
    mobilenetv3,
    regnet,
    resnet,
)
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import deeplabv3, fcn
from torchvision.models.video import resnet as video_resnet
from torchvision.ops import StochasticDepth, misc

from fusedskip import tails
from fusedskip.surgery.fused import Fused, FusedChain, FusedSkip, know_idle
from fusedskip.surgery.torch import SEQUENTIAL
from fusedskip.tails import Plan

# Functions of these names stand in the way of an import.
googlenet: Any = import_module("torchvision.models.googlenet")
inception: Any = import_module("torchvision.models.inception")


def _keeps_all(module: Any) -> bool:
    return not module.training or module.p == 0


know_idle(StochasticDepth, _keeps_all, forward="6296fa348003")


class FusedBasicBlock(FusedSkip, resnet.BasicBlock, forward="e469bbb0e395"):
    """The block of ResNet-18 and -34."""

    _fused_branch = ("conv1", "bn1", "relu", "conv2", "bn2")
    _fused_shortcut = ("downsample?",)
    _fused_act = "relu"


class FusedBottleneck(FusedSkip, resnet.Bottleneck, forward="ff89db889084"):
    """The block of ResNet-50 and up, ResNeXt and Wide ResNet."""

    _fused_branch = ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3")
    _fused_shortcut = ("downsample?",)
    _fused_act = "relu"


class FusedResNet(Fused, resnet.ResNet, _forward_impl="9c951761811f"):
    """The stem of a ResNet."""

    _fused_children = ("conv1", "bn1", "relu", "maxpool")

    def _forward_impl(self, x: Tensor) -> Tensor:
        plan = self._fused_plan(x)
        if plan is None:
            return super()._forward_impl(x)
        x = tails.run_chain(plan, x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class FusedVideoBasicBlock(FusedSkip, video_resnet.BasicBlock, forward="2c3b56bf0611"):
    """The block of r3d_18, mc3_18 and r2plus1d_18."""

    _fused_branch = ("conv1", "conv2")
    _fused_shortcut = ("downsample?",)
    _fused_act = "relu"


class FusedVideoBottleneck(FusedSkip, video_resnet.Bottleneck, forward="46f43f90ce24"):
    """The bottleneck of video ResNets."""

    _fused_branch = ("conv1", "conv2", "conv3")
    _fused_shortcut = ("downsample?",)
    _fused_act = "relu"


class FusedResBottleneckBlock(FusedSkip, regnet.ResBottleneckBlock, forward="253da56cde00"):
    """The block of RegNet X and Y."""

    _fused_branch = ("f",)
    _fused_shortcut = ("proj?",)
    _fused_act = "activation"
    _fused_inplace = False
    _fused_shortcut_first = True


class FusedInvertedResidual(FusedSkip, mobilenetv2.InvertedResidual, forward="aff6a950f1d0"):
    """The block of MobileNet V2, where it has a skip connection."""

    _fused_branch = ("conv",)
    _fused_inplace = False

    @classmethod
    def _fused_applies(cls, module: Any) -> bool:
        return bool(module.use_res_connect)


class _FusedResConnect(FusedSkip):
    @classmethod
    def _fused_applies(cls, module: Any) -> bool:
        return bool(module.use_res_connect)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class FusedInvertedResidualV3(
    _FusedResConnect, mobilenetv3.InvertedResidual, forward="cc9a83a58e8d"
):
    """The block of MobileNet V3, where it has a skip connection."""

    _fused_branch = ("block",)


class _FusedMBConv(_FusedResConnect):
    _fused_branch = ("block", "stochastic_depth")


class FusedMBConv(_FusedMBConv, efficientnet.MBConv, forward="43f006128f39"):
    """The block of EfficientNet, where it has a skip connection."""


class FusedFusedMBConv(_FusedMBConv, efficientnet.FusedMBConv, forward="43f006128f39"):
    """The block of EfficientNet V2 that begins with a full convolution."""


class FusedMNASInvertedResidual(FusedSkip, mnasnet._InvertedResidual, forward="7fe0d27cbd21"):
    """The block of MNASNet, where it has a skip connection."""

    _fused_branch = ("layers",)
    _fused_inplace = False

    @classmethod
    def _fused_applies(cls, module: Any) -> bool:
        return bool(module.apply_residual)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class FusedIntermediateLayerGetter(Fused, IntermediateLayerGetter, forward="b0287c1eb639"):
    """A backbone that hands out results of its layers: the stem, which it calls child by child."""

    _fused_children = None

    @classmethod
    def _fused_applies(cls, module: Any) -> bool:
        plan = cls._fused_plan_of(module)
        return bool(tails.kernels(plan)) and cls._finds_layers(module, plan)

    @staticmethod
    def _finds_layers(module: Any, plan: Plan) -> bool:
        """Whether what is handed out is called once, and no norm without its ReLU."""
        results = [last if relu is None else relu for last, relu in plan.branch]
        handed_out = [m for name, m in module.items() if name in module.return_layers]
        return all(results.count(m) == 1 for m in handed_out)

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        plan = self._fused_plan(x)
        if plan is None or not self._finds_layers(self, plan):
            return super().forward(x)
        layers = self.return_layers
        names = {module: layers[name] for name, module in self.items() if name in layers}
        out = OrderedDict()
        for last, relu in plan.branch:
            x = tails.run_steps([(last, relu)], x)
            if (result := last if relu is None else relu) in names:
                out[names[result]] = x
        return out


class FusedConv2dNormActivation(FusedChain, misc.Conv2dNormActivation, forward=SEQUENTIAL):
    """Convolution, norm and ReLU."""


class FusedConv3dNormActivation(FusedChain, misc.Conv3dNormActivation, forward=SEQUENTIAL):
    """Convolution, norm and ReLU."""


class FusedSimpleStemIN(FusedChain, regnet.SimpleStemIN, forward=SEQUENTIAL):
    """The stem of RegNet."""


class FusedBottleneckTransform(FusedChain, regnet.BottleneckTransform, forward=SEQUENTIAL):
    """The branch of RegNet's block, to which `FusedResBottleneckBlock` looks through."""


class FusedBasicStem(FusedChain, video_resnet.BasicStem, forward=SEQUENTIAL):
    """The stem of video ResNets."""


class FusedR2Plus1dStem(FusedChain, video_resnet.R2Plus1dStem, forward=SEQUENTIAL):
    """The stem of r2plus1d_18."""


class FusedConv2Plus1D(FusedChain, video_resnet.Conv2Plus1D, forward=SEQUENTIAL):
    """A convolution over space and one over time, with a norm and a ReLU between them."""


class FusedFCNHead(FusedChain, fcn.FCNHead, forward=SEQUENTIAL):
    """The head of FCN."""


class FusedASPPConv(FusedChain, deeplabv3.ASPPConv, forward=SEQUENTIAL):
    """A dilated convolution of DeepLab."""


class FusedDeepLabHead(FusedChain, deeplabv3.DeepLabHead, forward=SEQUENTIAL):
    """The head of DeepLab."""


class FusedDenseLayer(
    Fused,
    densenet._DenseLayer,
    forward="605fb4d99e32",
    bn_function="f45c6b180e94",
    any_requires_grad="6a3c5a712588",
    call_checkpoint_bottleneck="df3f39fdd3bc",
):
    """The layer of DenseNet, whose norms stand ahead of its convolutions."""

    _fused_children = ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2")

    @classmethod
    def _fused_plan_of(cls, module: Any) -> Plan:
        children = tails.children(module, cls._fused_children)
        return tails.joined(tails.plan_chain(children[3:]), tails.plan_chain(children[:3]))

    def bn_function(self, inputs: list[Tensor]) -> Tensor:
        plan = self._fused_plan(inputs[0])
        if plan is None:
            return super().bn_function(inputs)
        (first,) = plan.others
        return tails.run_chain(first, torch.cat(inputs, 1))

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        features = [input] if isinstance(input, Tensor) else input
        plan = self._fused_plan(features[0])
        if plan is None:
            return super().forward(input)
        if self.memory_efficient and self.any_requires_grad(features):
            x = self.call_checkpoint_bottleneck(features)
        else:
            x = self.bn_function(features)
        x = tails.run_chain(plan, x)
        return F.dropout(x, self.drop_rate, self.training) if self.drop_rate > 0 else x


class FusedTransition(FusedChain, densenet._Transition, forward=SEQUENTIAL):
    """What stands between two stages of DenseNet."""


class _FusedBasicConv2d(Fused):
    _fused_children = ("conv", "bn")

    @classmethod
    def _fused_plan_of(cls, module: Any) -> Plan:
        return tails.plan_chain((*tails.children(module, cls._fused_children), tails.RELU))

    def forward(self, x: Tensor) -> Tensor:
        plan = self._fused_plan(x)
        return super().forward(x) if plan is None else tails.run_chain(plan, x)


class FusedGoogLeNetConv2d(_FusedBasicConv2d, googlenet.BasicConv2d, forward="4cc6f0dc8c51"):
    """Convolution, norm and ReLU of GoogLeNet."""


class FusedInceptionConv2d(_FusedBasicConv2d, inception.BasicConv2d, forward="4cc6f0dc8c51"):
    """Convolution, norm and ReLU of Inception V3."""

"""torchvision's ResNets and their blocks."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fusedskip.blocks.forward import chain, skip_connection

NormLayer = Callable[[int], nn.Module]


def _conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, kernel_size=1, stride=stride, bias=False)


def _conv3x3(
    in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    return nn.Conv2d(
        in_planes, out_planes, kernel_size=3, stride=stride,
        padding=dilation, groups=groups, dilation=dilation, bias=False,
    )  # fmt: skip


class BasicBlock(nn.Module):
    """The block of ResNet-18 and -34: two 3x3 convolutions (He et al., 2015, arXiv:1512.03385).

    Constructor, defaults and parameter names are those of `torchvision.models.resnet.BasicBlock`.

    Args:
        inplanes, planes: channels of the input and of the output.
        stride: of the first convolution.
        downsample: applied to the input where the block changes its shape.
        groups, base_width, dilation: 1, 64 and 1; taken so that blocks are interchangeable.
        norm_layer: called with a number of channels; `nn.BatchNorm2d` is what gets fused.

    Raises:
        ValueError: another `groups` or `base_width`; in forward, a residual of another shape.
        NotImplementedError: a `dilation` above 1.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"BasicBlock: expected groups=1 and base_width=64, got {groups} and {base_width}"
            )
        if dilation > 1:
            raise NotImplementedError(f"BasicBlock: expected dilation=1, got {dilation}")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        branch = ("conv1", "bn1", "relu", "conv2", "bn2")
        return skip_connection(self, x, branch, ("downsample?",), "relu")


class Bottleneck(nn.Module):
    """The block of ResNet-50 and up: 1x1, 3x3, 1x1 convolutions, the stride in the 3x3 one (v1.5).

    Constructor, defaults and parameter names are those of `torchvision.models.resnet.Bottleneck`.

    Args:
        inplanes: channels of the input.
        planes: channels of the block's inside at `base_width` 64; the output has `4 * planes`.
        stride, groups, dilation: of the 3x3 convolution.
        downsample: applied to the input where the block changes its shape.
        base_width: width of a group, in 64ths of `planes`.
        norm_layer: called with a number of channels; `nn.BatchNorm2d` is what gets fused.

    Raises:
        ValueError: in forward, a residual of another shape.
    """

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = planes * base_width // 64 * groups
        self.conv1 = _conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = _conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        branch = ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3")
        return skip_connection(self, x, branch, ("downsample?",), "relu")


class ResNet(nn.Module):
    """A residual network for `(N, 3, H, W)` images, built from `BasicBlock` or `Bottleneck`.

    Arguments, parameter names and initialisation are those of `torchvision.models.ResNet`.

    Args:
        block: the class of block.
        layers: blocks in each of the four stages.
        num_classes: width of the final linear layer.
        zero_init_residual: start the last norm of every block at 0 (Goyal et al., 2017,
            arXiv:1706.02677).
        groups, width_per_group: of the 3x3 convolutions.
        replace_stride_with_dilation: for each of the last three stages, dilate instead of striding.
        norm_layer: called with a number of channels.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        dilate = replace_stride_with_dilation or (False, False, False)
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation: expected 3 elements, got {dilate}")
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

        inplanes, dilation = 64, 1

        def stage(planes: int, n_blocks: int, stride: int = 1, dilate: bool = False) -> nn.Module:
            nonlocal inplanes, dilation
            first_dilation = dilation
            if dilate:
                dilation, stride = dilation * stride, 1
            width = planes * block.expansion
            downsample = None
            if stride != 1 or inplanes != width:
                downsample = nn.Sequential(_conv1x1(inplanes, width, stride), norm_layer(width))
            first = block(
                inplanes, planes, stride, downsample,
                groups, width_per_group, first_dilation, norm_layer,
            )  # fmt: skip
            inplanes = width
            rest = (
                block(width, planes, 1, None, groups, width_per_group, dilation, norm_layer)
                for _ in range(1, n_blocks)
            )
            return nn.Sequential(first, *rest)

        self.layer1 = stage(64, layers[0])
        self.layer2 = stage(128, layers[1], 2, dilate[0])
        self.layer3 = stage(256, layers[2], 2, dilate[1])
        self.layer4 = stage(512, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
                if isinstance(last.weight, Tensor):
                    nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = chain(self, x, ("conv1", "bn1", "relu", "maxpool"))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _resnet(
    name: str,
    block: type[BasicBlock] | type[Bottleneck],
    layers: Sequence[int],
    weights: Any,
    progress: bool,
    options: dict[str, Any],
) -> ResNet:
    if weights is None:
        return ResNet(block, layers, **options)
    from torchvision.models import get_model_weights

    weights = get_model_weights(name).verify(weights)
    num_classes = len(weights.meta["categories"])
    if options.setdefault("num_classes", num_classes) != num_classes:
        raise ValueError(
            f"num_classes: expected {num_classes}, which the weights are for, "
            f"got {options['num_classes']}"
        )
    model = ResNet(block, layers, **options)
    model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    return model


def resnet18(*, weights: Any = None, progress: bool = True, **options: Any) -> ResNet:
    """ResNet-18, as `torchvision.models.resnet18` builds it.

    Args:
        weights: torchvision's, such as `"DEFAULT"` or `ResNet18_Weights.IMAGENET1K_V1`, which it
            downloads; None for random ones.
        progress: whether to show that.
        options: go to `ResNet`.

    Raises:
        ImportError: `weights` without torchvision.
        KeyError, TypeError: it has no such weights for this network.
        ValueError: another `num_classes` than that of the weights.
    """
    return _resnet("resnet18", BasicBlock, (2, 2, 2, 2), weights, progress, options)


def resnet34(*, weights: Any = None, progress: bool = True, **options: Any) -> ResNet:
    """ResNet-34; see `resnet18`."""
    return _resnet("resnet34", BasicBlock, (3, 4, 6, 3), weights, progress, options)


def resnet50(*, weights: Any = None, progress: bool = True, **options: Any) -> ResNet:
    """ResNet-50; see `resnet18`."""
    return _resnet("resnet50", Bottleneck, (3, 4, 6, 3), weights, progress, options)


def resnet101(*, weights: Any = None, progress: bool = True, **options: Any) -> ResNet:
    """ResNet-101; see `resnet18`."""
    return _resnet("resnet101", Bottleneck, (3, 4, 23, 3), weights, progress, options)


def resnet152(*, weights: Any = None, progress: bool = True, **options: Any) -> ResNet:
    """ResNet-152; see `resnet18`."""
    return _resnet("resnet152", Bottleneck, (3, 8, 36, 3), weights, progress, options)

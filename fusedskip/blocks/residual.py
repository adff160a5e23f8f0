"""The tutorials' blocks whose skip is added to the branch. Shapes: `(N, C, H, W)`."""

import torch
from torch import Tensor, nn

from fusedskip import functional
from fusedskip.blocks.forward import skip_connection
from fusedskip.checks import check_same_shape
from fusedskip.tails import is_exactly
from fusedskip.tracing import leaf


def _shortcut(in_channels: int, out_channels: int) -> nn.Module:
    if in_channels == out_channels:
        return nn.Identity()
    return nn.Conv2d(in_channels, out_channels, kernel_size=1)


class ResidualBlock(nn.Module):
    """`relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`; padded 3x3 convolutions with bias.

    Args:
        in_channels, out_channels: where they differ, `shortcut` is a 1x1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        branch = ("conv1", "bn1", "relu", "conv2", "bn2")
        return skip_connection(self, x, branch, ("shortcut",), "relu")


class PlainResidualBlock(nn.Module):
    """`conv2(relu(conv1(x))) + shortcut(x)`: no norm, and no ReLU after the sum.

    The tutorial convolves without padding, which takes 4 off height and width, and adds `x` as it
    is, so its shapes never match. Here the 3x3 convolutions are padded by 1, and `shortcut` gives
    `x` the channels of the branch.

    Args:
        in_channels, out_channels: where they differ, `shortcut` is a 1x1 convolution.

    Raises:
        ValueError: in forward, branch and shortcut differ in shape.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.shortcut = _shortcut(in_channels, out_channels)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.conv1(x)))
        residual = self.shortcut(x)
        check_same_shape(residual, out)
        return out + residual  # in place is no faster, and a hook on conv2 may forbid it


class SkipConnection(nn.Module):
    """`x + relu2(conv_layer2(relu(conv_layer1(x))))`, and nothing after the sum.

    The tutorial's 2x2 convolutions with stride 2 and padding 2 map 32x32 to 11x11, so that its own
    example fails at the sum. The defaults here keep the shape, whatever the size of the kernel.

    Args:
        in_channels: channels of the input and of the output.
        hidden_channels: channels between the convolutions; `2 * in_channels` by default.
        kernel_size, stride, padding: of both convolutions.

    Raises:
        ValueError: `padding="same"` with a stride; in forward, convolutions that change the shape
            of `x`, where eager fails deep in an addition or broadcasts.
    """

    def __init__(
        self,
        in_channels: int = 3,
        hidden_channels: int | None = None,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = "same",
    ) -> None:
        super().__init__()
        hidden_channels = 2 * in_channels if hidden_channels is None else hidden_channels
        self.conv_layer1 = nn.Conv2d(in_channels, hidden_channels, kernel_size, stride, padding)
        self.relu = nn.ReLU(inplace=True)
        self.conv_layer2 = nn.Conv2d(hidden_channels, in_channels, kernel_size, stride, padding)
        self.relu2 = nn.ReLU(inplace=True)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_layer2(self.relu(self.conv_layer1(x)))
        fused = is_exactly(nn.ReLU, self.relu2) and out.dtype == x.dtype  # not under autocast
        out = out if fused else self.relu2(out)
        if out.shape != x.shape:
            raise ValueError(
                f"SkipConnection: expected convolutions that keep the shape {tuple(x.shape)} of "
                f"the input, which is added to their result; got {tuple(out.shape)}"
            )
        return functional.relu_add(out, x) if fused else x + out


class SkipConnectionBlock(nn.Module):
    """`relu(conv2(relu(conv1(x))) + skip_projection(x))`; padded 3x3 convolutions, no norm.

    `conv2` and `skip_projection` run without their biases, which are added up and left to the
    kernel of the sum.

    Args:
        in_channels, out_channels: `skip_projection` is a 1x1 convolution, even where they agree.

    Raises:
        ValueError: in forward, branch and projection differ in shape.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.skip_projection = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        conv, projection = self.conv2, self.skip_projection
        bypassable = is_exactly(nn.Conv2d, conv, projection) and is_exactly(nn.ReLU, self.relu)
        # One image alone, (C, H, W), has its channels where the kernel does not look for them.
        if not bypassable or conv.bias is None or projection.bias is None or x.dim() != 4:
            branch = ("conv1", "relu", "conv2")
            return skip_connection(self, x, branch, ("skip_projection",), "relu")
        out = self.relu(self.conv1(x))
        out = conv._conv_forward(out, conv.weight, None)
        residual = projection._conv_forward(x, projection.weight, None)
        check_same_shape(residual, out)
        return functional.bias_add_relu(out, residual, torch.add(conv.bias, projection.bias))

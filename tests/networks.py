"""Small networks of torchvision's blocks, as users have them, and ResNets with fused twins."""

import copy

from torch import nn

import fusedskip

from .libraries import torchvision
from .support import randomise_norms

resnet = torchvision.models.resnet


def skip_network():
    """`(N, 3, H, W)` to `(N, 16, H/2, W/2)`: a stem and two blocks, every kernel of a ResNet."""
    projection = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        resnet.BasicBlock(8, 8),
        resnet.Bottleneck(8, 4, 2, projection),
    )
    randomise_norms(network)
    return network


def twins(make=skip_network, **to):
    """The same network twice: eager, and fused."""
    eager = make().to(**to)
    return eager, fusedskip.fuse(copy.deepcopy(eager))

"""Blocks with fused tails, to import in place of the eager ones.

A block holds plain `torch.nn` children under the usual names, so checkpoints, optimizers and
`convert_sync_batchnorm` see what they know. Its forward fuses what is fusible; where a child that
this would bypass has been replaced or hooked, the children are called as they stand.
"""

from fusedskip.blocks.concat import SkipConnectionBlockConcat, SkipConnectionRNN, SkipSequential
from fusedskip.blocks.residual import (
    PlainResidualBlock,
    ResidualBlock,
    SkipConnection,
    SkipConnectionBlock,
)
from fusedskip.blocks.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "PlainResidualBlock",
    "ResNet",
    "ResidualBlock",
    "SkipConnection",
    "SkipConnectionBlock",
    "SkipConnectionBlockConcat",
    "SkipConnectionRNN",
    "SkipSequential",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]

"""Forward and backward of each block beside its eager twin: the convolutions are in it, too."""

import itertools

import torch
from torch import nn

from benchmarks import runners
from fusedskip import blocks
from tests import eager_blocks
from tests.libraries import torchvision


def downsample(inplanes: int, planes: int) -> nn.Module | None:
    if inplanes == planes:
        return None
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes))


def skip_sequential(module, in_channels: int, out_channels: int) -> nn.Module:
    """Layers beside their input; out_channels are theirs."""
    return module.SkipSequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, padding_mode="reflect"),
        nn.Tanh(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, padding_mode="reflect"),
    )


# How a module that has the block builds it, and the module that has the eager one.
KINDS = {
    "BasicBlock": (
        lambda module, inplanes, planes: module.BasicBlock(
            inplanes, planes, downsample=downsample(inplanes, planes)
        ),
        torchvision.models.resnet,
    ),
    "Bottleneck": (
        lambda module, inplanes, planes: module.Bottleneck(
            inplanes, planes // 4, downsample=downsample(inplanes, planes)
        ),
        torchvision.models.resnet,
    ),
    # For the tutorials' SkipConnection, the second number of channels is that in between.
    **{
        kind: (
            lambda module, *channels, kind=kind: getattr(module, kind)(*channels),
            eager_blocks,
        )
        for kind in (
            "ResidualBlock",
            "PlainResidualBlock",
            "SkipConnection",
            "SkipConnectionBlock",
            "SkipConnectionBlockConcat",
        )
    },
    "SkipSequential": (skip_sequential, eager_blocks),
}

# Channels in and out, plane, and with how large a batch: a tutorial's two blocks, and U-Net's.
SHAPES = {
    "cpu": {
        "3x64x32": 16, "64x128x32": 16, "64x64x64": 4, "256x256x32": 4, "512x512x16": 4,
    },
    "cuda": {"64x128x32": 256, "256x256x32": 64},
}[runners.DEVICE]  # fmt: skip
LAYOUTS, DTYPES = {
    "cpu": (list(runners.LAYOUTS), ["fp32"]),
    "cuda": (["channels_last"], ["bf16"]),
}[runners.DEVICE]


def step(block: nn.Module, x: torch.Tensor, dout: torch.Tensor):
    """A training step; images, of three channels, have no gradient."""
    leaves = [*block.parameters(), *([x] if x.requires_grad else [])]
    return lambda: torch.autograd.grad(block(x), leaves, dout)


NAMES = ("kind", "shape", "layout", "dtype", "runner")
CASES = list(itertools.product(KINDS, SHAPES, LAYOUTS, DTYPES, ("eager", *runners.BACKENDS)))


def usual(kind, shape, layout, dtype, runner) -> bool:
    return (shape, layout) == ("64x128x32", "channels_last")


def bench_block(benchmark, measure, request, kind, shape, layout, dtype, runner):
    in_channels, out_channels, side = map(int, shape.split("x"))
    batch = request.config.getoption("--batch") or SHAPES[shape]
    case = {
        "function": kind,
        "shape": f"{batch}x{in_channels}x{side}x{side} to {out_channels}",
        "layout": layout,
        "dtype": dtype,
        "passes": "both",
    }
    benchmark.group = " ".join(case.values())
    make, twins = KINDS[kind]
    eager, fused = (
        make(module, in_channels, out_channels).to(
            runners.DEVICE, runners.DTYPES[dtype], memory_format=runners.LAYOUTS[layout]
        )
        for module in (twins, blocks)
    )
    fused.load_state_dict(eager.state_dict())
    x = runners.Inputs.random("", (batch, in_channels, side, side), layout, dtype).x
    x = x.requires_grad_(in_channels > 3)
    dout = torch.randn_like(eager(x).detach())
    with runners.using(runner):
        measure(
            step(eager if runner == "eager" else fused, x, dout),
            eager=step(eager, x, dout),
            describe=lambda seconds, eager_seconds, _: {
                **case,
                "runner": runner,
                "ms": 1e3 * seconds,
                "speed": eager_seconds / seconds,
            },
            before=runners.occupy,
        )

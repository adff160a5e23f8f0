"""Training steps and inference of torchvision's models: as they are, compiled, fused, and both."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F

import fusedskip
from benchmarks import runners
from tests.libraries import torchvision

RUNNERS = {
    "eager": lambda model: model,
    "compile": torch.compile,
    "fuse": fusedskip.fuse,
    "fuse+compile": lambda model: torch.compile(fusedskip.fuse(model)),
}
# With how many images, how many pixels wide and high, and in what. On a CPU the activations of a
# few images stay in its caches; those of many do not.
BATCHES, SIDE, LAYOUTS, DTYPE = {
    "cpu": ((8, 32), 128, list(runners.LAYOUTS), "fp32"),
    "cuda": ((128,), 224, ["channels_last"], "bf16"),
}[runners.DEVICE]
RESNETS = ("resnet18", "resnet50")
MODELS = (*RESNETS, "densenet121", "mobilenet_v3_large")
NAMES = ("model", "mode", "batch", "layout", "runner")
CASES = list(itertools.product(MODELS, ("training", "inference"), BATCHES, LAYOUTS, RUNNERS))

pytestmark = pytest.mark.filterwarnings("default")


def usual(model, mode, batch, layout, runner) -> bool:
    """Inductor takes minutes for a ResNet-50 on a CPU; a GPU is for nothing less."""
    compiled = runner in ("compile", "fuse+compile")
    if model not in RESNETS:
        return runners.DEVICE == "cpu" and batch == min(BATCHES) and not compiled
    if runners.DEVICE == "cuda":  # and there half a minute each
        return model == "resnet50" and not (mode == "inference" and compiled)
    is_slow = model == "resnet50" or batch > min(BATCHES)
    return layout == "channels_last" and not (is_slow and compiled)


def training(model: torch.nn.Module, images: torch.Tensor):
    labels = torch.arange(len(images), device=images.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        with autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(model: torch.nn.Module, images: torch.Tensor):
    def step() -> None:
        with torch.no_grad(), autocast():
            model(images)

    return step


def autocast():
    if DTYPE == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(runners.DEVICE, runners.DTYPES[DTYPE])


def bench_model(benchmark, measure, request, model, mode, batch, layout, runner):
    batch = request.config.getoption("--batch") or batch
    shape = f"{batch}x3x{SIDE}x{SIDE}"
    case = {"function": model, "shape": shape, "layout": layout, "dtype": DTYPE, "passes": mode}
    benchmark.group = " ".join(case.values())
    images = torch.randn(batch, 3, SIDE, SIDE, device=runners.DEVICE)
    images = images.contiguous(memory_format=runners.LAYOUTS[layout])
    run, eager = (
        {"training": training, "inference": inference}[mode](
            RUNNERS[r](
                getattr(torchvision.models, model)()
                .to(runners.DEVICE, memory_format=runners.LAYOUTS[layout])
                .train(mode == "training")
            ),
            images,
        )
        for r in (runner, "eager")
    )
    measure(
        run,
        eager,
        describe=lambda seconds, eager_seconds, _: {
            **case,
            "runner": runner,
            "ms": 1e3 * seconds,
            "speed": eager_seconds / seconds,
        },
        before=runners.occupy,
        least_rounds=11,  # most of a step is convolutions, which are the same
    )

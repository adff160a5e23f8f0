"""`python -m fusedskip demo`: one training with eager and with fused blocks, compared.

A small residual network learns scikit-learn's handwritten digits from the same initial weights on
the same batches, in lock-step: with torch's own operations, fused, and as a yardstick with torch's
once more in the other memory layout. That is the same training too, rounded differently: it tells
how far rounding alone drives two loss curves apart.
"""

import argparse
import copy
import importlib.util
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedskip import backends
from fusedskip.blocks import BasicBlock, resnet50
from fusedskip.modules import BatchNormReLU2d

Batch = tuple[Tensor, Tensor]  # images (N, C, H, W), labels (N,)

_BATCH, _LEARNING_RATE = 128, 2e-3
# How much further than the yardstick the fused curve may be from the eager one. Both are draws from
# one noise, which training amplifies by up to 10 in a step: over a dozen seeds, the ratio of either
# to the other peaked between 1.4 and 9.
_SLACK = 30


def add_command(commands: Any) -> None:
    """Add `demo` to the subparsers of `python -m fusedskip`."""
    parser = commands.add_parser("demo", help="train with eager and with fused blocks, and compare")
    parser.add_argument("--steps", type=int, default=66, help="training steps (default: 66)")
    parser.add_argument("--output", type=Path, default=Path("fusedskip-demo.png"), help="the plot")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Train, print the table, write the plot; 1 if the loss curves disagree, 2 if it cannot run."""
    extras = ("matplotlib", "rich", "sklearn")
    if missing := [name for name in extras if importlib.util.find_spec(name) is None]:
        print(f"missing: {', '.join(missing)}; pip install '.[demo]'", file=sys.stderr)
        return 2
    if options.steps < 1 or not os.access(options.output.absolute().parent, os.W_OK):
        print("expected at least one step, and a folder to write --output to", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        _keep_freed_memory()
    torch.manual_seed(options.seed)
    digits = Digits.load(device)
    eager, fused, yardstick = runs = _runs(DigitsResNet().to(device), options.steps)
    _train(runs, digits.batches(options.steps), options.steps)
    comparison = Comparison.of(eager, fused, yardstick)
    _print_table("ResNet-14 on digits", eager, fused, next(digits.batches(1)), digits.test)
    _plot(comparison, options.output)
    print(f"{comparison}\nBoth are drawn in {options.output}.")
    if device == "cuda":
        _time_resnet50()
    return 0 if comparison.agrees else 1


def _keep_freed_memory() -> None:
    """Start this process again with a glibc that keeps freed memory, unless told otherwise.

    By default glibc returns large blocks to the kernel, and the page faults of every fresh output
    then take longer than the kernels that are compared here. It reads the environment only once.
    """
    variables = {"MALLOC_MMAP_THRESHOLD_": "8000000000", "MALLOC_TRIM_THRESHOLD_": "16000000000"}
    if not variables.keys() & os.environ.keys():
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **variables})


class DigitsResNet(nn.Sequential):
    """ResNet-14 for `(N, 1, 32, 32)` images (He et al., 2015, arXiv:1512.03385, section 4.2)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, kernel_size=3, padding=1, bias=False),
            BatchNormReLU2d(16),
            *(BasicBlock(16, 16) for _ in range(2)),
            BasicBlock(16, 32, stride=2, downsample=self._projection(16, 32)),
            BasicBlock(32, 32),
            BasicBlock(32, 64, stride=2, downsample=self._projection(32, 64)),
            BasicBlock(64, 64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    @staticmethod
    def _projection(in_planes: int, out_planes: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(in_planes, out_planes, kernel_size=1, stride=2, bias=False),
            nn.BatchNorm2d(out_planes),
        )


@dataclass(frozen=True)
class Digits:
    """Scikit-learn's handwritten digits, `(N, 1, 32, 32)`; a fifth is for testing."""

    train: Batch
    test: Batch

    @staticmethod
    def load(device: str) -> "Digits":
        """Read, enlarge and shuffle the 1797 images of 8x8."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = torch.randperm(len(digits.target))
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)[order] / 16
        images = F.interpolate(images, size=(32, 32), mode="bilinear").to(device)
        labels = torch.tensor(digits.target)[order].to(device)
        n_test = len(labels) // 5
        return Digits((images[n_test:], labels[n_test:]), (images[:n_test], labels[:n_test]))

    def batches(self, steps: int) -> Iterator[Batch]:
        """The first `steps` batches of epochs that reshuffle and drop what fills no batch."""
        images, labels = self.train
        order: list[Tensor] = []
        for _ in range(steps):
            if not order:
                order = list(torch.randperm(len(labels)).split(_BATCH))[: len(labels) // _BATCH]
            chosen = order.pop()
            yield images[chosen], labels[chosen]


@dataclass
class Run:
    """One training: a model on a backend in a memory layout, and what was observed."""

    name: str
    backend: str
    layout: torch.memory_format
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy of one batch."""
        images = images.contiguous(memory_format=self.layout)
        with backends.use_backend(self.backend):
            return F.cross_entropy(self.model(images), labels)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train on one batch."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(images, labels)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        if images.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images that the model gets right in evaluation mode."""
        self.model.eval()
        with torch.no_grad(), backends.use_backend(self.backend):
            right = self.model(images).argmax(1) == labels
        self.model.train()
        return float(right.double().mean())

    def memory(self, images: Tensor, labels: Tensor) -> int:
        """Bytes that a step takes: at its peak on a GPU, kept for the backward pass on a CPU."""
        if images.is_cuda:
            self.optimizer.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.loss(images, labels).backward()
            return torch.cuda.max_memory_allocated() - before
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss(images, labels)
        del loss  # its graph held every storage until here, so no address was counted twice
        parameters = {parameter.data_ptr() for parameter in self.model.parameters()}
        return sum(size for address, size in kept.items() if address not in parameters)


def _runs(model: nn.Module, steps: int) -> list[Run]:
    """Eager, fused and the yardstick, each with a copy of `model`."""

    def run(name: str, backend: str, layout: torch.memory_format) -> Run:
        twin: nn.Module = copy.deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(twin.parameters(), _LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, steps)
        return Run(name, backend, layout, twin, optimizer, schedule)

    fused = backends.select(next(model.parameters()))
    return [
        run("eager", "eager", torch.channels_last),
        run(f"fused ({fused})", fused, torch.channels_last),
        run("eager, contiguous", "eager", torch.contiguous_format),
    ]


def _train(runs: list[Run], batches: Iterable[Batch], steps: int) -> None:
    """Train in lock-step, taking turns at going first: what disturbs the clock disturbs all."""
    from rich.progress import track

    for images, labels in track(batches, "training", total=steps):
        for run in runs:
            run.step(images, labels)
        runs = [*runs[1:], runs[0]]


@dataclass(frozen=True)
class Comparison:
    """The loss curves of eager, fused, and the yardstick (eager in the other memory layout)."""

    eager: Tensor
    fused: Tensor
    yardstick: Tensor

    @staticmethod
    def of(*runs: Run) -> "Comparison":
        """The curves of these three runs."""
        return Comparison(*(torch.tensor(run.losses, dtype=torch.float64) for run in runs))

    @property
    def agrees(self) -> bool:
        """Whether up to no step fused has moved `_SLACK` times as far from eager as the yardstick.

        That is tight in the first steps, where rounding is all there is, and as loose at the end as
        rounding, amplified by training, makes two curves of the very same computation. Where the
        yardstick has not moved at all, a few roundings of the loss are allowed.
        """
        rounding = 8 * torch.finfo(torch.float32).eps * float(self.eager[0])
        allowed = _SLACK * _furthest(self.eager, self.yardstick).clamp_min(rounding)
        return bool((_furthest(self.eager, self.fused) <= allowed).all())

    def __str__(self) -> str:
        difference = _furthest(self.eager, self.fused)
        yardstick = _furthest(self.eager, self.yardstick)
        relative = (self.fused - self.eager).norm() / self.eager.norm()
        return (
            f"The loss curves {'agree' if self.agrees else 'DISAGREE'}. They differ by "
            f"{difference[0]:.1e} in the first step, by {difference[-1]:.1e} at most, in norm by "
            f"{relative:.1e} of their own.\nRounding alone, measured as eager in the other memory "
            f"layout, makes a difference of {yardstick[-1]:.1e} at most; {_SLACK} times what it "
            "makes up to a step is allowed there."
        )


def _furthest(curve: Tensor, other: Tensor) -> Tensor:
    """The largest difference of two curves up to each step."""
    return (curve - other).abs().cummax(0).values


def _print_table(title: str, eager: Run, fused: Run, batch: Batch, test: Batch | None) -> None:
    from rich.console import Console
    from rich.table import Table

    def add_row(label: str, text: str, measure: Callable[[Run], float]) -> None:
        table.add_row(label, text.format(measure(eager)), text.format(measure(fused)))

    table = Table("", eager.name, fused.name, title=title)
    add_row("final loss", "{:.4f}", lambda run: run.losses[-1])
    if test is not None:
        add_row("test accuracy", "{:.1%}", lambda run: run.accuracy(*test))
    add_row("median step", "{:.1f} ms", lambda run: 1e3 * statistics.median(run.seconds))
    speed = statistics.median(eager.seconds) / statistics.median(fused.seconds)
    table.add_row("speed", "1", f"{speed:.2f}")
    memory = "peak memory" if batch[0].is_cuda else "kept for backward"
    add_row(memory, "{:.1f} MB", lambda run: run.memory(*batch) / 1e6)
    Console().print(table)


def _plot(curves: Comparison, output: Path) -> None:
    """Draw both loss curves, and below them what separates them, beside the yardstick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    losses, differences = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    losses.plot(curves.eager, label="eager", linewidth=3, alpha=0.5)
    losses.plot(curves.fused, label="fused", linewidth=1)
    losses.set_ylabel("training loss")
    losses.legend()
    differences.semilogy(_furthest(curves.eager, curves.yardstick), ":", label="other layout")
    differences.semilogy(_furthest(curves.eager, curves.fused), label="fused")
    differences.set(xlabel="step", ylabel="largest difference\nfrom eager so far")
    differences.legend()
    figure.savefig(output, dpi=150)


def _time_resnet50() -> None:
    """Time training steps of ResNet-50 on synthetic images, in bf16 by autocast."""
    steps = 20
    batch = torch.randn(64, 3, 224, 224, device="cuda"), torch.arange(64, device="cuda")
    eager, fused, _ = _runs(Autocast(resnet50()).cuda(), steps)
    _train([eager, fused], itertools.repeat(batch, steps), steps)
    _print_table("ResNet-50, 64 synthetic images of 224x224, bf16", eager, fused, batch, None)


class Autocast(nn.Sequential):
    """A model whose forward runs in bf16 on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return super().forward(x)

"""Norms whose batch is spread over processes, against one process that has the whole of it.

torchrun starts real processes, which talk over gloo on the loopback device; each runs all of
`distributed_worker.SCENARIOS`, in fp64 unless the name says otherwise.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedskip

from . import distributed_worker as worker
from .libraries import timm

ROOT = Path(__file__).parent.parent


def torchrun(n_ranks, *arguments, **options):
    """Start ranks and wait; a failure shows what they said."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n_ranks),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "localhost",
        *arguments,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FUSEDSKIP_BACKEND": "auto"}
    if torch.cuda.device_count() < n_ranks:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_ranks_are_one_process(n_ranks, tmp_path):
    torchrun(n_ranks, "-m", "tests.distributed_worker", str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(n_ranks)]
    failures = {}
    for name in worker.SCENARIOS:
        results = [rank[name] for rank in ranks]
        try:
            assert not (raised := [r for r in results if isinstance(r, str)]), raised[0]
            check(name, results, ranks)
        except AssertionError as failure:
            failures[name] = failure
    assert not failures, "\n\n".join(f"{name}: {failure}" for name, failure in failures.items())


def check(name, results, ranks):
    """Hold what the ranks made of a scenario against one process."""
    kind, _, variant = name.partition(" ")
    if kind in ("add_relu", "relu"):
        check_norm(results, kind == "add_relu", variant)
    elif name == "evaluation":
        check_norm(results, True, variant, training=False)
    elif name == "group of one":
        for alone in results:
            check_norm([alone], True, variant)
    elif name == "frozen input":
        want = whole_step(torch.float64, has_residual=False)
        for parameter in ("dweight", "dbias"):
            assert_close(sum(rank[parameter] for rank in results), want[parameter])
    elif name == "second derivative":
        assert all(results)
    elif name == "collectives":
        n_channels = worker.N_CHANNELS
        once = {f"all_gather {2 * n_channels + 1}": 1, f"all_reduce {2 * n_channels}": 1}
        assert results == [once] * len(results)
    elif "eager" not in name:
        check_training(name, results, ranks)


def check_norm(results, has_residual, variant, training=True):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(variant, torch.float64)
    options = {"affine": variant != "without affine", "training": training}
    if variant == "momentum=None":
        options["momentum"] = 1.0  # the average over one batch
    want = whole_step(torch.float64, has_residual, **options)
    eager = whole_step(dtype, has_residual, **options)
    for rank in results[1:]:  # bitwise: all ranks merged the same numbers in the same order
        assert torch.equal(rank["running_mean"], results[0]["running_mean"])
        assert torch.equal(rank["running_var"], results[0]["running_var"])
    assert all(rank["num_batches_tracked"] == training for rank in results)
    if not has_residual:
        assert all(rank["dresidual"] is None for rank in results)
    ours = {
        "out": torch.cat([rank["out"] for rank in results]),
        "dx": torch.cat([rank["dx"] for rank in results]),
        "running_mean": results[0]["running_mean"],
        "running_var": results[0]["running_var"],
    }
    if has_residual:
        ours["dresidual"] = torch.cat([rank["dresidual"] for rank in results])
    if options["affine"]:
        ours |= {n: sum(rank[n].double() for rank in results) for n in ("dweight", "dbias")}
    assert ours.keys() == want.keys()
    for name, truth in want.items():
        # Eager has no error against itself in fp64; every rank rounds its part of a sum.
        rounding = 8 * torch.finfo(dtype).eps * truth.abs().max()
        bound = 2 * (eager[name].double() - truth).abs().max() + rounding
        worst = (ours[name].double() - truth).abs().max()
        assert worst <= bound, f"{name}: off by {worst:.3g}, allowed {bound:.3g}"


def whole_step(dtype, has_residual, affine=True, training=True, momentum=0.1):
    """Forward and backward of torch's own norm over the whole batch."""
    norm = worker.norm_of(nn.BatchNorm2d, dtype, affine=affine, momentum=momentum).train(training)
    if not training:
        norm.running_mean.fill_(0.5)
    x, residual, dout = worker.whole_batch(torch.float64)
    x, residual = (t.to(dtype).requires_grad_() for t in (x, residual))
    pre = norm(x) + residual if has_residual else norm(x)
    out = F.relu(pre)
    out.backward(dout.to(dtype))
    results = {"out": out.detach(), "dx": x.grad}
    if has_residual:
        results["dresidual"] = residual.grad
    gradients = {f"d{name}": parameter.grad for name, parameter in norm.named_parameters()}
    buffers = {"running_mean": norm.running_mean, "running_var": norm.running_var}
    return {**results, **gradients, **buffers}


def check_training(name, results, ranks):
    """Two steps: a synchronised model's are those of one process, another's those of eager mode."""
    kind = name.split()[0]
    if "fused" in name:
        want = [rank[f"{kind} eager"] for rank in ranks]
    else:
        accumulate = 2 if "no_sync" in name else 1
        want = [worker.train(worker.network(), accumulate, world=1)] * len(results)
    for ours, theirs in zip(results, want, strict=True):
        assert ours.keys() == theirs.keys()
        for parameter, value in theirs.items():
            assert_close(ours[parameter], value, msg=lambda text, p=parameter: f"{p}: {text}")


def assert_close(ours, theirs, **options):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, **options)


def test_without_a_process_group():
    """As nn.SyncBatchNorm: the statistics are those of the one process."""
    norm = worker.norm_of(fusedskip.SyncBatchNormAddReLU)
    check_norm([worker.step(norm, *worker.whole_batch())], True, "")


def test_one_dimension_is_refused():
    with pytest.raises(ValueError, match="expected at least 2D input"):
        fusedskip.SyncBatchNorm(3)(torch.ones(3))


def test_conversion_keeps_what_is_fused():
    model = nn.Sequential(
        nn.BatchNorm1d(3), fusedskip.BatchNormReLU2d(4, eps=1e-3), fusedskip.BatchNormAddReLU3d(5)
    ).eval()
    state = model.state_dict()
    group = object()
    converted = fusedskip.convert_sync_batchnorm(model, group)
    assert [type(norm) for norm in converted] == [
        fusedskip.SyncBatchNorm,
        fusedskip.SyncBatchNormReLU,
        fusedskip.SyncBatchNormAddReLU,
    ]
    assert all(norm.process_group is group and not norm.training for norm in converted)
    assert converted[1].eps == 1e-3
    torch.testing.assert_close(converted.state_dict(), state)
    alone = fusedskip.convert_sync_batchnorm(fusedskip.BatchNormReLU1d(3))
    assert type(alone) is fusedskip.SyncBatchNormReLU


def test_conversion_of_a_norm_that_is_more_than_one():
    """timm's has an activation, which torch's conversion leaves out; timm's own keeps it."""
    model = nn.Sequential(nn.BatchNorm2d(3), timm.layers.BatchNormAct2d(3))
    for fused in (False, True):
        with pytest.raises(ValueError, match=r"1: a (Fused)?BatchNormAct2d may do more"):
            fusedskip.convert_sync_batchnorm(fusedskip.fuse(model) if fused else model)
        assert type(model[0]) is nn.BatchNorm2d
    fusedskip.unfuse(model)
    model[1] = timm.layers.convert_sync_batchnorm(model[1])
    fusedskip.convert_sync_batchnorm(model)
    assert [type(norm) for norm in model] == [
        fusedskip.SyncBatchNorm, timm.layers.SyncBatchNormAct
    ]  # fmt: skip


def test_conversion_keeps_hooks_and_shared_norms():
    norm, seen = nn.BatchNorm2d(3), []
    norm.register_forward_hook(lambda *_: seen.append(1))
    model = nn.Sequential(norm, nn.Sequential(norm))
    fusedskip.convert_sync_batchnorm(model)
    assert model[0] is model[1][0] is norm
    model(torch.randn(2, 3, 4, 4))
    assert len(seen) == 2


def test_distributed_tensors_run_eagerly():
    """DTensor has rules for torch's own operators alone."""
    code = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor
import fusedskip
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
eager = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
fused = fusedskip.fuse(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
x = distribute_tensor(torch.randn(2, 3, 5, 5), mesh, [Replicate()])
try:
    out = distribute_module(eager, mesh)(x)
except NotImplementedError:
    pass  # torch 2.11 has no rule for a batch norm
else:
    assert torch.equal(distribute_module(fused, mesh)(x).full_tensor(), out.full_tensor())
total = fusedskip.add_relu(x, x).full_tensor()
assert torch.equal(total, (2 * x.full_tensor()).relu())
compiled = torch.compile(fusedskip.add_relu, backend="aot_eager", fullgraph=True)
assert torch.equal(compiled(x, x).full_tensor(), total)
dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("fusedskip runs eagerly on distributed tensors") == 1


def test_example():
    printed = torchrun(2, "examples/train_ddp.py", "--epochs", "1", "--images", "128")
    assert "epoch 1" in printed

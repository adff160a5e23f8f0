"""One rank of tests/test_distributed.py: runs every scenario and saves what became of it.

torchrun --nproc-per-node 2 -m tests.distributed_worker FOLDER
"""

import sys
import traceback
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fusedskip
from fusedskip import distributed

from .networks import skip_network
from .support import lay_out

# Images a rank, by the number of ranks: uneven, and one rank without any.
UNEVEN = {2: (5, 1), 3: (4, 0, 2)}
N_CHANNELS = 5


def whole_batch(dtype=torch.float64, layout="contiguous"):
    """x, residual and dout: the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    shape = (sum(UNEVEN[2]), N_CHANNELS, 3, 4)
    tensors = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return [lay_out(tensor.to(dtype), layout) for tensor in tensors]


def norm_of(kind, dtype=torch.float64, **options):
    norm = kind(N_CHANNELS, **options).to(dtype)
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-1, 1.5, N_CHANNELS))
            norm.bias.copy_(torch.linspace(-0.5, 0.5, N_CHANNELS))
    return norm


def mine(tensor):
    """This rank's part of a whole batch."""
    sizes = UNEVEN[dist.get_world_size()]
    return tensor.split(sizes)[dist.get_rank()]


def step(norm, x, residual, dout):
    """Forward and backward: every result by name."""
    leaves = [t.detach().requires_grad_() for t in (x, residual)]
    with_residual = isinstance(norm, fusedskip.SyncBatchNormAddReLU)
    out = norm(*leaves) if with_residual else norm(leaves[0])
    out.backward(dout)
    results = {"out": out.detach(), "dx": leaves[0].grad, "dresidual": leaves[1].grad}
    return {
        **results,
        **{f"d{name}": parameter.grad for name, parameter in norm.named_parameters()},
        **dict(norm.named_buffers()),
    }


def sync_batch_norm_add_relu(dtype=torch.float64, layout="contiguous", **options):
    norm = norm_of(fusedskip.SyncBatchNormAddReLU, dtype, **options)
    return step(norm, *map(mine, whole_batch(dtype, layout)))


def sync_batch_norm_relu(layout):
    norm = norm_of(fusedskip.SyncBatchNormReLU)
    return step(norm, *map(mine, whole_batch(layout=layout)))


def strided_parameters():
    """Every other element of a vector twice as long: kernels take none such."""
    norm = norm_of(fusedskip.SyncBatchNormAddReLU)
    for parameter in norm.parameters():
        parameter.data = torch.stack([parameter.data] * 2, dim=1)[:, 0]
        assert not parameter.is_contiguous()
    return step(norm, *map(mine, whole_batch()))


def offloaded():
    """What is saved of channels-last tensors comes back contiguous, as from pinned memory."""
    hooks = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda t: t)
    with hooks:
        return sync_batch_norm_add_relu(layout="channels_last")


def eager_stages():
    with fusedskip.use_backend("eager"):
        return sync_batch_norm_add_relu()


def collectives():
    """What is communicated, by operation and number of elements."""
    calls = Counter()

    def counting(operation, function):
        def call(*tensors, **options):
            calls[f"{operation} {tensors[-1].numel()}"] += 1
            return function(*tensors, **options)

        return call

    gather, reduce = distributed._all_gather, dist.all_reduce
    try:
        distributed._all_gather = counting("all_gather", gather)
        dist.all_reduce = counting("all_reduce", reduce)
        sync_batch_norm_add_relu()
    finally:
        distributed._all_gather, dist.all_reduce = gather, reduce
    return dict(calls)


def evaluation():
    norm = norm_of(fusedskip.SyncBatchNormAddReLU).eval()
    norm.running_mean.fill_(0.5)
    return step(norm, *map(mine, whole_batch()))


def group_of_one():
    """A process group of this rank alone: the statistics are those of its own batch."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    own = groups[dist.get_rank()]
    norm = norm_of(fusedskip.SyncBatchNormAddReLU, process_group=own)
    return step(norm, *whole_batch())


def frozen_input():
    """Nothing needs the gradient of x: backward has nothing to communicate."""
    norm = norm_of(fusedskip.SyncBatchNormReLU)
    x, _, dout = map(mine, whole_batch())
    norm(x).backward(dout)
    return {"dweight": norm.weight.grad, "dbias": norm.bias.grad}


def second_derivative():
    """Refused, also where the gradient is a constant and nothing would miss its terms."""
    norm = norm_of(fusedskip.SyncBatchNormReLU)
    x, _, dout = map(mine, whole_batch())
    loss = (norm(x.requires_grad_()) * dout).sum()
    try:
        torch.autograd.grad(loss, x, create_graph=True)
    except RuntimeError as error:
        return str(error) == "fusedskip: a synchronised norm cannot be differentiated twice"
    return False


def images():
    return torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(2)).double()


def train(model, accumulate=1, world=None, average=False):
    """Two steps of SGD, each over `accumulate` parts of the images; the state after them.

    A part is divided among the ranks; `average` their gradients where nothing else does.
    """
    rank = 0 if world == 1 else dist.get_rank()
    world = world or dist.get_world_size()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        for index, part in enumerate(images().chunk(accumulate)):
            last = index == accumulate - 1
            waits = hasattr(model, "no_sync") and not last
            with model.no_sync() if waits else nullcontext():
                loss = model(part.chunk(world)[rank]).square().mean()
                (loss / accumulate).backward()
        for parameter in model.parameters() if average else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        optimizer.step()
    return {name.removeprefix("module."): t for name, t in model.state_dict().items()}


def network():
    torch.manual_seed(0)
    return skip_network().double()


def ddp_synchronised(accumulate=1):
    model = fusedskip.fuse(fusedskip.convert_sync_batchnorm(network()), strict=True)
    return train(DistributedDataParallel(model), accumulate=accumulate)


def ddp_fused():
    return train(DistributedDataParallel(fusedskip.fuse(network(), strict=True)))


def ddp_eager():
    return train(DistributedDataParallel(network()))


def fsdp(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model[3:]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    state = train(model)
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}


def fsdp_fused():
    return fsdp(fusedskip.fuse(network(), strict=True))


def fsdp_eager():
    return fsdp(network())


def fsdp_synchronised():
    return fsdp(fusedskip.fuse(fusedskip.convert_sync_batchnorm(network()), strict=True))


def compiled():
    norm = norm_of(fusedskip.SyncBatchNormAddReLU)
    norm.compile(backend="aot_eager", fullgraph=True)
    return step(norm, *map(mine, whole_batch()))


def converted_by_torch():
    """torch's own conversion of a fused model: its blocks hold plain norms."""
    model = fusedskip.fuse(network(), strict=True)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return train(model, average=True)  # DistributedDataParallel refuses these norms on CPUs


SCENARIOS = {
    "add_relu": sync_batch_norm_add_relu,
    "add_relu channels_last": lambda: sync_batch_norm_add_relu(layout="channels_last"),
    "add_relu without affine": lambda: sync_batch_norm_add_relu(affine=False),
    "add_relu momentum=None": lambda: sync_batch_norm_add_relu(momentum=None),
    "add_relu fp32": lambda: sync_batch_norm_add_relu(torch.float32),
    "add_relu bf16": lambda: sync_batch_norm_add_relu(torch.bfloat16, "channels_last"),
    "add_relu offloaded": offloaded,
    "add_relu eager": eager_stages,
    "add_relu strided parameters": strided_parameters,
    "add_relu compiled": compiled,
    "relu": lambda: sync_batch_norm_relu("contiguous"),
    "relu channels_last": lambda: sync_batch_norm_relu("channels_last"),
    "collectives": collectives,
    "evaluation": evaluation,
    "group of one": group_of_one,
    "frozen input": frozen_input,
    "second derivative": second_derivative,
    "ddp synchronised": ddp_synchronised,
    "ddp synchronised, no_sync": lambda: ddp_synchronised(accumulate=2),
    "converted by torch": converted_by_torch,
    "ddp fused": ddp_fused,
    "ddp eager": ddp_eager,
    "fsdp synchronised": fsdp_synchronised,
    "fsdp fused": fsdp_fused,
    "fsdp eager": fsdp_eager,
}


def main(folder):
    dist.init_process_group("gloo")
    results = {}
    for name, scenario in SCENARIOS.items():
        try:
            results[name] = scenario()
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, Path(folder) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

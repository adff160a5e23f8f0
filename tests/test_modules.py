"""The modules against nn.BatchNorm*d followed by add and ReLU, through training and evaluation."""

import copy
import inspect
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

import fusedskip

from .support import lay_out

SHAPES = {1: (5, 6, 7), 2: (5, 6, 3, 4), 3: (3, 6, 2, 3, 4)}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
KINDS = list(itertools.product(("BatchNormReLU", "BatchNormAddReLU"), (1, 2, 3)))
OPTIONS = (
    {},
    {"momentum": None},
    {"momentum": 0.0},
    {"affine": False},
    {"track_running_stats": False},
    {"eps": 1e-2, "momentum": 0.3},
    *([{"bias": False}] if "bias" in inspect.signature(nn.BatchNorm2d).parameters else []),
)


class Eager(nn.Module):
    """The same, with the norm as nn has it."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, residual=None):
        out = self.norm(x)
        return (out if residual is None else out + residual).relu()


def make_pair(kind, dims, dtype=torch.float64, **options):
    fused = getattr(fusedskip, f"{kind}{dims}d")(6, dtype=dtype, **options)
    if fused.affine:
        nn.init.uniform_(fused.weight, -1.5, 1.5)
        if fused.bias is not None:
            nn.init.uniform_(fused.bias, -1, 1)
    norm = NORMS[dims](6, dtype=dtype, **options)
    norm.load_state_dict(fused.state_dict())
    return fused, Eager(norm)


def inputs_for(kind, shape, layout="contiguous"):
    n = 1 + (kind == "BatchNormAddReLU")
    return [lay_out(torch.randn(shape, dtype=torch.float64), layout) for _ in range(n)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("kind", "dims"), KINDS)
def test_three_steps_then_eval(backend, device, kind, dims, options):
    fused, eager = (m.to(device) for m in make_pair(kind, dims, **options))
    for step, layout in itertools.product(range(4), ("contiguous", "channels_last")):
        if step == 3:
            fused.eval()
            eager.eval()
        inputs = [t.to(device) for t in inputs_for(kind, SHAPES[dims], layout)]
        outs, grads = [], []
        for model in (fused, eager):
            leaves = [t.clone().requires_grad_() for t in inputs]
            out = model(*leaves)
            grads.append(torch.autograd.grad(out.square().sum(), [*leaves, *model.parameters()]))
            outs.append(out)
        torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
        ours, theirs = fused.state_dict(), eager.norm.state_dict()
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_are_the_batch_norms_of_torch(dims):
    for kind in ("BatchNormReLU", "BatchNormAddReLU"):
        module = getattr(fusedskip, f"{kind}{dims}d")(6, eps=1e-3, momentum=0.2)
        assert isinstance(module, NORMS[dims])
        assert module.state_dict().keys() == NORMS[dims](6).state_dict().keys()
        assert repr(module) == repr(NORMS[dims](6, eps=1e-3, momentum=0.2)).replace(
            "BatchNorm", kind
        )


def test_two_dimensional_input_to_1d(backend, device):
    fused, eager = (m.to(device) for m in make_pair("BatchNormReLU", 1))
    x = torch.randn(9, 6, dtype=torch.float64, device=device)
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "dims"), KINDS)
def test_copies(kind, dims):
    """deepcopy, pickle, torch.save of the whole and of the state: the same module again."""
    fused, eager = make_pair(kind, dims)
    inputs = inputs_for(kind, SHAPES[dims])
    fused(*inputs)
    stream = io.BytesIO()
    torch.save(fused, stream)
    stream.seek(0)
    reloaded = getattr(fusedskip, f"{kind}{dims}d")(6, dtype=torch.float64)
    reloaded.load_state_dict(fused.state_dict())
    copies = (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(stream, weights_only=False),
        reloaded,
    )
    want = fused(*inputs)
    for other in copies:
        assert type(other) is type(fused)
        assert torch.equal(other(*inputs), want)
        for name, value in fused.state_dict().items():
            assert torch.equal(other.state_dict()[name], value)
    eager.norm.load_state_dict(fused.state_dict())
    torch.testing.assert_close(eager.eval()(*inputs), fused.eval()(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_refused_input_counts_nothing(dims):
    module = getattr(fusedskip, f"BatchNormAddReLU{dims}d")(6)
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(SHAPES[dims])
    bad = (
        (torch.randn(2, 6, 2, 2, 2, 2), torch.randn(2, 6, 2, 2, 2, 2)),  # one dimension too many
        (x, x[:1]),
        (x.int(), x.int()),
        (torch.randn(1, 6, *[1] * dims), torch.randn(1, 6, *[1] * dims)),  # one value a channel
    )
    for x, residual in bad:
        with pytest.raises((ValueError, TypeError)):
            module(x, residual)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


def test_add_relu(backend, device):
    x, residual = torch.randn(2, 3, 4, 5, 6, device=device).unbind(0)
    module = fusedskip.AddReLU()
    assert torch.equal(module(x, residual), (x + residual).relu())
    assert not module.state_dict()
    assert type(copy.deepcopy(module)) is type(pickle.loads(pickle.dumps(module)))


def test_half_module_and_autocast_like_inputs(backend, device):
    """bf16 activations with fp32 parameters, and everything in bf16, as `.bfloat16()` leaves it."""
    x = torch.randn(4, 6, 5, 5, device=device, dtype=torch.bfloat16)
    for module in (fusedskip.BatchNormReLU2d(6), fusedskip.BatchNormReLU2d(6).bfloat16()):
        out = module.to(device)(x)
        assert out.dtype == torch.bfloat16
        want = nn.functional.batch_norm(x.double(), None, None, training=True).relu()
        # Stored once: half a unit in the last place, and no more.
        assert (out.double() - want).abs().max() <= torch.finfo(out.dtype).eps / 2 * want.max()
        out.sum().backward()
        assert module.weight.grad.dtype == module.weight.dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cumulative_average_in_16_bits(backend, device, dtype):
    """Which hold neither the variance of the last batch nor 70 000 batches."""
    module = fusedskip.BatchNormReLU2d(3, momentum=None, device=device, dtype=dtype)
    eager = nn.BatchNorm2d(3, momentum=None, device=device, dtype=dtype)
    for counted, scale in ((0, 1), (1, 1), (2, 300), (70_000, 1)):
        x = torch.randn(4, 3, 8, 8, device=device).mul(scale).to(dtype)
        for norm in (module, eager):
            norm.num_batches_tracked.fill_(counted)
            norm(x)
        expected = eager.state_dict()
        assert expected["running_var"].isfinite().all()
        torch.testing.assert_close(module.state_dict(), expected)

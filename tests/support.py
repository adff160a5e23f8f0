"""Problems, how they are run, and what their results are held against."""

import inspect
import os
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedskip
from fusedskip import backends, functional

SUMS = ("add_relu", "relu_add", "bias_add_relu")
NORMS = ("batch_norm_relu", "batch_norm_add", "batch_norm_add_relu", "dual_batch_norm_add_relu")
FUNCTIONS = (*SUMS, *NORMS)
CAT = "cat_batch_norm_relu"  # its result has other channels than x
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# `make gpu` asks for those of a GPU: the others are tested everywhere else.
BACKENDS = tuple(os.environ.get("FUSEDSKIP_TEST_BACKENDS", "cpu cuda triton").split())
LAYOUTS = ("contiguous", "channels_last")

# One element to a few blocks, widths on both sides of every vector width, spatial size 1 and odd.
SHAPES = (
    (2, 3),
    (9, 130),
    (4, 5, 7),
    (3, 8, 1, 1),
    (2, 17, 3, 3),
    (1, 1, 5, 5),
    (2, 64, 4, 4),
    (3, 4, 2, 3, 5),
)


def device_of(backend):
    """Where the tensors of a backend live; None where this machine has no such device."""
    if backend == "cpu" or interpreted(backend):
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


def parameter(backend):
    """A backend to test, skipped where it may be missing: without a GPU, or built without nvcc."""
    reason = None
    if device_of(backend) is None:
        reason = "needs a CUDA device"
    elif backend == "cuda":
        reason = backends.unavailable(backend, "cuda")
    mark = pytest.mark.skipif(reason is not None, reason=f"backend {backend}: {reason}")
    return pytest.param(backend, marks=mark)


def interpreted(backend):
    """Whether a backend runs in Triton's interpreter, thousands of times slower than compiled."""
    return backend == "triton" and not torch.cuda.is_available()


def shapes_of(backend):
    """SHAPES. Interpreted, each channel of a channels-first tensor is a program of 3 ms a stage.

    So 64 of them, half of all, are 16, which are whole vectors in two blocks just as well.
    """
    return [(2, 16, 4, 4) if s == (2, 64, 4, 4) and interpreted(backend) else s for s in SHAPES]


def lay_out(tensor, layout):
    if layout == "contiguous" or tensor.dim() < 3:
        return tensor.contiguous()
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


# The tensors of a function, in the order of its arguments.
BUFFERS = ("running_mean", "running_var", "residual_running_mean", "residual_running_var")
LEAVES = ("x", "residual", "skip", "weight", "bias", "residual_weight", "residual_bias")


@dataclass(frozen=True)
class Problem:
    function: str
    dout: torch.Tensor
    tensors: dict  # by argument; None where an optional one is left out
    training: bool = True
    options: dict = field(default_factory=dict)  # momentum, eps

    def __getattr__(self, name):
        if name in LEAVES or name in BUFFERS:
            return self.tensors.get(name)
        raise AttributeError(name)

    @property
    def has_residual(self):
        return "residual" in self.tensors

    @property
    def has_norm(self):
        return self.function in (*NORMS, CAT)

    @property
    def is_dual(self):
        return self.function == "dual_batch_norm_add_relu"

    def leaves(self):
        """What has a gradient, by name, as fresh leaves."""
        tensors = {name: self.tensors.get(name) for name in LEAVES}
        return {n: t.detach().requires_grad_() for n, t in tensors.items() if t is not None}

    def buffers(self):
        """Copies of the running statistics, by name."""
        tensors = {name: self.tensors.get(name) for name in BUFFERS}
        return {n: t.clone() for n, t in tensors.items() if t is not None}

    def replaced(self, **tensors):
        """The same problem with other tensors, `dout` among them."""
        dout = tensors.pop("dout", self.dout)
        return replace(self, dout=dout, tensors=self.tensors | tensors)

    def map(self, function):
        """The same problem, every tensor replaced."""
        tensors = {n: None if t is None else function(t) for n, t in self.tensors.items()}
        return replace(self, dout=function(self.dout), tensors=tensors)

    def double(self):
        """In fp64, and but for what a CPU would take a minute for, on it: one truth everywhere."""
        device = "cpu" if self.x.numel() < 2**22 else self.x.device
        return self.map(lambda tensor: tensor.to(device, torch.float64))


def arguments_of(function):
    """The names of the tensors that a public function takes."""
    names = inspect.signature(getattr(fusedskip, function)).parameters
    return [name for name in names if name in LEAVES or name in BUFFERS]


def make_problem(
    function,
    shape,
    dtype=torch.float32,
    layout="contiguous",
    device="cpu",
    training=True,
    affine=True,
    param_dtype=None,
    **options,
):
    if param_dtype is None:
        param_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    n_skip = 5 if function == CAT else 0

    def activation(n_channels=shape[1]):
        size = (shape[0], n_channels, *shape[2:])
        values = torch.randn(size, dtype=torch.float64, device=device)
        return lay_out(values.to(dtype), layout)

    def make(name):
        if name in ("x", "residual"):
            return activation()
        if name == "skip":
            return activation(n_skip)
        if name.endswith(("weight", "bias")) and not affine and function not in SUMS:
            return None
        kind = name.removeprefix("residual_")
        low, high = {"weight": (-1.5, 1.5), "running_var": (0.5, 2)}.get(kind, (-1, 1))
        values = torch.empty(shape[1], dtype=torch.float64).uniform_(low, high)
        return values.to(device, param_dtype)

    tensors = {name: make(name) for name in arguments_of(function)}
    return Problem(function, activation(n_skip + shape[1]), tensors, training, options)


def call(problem, **tensors):
    """The public function on these tensors in place of the problem's own."""
    function = getattr(fusedskip, problem.function)
    given = {name: tensors.get(name) for name in arguments_of(problem.function)}
    if not problem.has_norm:
        return function(**given)
    return function(**given, training=problem.training, **problem.options)


def run(problem):
    """Forward and backward on the active backend: every result by name."""
    leaves, buffers = problem.leaves(), problem.buffers()
    out = call(problem, **leaves, **buffers)
    out.backward(problem.dout)
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return {"out": out.detach(), **gradients, **buffers}


def oracle(problem, out):
    """The results in fp64 by torch itself, on the CPU, the ReLU's gate being that of `out`.

    Whether an element within rounding error of zero passes is the forward's to say; that forward is
    held against this one. Backward must then agree with the gate it has announced.
    """
    problem = problem.double()
    out = out.to(problem.x.device)
    leaves, buffers = problem.leaves(), problem.buffers()

    def norm(name, prefix=""):
        vectors = [leaves.get(prefix + vector) for vector in ("weight", "bias")]
        running = [buffers.get(prefix + vector) for vector in ("running_mean", "running_var")]
        options = {n: problem.options.get(n) for n in ("momentum", "eps") if n in problem.options}
        options |= {
            n.removeprefix(prefix): v for n, v in problem.options.items() if prefix and prefix in n
        }
        return F.batch_norm(leaves[name], *running, *vectors, problem.training, **options)

    pre = norm("x") if problem.has_norm else leaves["x"]
    if problem.function == "bias_add_relu":
        pre = pre + per_channel_view(leaves["bias"], pre)
    residual = leaves.get("residual")
    if problem.is_dual:
        residual = norm("residual", "residual_")
    if problem.function == CAT:
        skip = leaves["skip"]
        gate = ~(out[:, skip.shape[1] :] <= 0)
        torch.cat([skip, torch.where(gate, pre, 0)], dim=1).backward(problem.dout)
        out = torch.cat([skip, pre.relu()], dim=1)
    elif problem.function == "relu_add":
        gate = ~(pre <= 0)
        out = pre.relu() + residual
        (torch.where(gate, pre, 0) + residual).backward(problem.dout)
    else:
        pre = pre if residual is None else pre + residual
        has_relu = problem.function != "batch_norm_add"
        gate = ~(out <= 0) if has_relu else torch.ones_like(pre, dtype=torch.bool)
        torch.where(gate, pre, 0).backward(problem.dout)
        out = pre.relu() if has_relu else pre
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return {"out": out.detach(), **gradients, **buffers}


def per_channel_view(vector, like):
    """A number a channel, to be broadcast over `like`."""
    return vector.view(-1, *[1] * (like.dim() - 2))


def norm_scales(problem, name, prefix):
    """The terms of one norm of a problem: what it adds to the sum, and its part of the scales."""
    x = problem.tensors[name]
    dout = problem.dout[:, -x.shape[1] :].abs()
    per_channel = [d for d in range(x.dim()) if d != 1]
    weight, bias = (problem.tensors.get(prefix + vector) for vector in ("weight", "bias"))
    if problem.training:
        variance, mean = torch.var_mean(x, per_channel, correction=0)
    else:
        variance, mean = (problem.tensors[prefix + n] for n in ("running_var", "running_mean"))
    rstd = (variance + problem.options.get("eps", 1e-5)).rsqrt()
    scale = per_channel_view(rstd if weight is None else rstd * weight.abs(), x)
    spread = x.abs() + per_channel_view(mean.abs(), x)
    terms = scale * spread
    if bias is not None:
        terms = terms + per_channel_view(bias.abs(), x)
    x_hat = per_channel_view(rstd, x) * spread
    d_x_hat = dout * x_hat
    through_statistics = dout.mean() + x_hat * per_channel_view(d_x_hat.mean(per_channel), x)
    return terms, {
        f"d{name}": (scale * (dout + through_statistics)).max(),
        f"d{prefix}weight": d_x_hat.sum(per_channel).max(),
        f"d{prefix}bias": dout.sum(per_channel).max(),
        f"{prefix}running_mean": x.abs().max(),
        f"{prefix}running_var": x.abs().max() ** 2,
    }


def term_scales(problem):
    """The largest sum of absolute terms behind each result: what its rounding is relative to."""
    problem = problem.double()
    terms, scales = problem.x.abs(), {"dx": 0, "dresidual": 0, "dskip": 0}
    if problem.has_norm:
        terms, of_norm = norm_scales(problem, "x", "")
        scales |= of_norm
    elif problem.function == "bias_add_relu":
        terms = terms + per_channel_view(problem.bias.abs(), terms)
        scales["dbias"] = problem.dout.abs().transpose(0, 1).flatten(1).sum(1).max()
    if problem.is_dual:
        residual, of_norm = norm_scales(problem, "residual", "residual_")
        terms, scales = terms + residual, scales | of_norm
    elif problem.has_residual:
        terms = terms + problem.residual.abs()
    return {"out": terms.max(), **scales}


def assert_as_good_as_eager(problem):
    """|ours - fp64| <= 2 |eager - fp64| + atol, the latter being what no computation can avoid.

    That is one unit in the last place of the largest result, for storing it, and four in statistics
    precision of the terms that are summed to it.
    """
    ours = run(problem)
    with fusedskip.use_backend("eager"):
        eager = run(problem)
    truth, eager_truth = oracle(problem, ours["out"]), oracle(problem, eager["out"])
    device = truth["out"].device
    ours, eager = ({n: t.to(device) for n, t in results.items()} for results in (ours, eager))
    statistics = torch.float64 if problem.x.dtype == torch.float64 else torch.float32
    scales = term_scales(problem)
    assert ours.keys() == truth.keys()
    for name, want in truth.items():
        got = ours[name]
        assert got.dtype == eager[name].dtype, name
        assert got.shape == want.shape, name
        assert torch.isfinite(got).all(), name
        atol = torch.finfo(got.dtype).eps * want.abs().max().item()
        atol += 4 * torch.finfo(statistics).eps * float(scales[name])
        bound = 2 * (eager[name].double() - eager_truth[name]).abs().max().item() + atol
        worst = (got.double() - want).abs().max().item()
        assert worst <= bound, f"{name}: off by {worst:.3g}, allowed {bound:.3g}"


def randomise_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)


def assert_trains_alike(fused, eager, shape, steps=3, rtol=1e-10, device="cpu"):
    """Steps of SGD from the same weights in fp64, then evaluation."""
    fused, eager = fused.double().to(device), eager.double().to(device)
    randomise_norms(eager)
    assert list(fused.state_dict()) == list(eager.state_dict())
    fused.load_state_dict(eager.state_dict())
    models = (fused, eager)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in models]
    for step in range(steps):
        x = torch.randn(shape, dtype=torch.float64, device=device)
        x = lay_out(x, LAYOUTS[step % 2])
        outs, grads = [], []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            out = model(leaf)
            out.square().mean().backward()
            optimizer.step()
            outs.append(out.detach())
            grads.append([leaf.grad] + [p.grad for p in model.parameters()])
        torch.testing.assert_close(*outs, rtol=rtol, atol=rtol)
        for ours, theirs in zip(*grads, strict=True):
            assert (ours - theirs).norm() <= rtol * (1 + theirs.norm())
    ours = fused.state_dict()
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=rtol)
    x = torch.randn(shape, dtype=torch.float64, device=device)
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), eager.eval()(x), rtol=rtol, atol=rtol)


def fused_calls(monkeypatch, module, x):
    """How often one forward calls each function behind the fused operations, by name."""
    calls = Counter()

    def counting(name, function):
        return lambda *args, **kwargs: calls.update([name]) or function(*args, **kwargs)

    names = "_batch_norm", "dual_batch_norm_add_relu", "_add_relu", "bias_add_relu"
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(functional, name, counting(name, getattr(functional, name)))
        module(x)
    return calls

"""Problems, how they are run, and what their results are held against."""

from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F

import fusedskip
from fusedskip import backends

FUNCTIONS = ("add_relu", "batch_norm_relu", "batch_norm_add", "batch_norm_add_relu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "cuda", "triton")
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


def lay_out(tensor, layout):
    if layout == "contiguous" or tensor.dim() < 3:
        return tensor.contiguous()
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


@dataclass(frozen=True)
class Problem:
    function: str
    x: torch.Tensor
    residual: torch.Tensor | None
    dout: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    running_mean: torch.Tensor | None = None
    running_var: torch.Tensor | None = None
    training: bool = True
    options: dict = field(default_factory=dict)  # momentum, eps

    @property
    def has_residual(self):
        return self.function != "batch_norm_relu"

    @property
    def has_norm(self):
        return self.function != "add_relu"

    @property
    def has_relu(self):
        return self.function != "batch_norm_add"

    def leaves(self):
        """What has a gradient, by name, as fresh leaves."""
        tensors = {name: getattr(self, name) for name in ("x", "residual", "weight", "bias")}
        return {n: t.detach().requires_grad_() for n, t in tensors.items() if t is not None}

    def buffers(self):
        """Copies of the running statistics, by name."""
        tensors = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        return {n: t.clone() for n, t in tensors.items() if t is not None}

    def map(self, function):
        """The same problem, every tensor replaced."""
        tensors = {n: v for n, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})

    def double(self):
        """In fp64, on the CPU: the truth is the same one on every machine."""
        return self.map(lambda tensor: tensor.double().cpu())


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
    n_channels = shape[1]
    if param_dtype is None:
        param_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def activation():
        return lay_out(torch.randn(shape, dtype=torch.float64).to(device, dtype), layout)

    def vector(low, high):
        if function == "add_relu":
            return None
        values = torch.empty(n_channels, dtype=torch.float64).uniform_(low, high)
        return values.to(device, param_dtype)

    return Problem(
        function,
        x=activation(),
        residual=None if function == "batch_norm_relu" else activation(),
        dout=activation(),
        weight=vector(-1.5, 1.5) if affine else None,
        bias=vector(-1, 1) if affine else None,
        running_mean=vector(-1, 1),
        running_var=vector(0.5, 2),
        training=training,
        options=options,
    )


def call(problem, x, residual=None, weight=None, bias=None, running_mean=None, running_var=None):
    """The public function on these tensors in place of the problem's own."""
    function = getattr(fusedskip, problem.function)
    if not problem.has_norm:
        return function(x, residual)
    inputs = (x, residual) if problem.has_residual else (x,)
    return function(
        *inputs, running_mean, running_var, weight, bias, problem.training, **problem.options
    )


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
    leaves, buffers = problem.leaves(), problem.buffers()
    pre = leaves["x"]
    if problem.has_norm:
        pre = F.batch_norm(
            pre, buffers.get("running_mean"), buffers.get("running_var"),
            leaves.get("weight"), leaves.get("bias"), problem.training, **problem.options,
        )  # fmt: skip
    if problem.has_residual:
        pre = pre + leaves["residual"]
    gate = ~(out.cpu() <= 0) if problem.has_relu else torch.ones_like(pre, dtype=torch.bool)
    torch.where(gate, pre, 0).backward(problem.dout)
    out = (pre.relu() if problem.has_relu else pre).detach()
    return {"out": out, **{f"d{name}": leaf.grad for name, leaf in leaves.items()}, **buffers}


def term_scales(problem):
    """The largest sum of absolute terms behind each result: what its rounding is relative to."""
    problem = problem.double()
    x, dout = problem.x.abs(), problem.dout.abs()
    if not problem.has_norm:
        return {"out": (x + problem.residual.abs()).max(), "dx": 0, "dresidual": 0}
    per_channel = [d for d in range(x.dim()) if d != 1]

    def wide(vector):
        return vector.view(-1, *[1] * (x.dim() - 2))

    if problem.training:
        variance, mean = torch.var_mean(problem.x, per_channel, correction=0)
    else:
        variance, mean = problem.running_var, problem.running_mean
    rstd = (variance + problem.options.get("eps", 1e-5)).rsqrt()
    scale = rstd if problem.weight is None else rstd * problem.weight.abs()
    terms = wide(scale) * (x + wide(mean.abs()))
    if problem.bias is not None:
        terms = terms + wide(problem.bias.abs())
    if problem.has_residual:
        terms = terms + problem.residual.abs()
    x_hat = wide(rstd) * (x + wide(mean.abs()))
    d_x_hat = dout * x_hat
    return {
        "out": terms.max(),
        "dx": (wide(scale) * (dout + dout.mean() + x_hat * wide(d_x_hat.mean(per_channel)))).max(),
        "dresidual": 0,
        "dweight": d_x_hat.sum(per_channel).max(),
        "dbias": dout.sum(per_channel).max(),
        "running_mean": x.max(),
        "running_var": x.max() ** 2,
    }


def assert_as_good_as_eager(problem):
    """|ours - fp64| <= 2 |eager - fp64| + atol, the latter being what no computation can avoid.

    That is one unit in the last place of the largest result, for storing it, and four in statistics
    precision of the terms that are summed to it.
    """
    ours = run(problem)
    with fusedskip.use_backend("eager"):
        eager = run(problem)
    ours, eager = ({n: t.cpu() for n, t in results.items()} for results in (ours, eager))
    truth, eager_truth = oracle(problem, ours["out"]), oracle(problem, eager["out"])
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

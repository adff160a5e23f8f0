"""Analytic against numerical first and second derivatives in fp64, through the public functions."""

import pytest
import torch

import fusedskip

from .support import CAT, FUNCTIONS, LAYOUTS, NORMS, call, interpreted, make_problem, run


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_gradcheck(backend, device, function, layout, training, affine):
    if interpreted(backend) and not affine:
        pytest.skip("too slow interpreted; test_functional leaves parameters out, too")
    shape = (2, 2, 2, 2) if interpreted(backend) else (2, 3, 2, 3)
    problem = make_problem(function, shape, torch.float64, layout, device, training, affine)
    leaves = problem.leaves()

    def of_leaves(*tensors):
        return call(problem, **dict(zip(leaves, tensors, strict=True)), **problem.buffers())

    # A step across the kink of the ReLU would measure nothing: no element is that close to it.
    assert (of_leaves(*leaves.values()).detach().abs() < 1e-4).sum() == (
        (of_leaves(*leaves.values()) == 0).sum()
    )
    # Interpreted, along one direction instead of every axis, 0.2 s instead of 2: test_functional
    # holds every element of the gradients against fp64.
    assert torch.autograd.gradcheck(
        of_leaves, tuple(leaves.values()), fast_mode=interpreted(backend)
    )
    if not interpreted(backend):  # below the first derivative, no backend has code of its own
        assert torch.autograd.gradgradcheck(of_leaves, tuple(leaves.values()))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_batched_gradients(backend, device, function, training):
    """As `autograd.functional.jacobian(vectorize=True)` asks for them, of frozen norms, too."""
    problem = make_problem(function, (2, 3, 2, 3), torch.float64, device=device, training=training)
    leaves = problem.leaves()
    for name, leaf in leaves.items():
        leaf.requires_grad_(not name.endswith("weight"))
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    douts = torch.stack([problem.dout, -2 * problem.dout])
    batched, single = (
        torch.autograd.grad(
            call(problem, **leaves, **problem.buffers()), wanted, dout, is_grads_batched=batched
        )
        for dout, batched in ((douts, True), (problem.dout, False))
    )
    for both, one in zip(batched, single, strict=True):
        torch.testing.assert_close(both, torch.stack([one, -2 * one]))


def penalised(problem):
    """The gradients of a problem, and those of their squared norm: a gradient penalty."""
    leaves = problem.leaves()
    out = call(problem, **leaves, **problem.buffers())
    grads = torch.autograd.grad(out, list(leaves.values()), problem.dout, create_graph=True)
    sum(grad.square().sum() for grad in grads if grad.requires_grad).backward()
    first = {f"d{name}": grad.detach() for name, grad in zip(leaves, grads, strict=True)}
    return first, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("function", [*NORMS, CAT])
def test_gradient_penalty(backend, device, function, training, dtype, param_dtype):
    """What is penalised are the gradients of the kernels, and its own gradients those of torch."""
    if interpreted(backend) and param_dtype != torch.float64:
        pytest.skip("too slow interpreted; the dtypes are torch's affair, and tested on cpu")
    problem = make_problem(
        function, (3, 9, 5, 3), dtype, "channels_last", device, training, param_dtype=param_dtype
    )
    first, second = penalised(problem)
    for name, value in run(problem).items():
        if name in first:
            eps = torch.finfo(value.dtype).eps
            assert (first[name] - value).abs().max() <= 4 * eps * value.abs().max()
    with fusedskip.use_backend("eager"):
        _, eager = penalised(problem)
        _, truth = penalised(problem.double())
    for name, want in truth.items():
        if name not in second:  # it has no part in the penalty
            assert not want.any(), name
            continue
        assert second[name].dtype == eager[name].dtype
        ours, theirs = ((t[name].cpu().double() - want).norm() for t in (second, eager))
        # fp64 has itself for truth, so that eager is not off at all: hence the eight units.
        assert ours <= 2 * theirs + 8 * torch.finfo(eager[name].dtype).eps * want.norm(), name


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("function", [name for name in (*FUNCTIONS, CAT) if "relu" in name])
def test_what_relu_stops_leaves_no_trace(backend, device, function, training):
    """Inf and NaN included, in a backward pass that is differentiated as in one that is not."""
    problem = make_problem(function, (3, 4, 2, 3), torch.float64, device=device, training=training)
    leaves = problem.leaves()
    out = call(problem, **leaves, **problem.buffers())
    stopped = out == 0
    if function == "relu_add":
        stopped = problem.x <= 0
    assert stopped.any()
    dout = problem.dout.masked_fill(stopped, float("nan"))
    wanted = [leaf for name, leaf in leaves.items() if (function, name) != ("relu_add", "residual")]
    usual = torch.autograd.grad(out, wanted, dout, retain_graph=True)
    differentiated = torch.autograd.grad(out, wanted, dout, create_graph=True)
    for ours, want in zip(differentiated, usual, strict=True):
        assert torch.isfinite(want).all()
        torch.testing.assert_close(ours, want)


def test_residual_alone_is_differentiated(backend, device):
    problem = make_problem("batch_norm_add_relu", (3, 4), torch.float64, device=device)
    residual = problem.residual.requires_grad_()
    out = call(problem, **problem.tensors)
    (dresidual,) = torch.autograd.grad(out.square().sum(), residual, create_graph=True)
    (second,) = torch.autograd.grad(dresidual.sum(), residual)
    torch.testing.assert_close(second, 2 * (out > 0).double())


def test_gradient_of_another_layout_where_a_dimension_is_1(compiled_backend, device):
    """With create_graph: torch's own norm takes such strides for another layout."""
    x = torch.randn(2, 8, 9, 1, dtype=torch.float64, device=device).permute(0, 2, 3, 1)
    residual, dout = torch.randn(2, 2, 9, 1, 8, dtype=torch.float64, device=device)
    residual.requires_grad_()
    gradients = [
        torch.autograd.grad(
            fusedskip.dual_batch_norm_add_relu(
                x, residual, None, None, None, None, training=True
            ),
            residual, dout, create_graph=create_graph,
        )[0]
        for create_graph in (False, True)
    ]  # fmt: skip
    torch.testing.assert_close(*gradients)

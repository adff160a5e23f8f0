"""What autograd sees of a function besides its gradients: as of torch's own operators."""

import pytest
import torch

import fusedskip

from .support import CAT, FUNCTIONS, NORMS, call, make_problem

ALL = (*FUNCTIONS, CAT)
SHAPE = (2, 3, 4, 5)


class Undefined(torch.autograd.Function):
    """The identity, through which no gradient comes."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        return None


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("function", ALL)
def test_undefined_gradient(backend, device, function, create_graph):
    """It is None, not 0, by which an optimizer would decay parameters."""
    problem = make_problem(function, SHAPE, device=device)
    leaves = problem.leaves()
    out = Undefined.apply(call(problem, **leaves, **problem.buffers()))
    gradients = torch.autograd.grad(
        out.sum(), [*leaves.values()], allow_unused=True, create_graph=create_graph
    )
    assert gradients == (None,) * len(leaves)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("function", ALL)
def test_gradient_without_memory(backend, device, function, create_graph):
    """That of torch.sgn is a zero tensor, which no kernel can read."""
    problem = make_problem(function, SHAPE, device=device)
    leaves = problem.leaves()
    out = call(problem, **leaves, **problem.buffers())
    gradients = torch.autograd.grad(
        out.sgn().sum(), [*leaves.values()], allow_unused=True, create_graph=create_graph
    )
    assert any(gradient is not None for gradient in gradients)
    assert not any(gradient.any() for gradient in gradients if gradient is not None)


def test_sparse_gradient_of_a_residual(backend, device):
    """It passes a sum without a ReLU as it is."""
    problem = make_problem("batch_norm_add", SHAPE, device=device)
    residual = problem.residual.clone().requires_grad_()
    first = torch.zeros(2, 3, 4, 1, dtype=torch.long, device=device)
    out = call(problem, **problem.tensors | {"residual": residual})
    out.gather(3, first, sparse_grad=True).sum().backward()
    assert residual.grad.is_sparse
    expected = torch.zeros(SHAPE, device=device).index_fill_(3, first.flatten()[:1], 1)
    torch.testing.assert_close(residual.grad.to_dense(), expected)


def saved_inputs(problem, needed):
    """The arguments that a call keeps for a backward pass, when one of them needs a gradient."""
    tensors = problem.tensors | problem.buffers()
    tensors[needed] = tensors[needed].clone().requires_grad_()
    names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.add(names.get(tensor.data_ptr())) or tensor, lambda tensor: tensor
    ):
        call(problem, **tensors)
    return saved - {None}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("function", ALL)
def test_saves_no_more_than_eager(backend, device, function, training):
    """Its memory, and what may be changed in place before the backward pass.

    But for a bias, by which backward finds out what the ReLU has let through.
    """
    problem = make_problem(function, SHAPE, device=device, training=training)
    recomputes_gate = function in ("batch_norm_relu", CAT)
    for needed in problem.leaves():
        ours = saved_inputs(problem, needed)
        with fusedskip.use_backend("eager"):
            eager = saved_inputs(problem, needed)
        may_save_bias = recomputes_gate and needed not in ("residual", "skip")
        assert ours - eager <= ({"bias"} if may_save_bias else set())


@pytest.mark.parametrize("name", ["x", "weight"])
@pytest.mark.parametrize("function", [*NORMS, CAT])
def test_what_cannot_be_saved(backend, device, function, name):
    """A tensor made in inference mode: as in eager mode, nothing is updated before the error."""
    problem = make_problem(function, SHAPE, device=device)
    buffers = problem.buffers()
    with torch.inference_mode():
        made = problem.tensors[name].clone()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        call(problem, **problem.leaves() | buffers | {name: made})
    assert all(torch.equal(buffers[n], buffer) for n, buffer in problem.buffers().items())
    if name == "weight":
        return
    residual = problem.leaves().get("residual")
    if residual is not None and not problem.is_dual:  # of whose gradient x is no part
        call(problem, **problem.tensors | {"x": made, "residual": residual}).sum().backward()
        assert residual.grad is not None


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("function", ALL)
def test_gradients_enabled_in_inference_mode(backend, device, function, training):
    """They are not recorded there, whatever `enable_grad` says."""
    problem = make_problem(function, SHAPE, device=device, training=training)
    leaves = problem.leaves()
    with torch.inference_mode(), torch.enable_grad():
        out = call(problem, **leaves, **problem.buffers())
    assert out.is_inference()
    assert not out.requires_grad
    torch.testing.assert_close(out.clone(), call(problem, **leaves, **problem.buffers()).detach())

"""Analytic against numerical gradients in fp64, through the public functions."""

import pytest
import torch

from .support import CAT, FUNCTIONS, LAYOUTS, call, interpreted, make_problem


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
    assert torch.autograd.gradcheck(of_leaves, tuple(leaves.values()))

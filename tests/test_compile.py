"""torch.compile traces through without a break; the values are those of eager mode."""

import pytest
import torch

from fusedskip import blocks

from .support import FUNCTIONS, call, make_problem, run


@pytest.fixture(autouse=True)
def reset():
    """Or it would give up on a function that is compiled over and over."""
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_trace_whole(backend, device, function, training):
    problem = make_problem(function, (2, 8, 4, 5), torch.float32, "channels_last", device, training)
    leaves, buffers = problem.leaves(), problem.buffers()
    compiled = torch.compile(
        lambda tensors: call(problem, **tensors), fullgraph=True, backend="aot_eager"
    )
    out = compiled({**leaves, **buffers})
    out.backward(problem.dout)
    want = run(problem)
    results = {"out": out, **{f"d{n}": leaf.grad for n, leaf in leaves.items()}, **buffers}
    for name, value in results.items():
        torch.testing.assert_close(value, want[name])
    assert out.stride() == problem.x.stride()


def test_block_traces_whole(backend, device):
    block = blocks.BasicBlock(6, 6).to(device)
    x = torch.randn(2, 6, 5, 5, device=device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))
    assert block.bn1.num_batches_tracked == 2

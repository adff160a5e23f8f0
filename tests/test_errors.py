"""Bad input: the text of every error, and that nothing was updated before it."""

import re

import pytest
import torch

import fusedskip

from .support import (
    BACKENDS,
    BUFFERS,
    CAT,
    FUNCTIONS,
    LEAVES,
    NORMS,
    arguments_of,
    call,
    make_problem,
)

SHAPE = (2, 3, 4, 5)


def assert_refused(problem, error, text, **replaced):
    """The call raises with this text; running buffers are as they were."""
    buffers = problem.buffers()
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    with pytest.raises(error, match=re.escape(text)):
        call(problem, **{**problem.leaves(), **buffers, **replaced})
    assert all(torch.equal(buffers[name], before[name]) for name in buffers)


def assert_like_x(problem, name):
    """The dtype and the device of an activation must be those of x."""
    text = f"{name}: expected dtype torch.float32 like x, got torch.float64"
    assert_refused(problem, TypeError, text, **{name: torch.ones(SHAPE).double()})
    with torch.autocast("cpu", torch.bfloat16):
        text += f"; autocast converts neither: {name}.to(x.dtype)"
        assert_refused(problem, TypeError, text, **{name: torch.ones(SHAPE).double()})
    text = f"{name}: expected device cpu like x, got meta"
    assert_refused(problem, ValueError, text, **{name: torch.ones(SHAPE, device="meta")})
    text = f"{name}: expected layout torch.strided like x, got torch.sparse_coo"
    assert_refused(problem, TypeError, text, **{name: torch.ones(SHAPE).to_sparse()})
    assert_no_tensor(problem, name)


def assert_no_tensor(problem, name):
    assert_refused(problem, TypeError, f"{name}: expected a tensor, got float", **{name: 1.0})


@pytest.fixture(params=[*BACKENDS, "eager"])
def anywhere(request):
    """The checks stand before the backends; eager refuses what the kernels refuse."""
    with fusedskip.use_backend(request.param):
        yield


pytestmark = pytest.mark.usefixtures("anywhere")


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f != "batch_norm_relu"])
def test_residual(function):
    problem = make_problem(function, SHAPE)
    for shape in ((2, 3, 4, 1), (1, 3, 4, 5), (3, 4, 5), (2, 3, 5, 4)):
        assert_refused(
            problem,
            ValueError,
            f"residual: expected shape (2, 3, 4, 5) like x, got {shape}",
            residual=torch.ones(shape),
        )
    assert_like_x(problem, "residual")


def test_skip():
    """Any number of channels, but else like x."""
    problem = make_problem(CAT, SHAPE)
    for shape in ((3, 3, 4, 5), (2, 3, 5, 4), (2, 3, 4), (2, 3, 4, 5, 1), (2, 3)):
        assert_refused(
            problem,
            ValueError,
            f"skip: expected shape (2, 3, 4, 5) of x but for the channels, got {shape}",
            skip=torch.ones(shape),
        )
    assert_like_x(problem, "skip")


@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_dtype_of_x(function, dtype):
    assert_refused(
        make_problem(function, SHAPE),
        TypeError,
        f"x: expected dtype float64, float32, bfloat16 or float16, got {dtype}",
        x=torch.ones(SHAPE).to(dtype),
    )


@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_x_that_is_no_tensor(function):
    assert_no_tensor(make_problem(function, SHAPE), "x")


@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_sparse_x(function):
    assert_refused(
        make_problem(function, SHAPE),
        TypeError,
        "x: expected a strided tensor, got layout torch.sparse_coo",
        x=torch.empty(SHAPE, layout=torch.sparse_coo),
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_x():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(TypeError, match="x: expected a strided tensor, got layout nested"):
        fusedskip.add_relu(nested, nested)


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("function", [*NORMS, CAT])
def test_too_few_dimensions(function, shape):
    x = torch.ones(shape)
    replaced = {name: x for name in ("x", "residual", "skip") if name in arguments_of(function)}
    text = f"x: expected at least 2 dimensions (N, C, *), got shape {shape}"
    assert_refused(make_problem(function, SHAPE), ValueError, text, **replaced)


@pytest.mark.parametrize("name", [*BUFFERS, *LEAVES[3:]])
@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_channel_vectors(function, name):
    if name not in arguments_of(function):
        return
    problem = make_problem(function, SHAPE)
    for shape in ((4,), (1,), (1, 3), ()):
        assert_refused(
            problem,
            ValueError,
            f"{name}: expected shape (3,) for x of shape (2, 3, 4, 5), got {shape}",
            **{name: torch.ones(shape)},
        )
    assert_refused(
        problem,
        TypeError,
        f"{name}: expected dtype torch.float32 for x of torch.float32, got torch.float64",
        **{name: torch.ones(3).double()},
    )
    assert_refused(
        problem,
        ValueError,
        f"{name}: expected device cpu like x, got meta",
        **{name: torch.ones(3, device="meta")},
    )
    assert_no_tensor(problem, name)
    assert_refused(
        make_problem(function, SHAPE, torch.bfloat16),
        TypeError,
        f"{name}: expected dtype torch.bfloat16 or torch.float32 for x of torch.bfloat16, "
        "got torch.float16",
        **{name: torch.ones(3).half()},
    )


@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize("function", [*NORMS, CAT])
def test_running_statistics_that_require_a_gradient(function, name):
    if name not in arguments_of(function):
        return
    prefix = "residual_" if name.startswith("residual_") else ""
    text = f"{prefix}running_mean, {prefix}running_var: expected tensors that require no gradient"
    for training in (True, False):
        problem = make_problem(function, SHAPE, training=training)
        assert_refused(problem, ValueError, text, **{name: torch.ones(3, requires_grad=True)})


@pytest.mark.parametrize("function", [*NORMS, CAT])
def test_running_statistics(function):
    prefixes = ["", "residual_"] if function == "dual_batch_norm_add_relu" else [""]
    for prefix in prefixes:
        mean, var = f"{prefix}running_mean", f"{prefix}running_var"
        for training in (True, False):
            problem = make_problem(function, SHAPE, training=training)
            text = f"{mean}, {var}: expected both or neither"
            assert_refused(problem, ValueError, text, **{mean: None})
            assert_refused(problem, ValueError, text, **{var: None})
        assert_refused(
            make_problem(function, SHAPE, training=False),
            ValueError,
            f"{mean}, {var}: expected tensors when not training",
            **{mean: None, var: None},
        )


def test_norms_that_share_running_statistics():
    problem = make_problem("dual_batch_norm_add_relu", SHAPE)
    shared = torch.zeros(3)
    for name in ("running_mean", "running_var"):
        text = f"{name}, residual_{name}: expected different tensors"
        replaced = {name: shared, f"residual_{name}": shared}
        assert_refused(problem, ValueError, text, **replaced)


@pytest.mark.parametrize("function", [*NORMS, CAT])
def test_training(function):
    for training in (None, 1):
        problem = make_problem(function, SHAPE, training=training)
        text = f"training: expected a bool, got {type(training).__name__}"
        assert_refused(problem, TypeError, text)


@pytest.mark.parametrize("function", [*NORMS, CAT])
def test_eps(function):
    if function == "dual_batch_norm_add_relu":
        assert_refused(
            make_problem(function, SHAPE, residual_eps=0.0),
            ValueError,
            "residual_eps: expected a positive number when training, got 0.0",
        )
    for eps in (0.0, -1e-5):
        assert_refused(
            make_problem(function, SHAPE, eps=eps),
            ValueError,
            f"eps: expected a positive number when training, got {eps}",
        )
    assert_refused(
        make_problem(function, SHAPE, training=False, eps=-1.0),
        ValueError,
        "eps: expected a number not below 0, got -1.0",
    )


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
@pytest.mark.parametrize("function", [*NORMS, CAT])
def test_one_value_per_channel(function, shape):
    assert_refused(
        make_problem(function, shape),
        ValueError,
        f"Expected more than 1 value per channel when training, got input size {shape}",
    )

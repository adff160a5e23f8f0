"""What eager has and a fused form must keep: NaN and Inf, zeros, statistics, calls out of order."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fusedskip
from fusedskip import backends

from .support import (
    CAT,
    DTYPES,
    FUNCTIONS,
    LAYOUTS,
    NORMS,
    assert_as_good_as_eager,
    call,
    interpreted,
    lay_out,
    make_problem,
    run,
)

# Those that end in a ReLU: where the output is 0 the gate is closed.
RELU_FUNCTIONS = [f for f in FUNCTIONS if f not in ("batch_norm_add", "relu_add")]
SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0)


def eagerly(problem):
    """The results of eager on the CPU: torch's own kernels for GPUs treat Inf each in its way."""
    with fusedskip.use_backend("eager"):
        return run(problem.map(torch.Tensor.cpu))


def assert_same(ours, eager, names=None, **tolerance):
    for name in names or ours:
        got, want = ours[name].cpu(), eager[name]
        torch.testing.assert_close(got, want, equal_nan=True, msg=name, **tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", ["add_relu", "relu_add"])
def test_sums_of_special_values(backend, device, function, dtype, layout):
    """Every pair of special values, forward and backward, bit for bit as torch."""
    pairs = torch.tensor(list(itertools.product(SPECIAL, SPECIAL)), dtype=dtype, device=device)
    problem = make_problem(function, (7, 7, 5, 3), dtype, layout, device)
    problem.dout[::2, :, 0] = float("nan")
    problem.dout[1::2, :, 0] = float("inf")
    problem.x.copy_(pairs[:, 0].view(7, 7, 1, 1).expand(7, 7, 5, 3))
    problem.residual.copy_(pairs[:, 1].view(7, 7, 1, 1).expand(7, 7, 5, 3))
    assert_same(run(problem), eagerly(problem), rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", RELU_FUNCTIONS)
def test_special_gradients_stop_at_a_closed_gate(backend, device, function, dtype, layout):
    """NaN and Inf in dout reach dx and dresidual where the gate is open, and nothing where not."""
    problem = make_problem(function, (3, 4, 5, 7), dtype, layout, device, training=False)
    problem.dout.fill_(float("nan"))
    problem.dout[0] = float("inf")
    ours, eager = run(problem), eagerly(problem)
    closed = ours["out"] == 0
    assert closed.any()
    assert not closed.all()
    for name in ("dx", "dresidual"):
        if name in ours:
            assert torch.all(ours[name][closed] == 0)
            assert not torch.isfinite(ours[name][~closed]).any()
    assert torch.equal(closed.cpu(), eager["out"] == 0)
    assert_same(ours, eager, [n for n in ("dx", "dresidual") if n in ours])


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("function", NORMS)
def test_special_input_to_batch_norm(backend, device, function, value, training):
    """One bad element spoils what it spoils in torch: its channel and its running statistics."""
    for layout in LAYOUTS:
        problem = make_problem(function, (3, 5, 9, 7), torch.float32, layout, device, training)
        problem.x[1, 2, 3, 4] = value
        assert_same(run(problem), eagerly(problem), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", RELU_FUNCTIONS)
def test_no_gradient_at_exactly_zero(backend, device, function):
    """Constant channels: x is its mean, so that without a bias the output is exactly 0."""
    for layout in LAYOUTS:
        problem = make_problem(
            function, (2, 4, 3, 3), torch.float32, layout, device, training=False, affine=False
        )
        if problem.has_norm:
            problem.running_mean.fill_(0.5)
            problem.x.fill_(0.5)
        else:
            problem.x.zero_()
        if problem.has_residual:
            problem.residual.zero_()
            problem.residual[0] = -0.0
        for name in ("bias", "residual_running_mean"):
            if getattr(problem, name) is not None:
                getattr(problem, name).zero_()
        results = run(problem)
        assert torch.all(results["out"] == 0)
        assert torch.all(results["dx"] == 0)
        if problem.has_residual:
            assert torch.all(results["dresidual"] == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", ["add_relu", "batch_norm_relu", "batch_norm_add_relu"])
def test_gate_follows_the_stored_value(backend, device, function, dtype):
    """A quarter of the least subnormal is stored as 0: where the output is 0, nothing passes."""
    numbers = torch.finfo(dtype)
    for layout in LAYOUTS:
        problem = make_problem(
            function, (2, 16, 2, 2), dtype, layout, device, training=False, affine=False
        )
        problem.x.fill_(numbers.smallest_normal * numbers.eps)  # the least subnormal
        if problem.has_residual:
            problem.residual.zero_()
        if problem.has_norm:
            problem.running_mean.zero_()
            # x is scaled by rstd = 1/4 and by 1.
            problem.running_var.fill_(16)
            problem.running_var[::2] = 1
        results = run(problem)
        gradient = results["dresidual" if problem.has_residual else "dx"]
        assert torch.equal(gradient == 0, results["out"] == 0)
        assert torch.any(results["out"] != 0)
        assert torch.any(results["out"] == 0) == problem.has_norm


@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_empty_batch(backend, device, function):
    for layout, training in itertools.product(LAYOUTS, (True, False)):
        problem = make_problem(function, (0, 4, 3, 3), torch.float32, layout, device, training)
        assert_same(run(problem), eagerly(problem), rtol=0, atol=0)


@pytest.mark.parametrize("function", [*NORMS, CAT])
def test_running_statistics(backend, device, function):
    for momentum, layout in itertools.product((0.1, 0.0, 1.0, 0.25), LAYOUTS):
        problem = make_problem(
            function, (4, 5, 3, 3), torch.float64, layout, device, momentum=momentum
        )
        ours = run(problem)
        x = problem.x.transpose(0, 1).flatten(1)
        for name, batch in (("running_mean", x.mean(1)), ("running_var", x.var(1, correction=1))):
            want = (1 - momentum) * getattr(problem, name) + momentum * batch
            torch.testing.assert_close(ours[name], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", NORMS)
def test_eval_leaves_running_statistics_alone(backend, device, function):
    problem = make_problem(function, (4, 5, 3, 3), device=device, training=False)
    results = run(problem)
    assert torch.equal(results["running_mean"], problem.running_mean)
    assert torch.equal(results["running_var"], problem.running_var)


@pytest.mark.parametrize("function", NORMS)
def test_no_running_statistics(backend, device, function):
    problem = make_problem(function, (4, 5, 3, 3), torch.float64, device=device)
    want = run(problem)["out"]
    assert torch.equal(call(problem, **problem.leaves()), want)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_forward_before_first_backward(backend, device, function, training):
    """Statistics belong to the call: a forward in between may move the buffers."""
    problem = make_problem(function, (4, 5, 3, 3), torch.float64, device=device, training=training)
    other = make_problem(function, (4, 5, 3, 3), torch.float64, device=device)
    want = run(problem)
    leaves, buffers = problem.leaves(), problem.buffers()
    out = call(problem, **leaves, **buffers)
    call(other, **other.leaves(), **buffers)
    out.backward(problem.dout)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, want[f"d{name}"])


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("function", ["bias_add_relu", *NORMS[1:]])
def test_a_bias_changed_before_backward(backend, device, function, training):
    """No gradient depends on it, and eager does not keep it: a mask says what ReLU has passed."""
    problem = make_problem(function, (4, 5, 3, 3), torch.float64, device=device, training=training)
    want, leaves = run(problem), problem.leaves()
    out = call(problem, **leaves, **problem.buffers())
    with torch.no_grad():
        for name in leaves.keys() & {"bias", "residual_bias"}:
            leaves[name].add_(1)
    out.backward(problem.dout)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, want[f"d{name}"])


@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_backward_twice(backend, device, function):
    problem = make_problem(function, (4, 5, 3, 3), torch.float64, device=device)
    leaves = problem.leaves()
    out = call(problem, **leaves, **problem.buffers())
    first = torch.autograd.grad(out, leaves.values(), problem.dout, retain_graph=True)
    second = torch.autograd.grad(out, leaves.values(), problem.dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves.values(), problem.dout)


@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_inputs_are_not_changed(backend, device, function):
    problem = make_problem(function, (4, 5, 3, 3), device=device)
    tensors = {"dout": problem.dout, **problem.tensors}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    run(problem)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def strided_views(shape, dtype, device):
    """Tensors of one shape laid out in every way that a user's network might."""
    n, c, h, w = shape
    yield lay_out(torch.randn(shape, dtype=dtype, device=device), "contiguous")
    yield lay_out(torch.randn(shape, dtype=dtype, device=device), "channels_last")
    yield torch.randn(n, c + 2, h, w, dtype=dtype, device=device)[:, 1:-1]
    yield lay_out(torch.randn(n, c + 2, h, w, dtype=dtype, device=device), "channels_last")[:, 1:-1]
    yield torch.randn(n, c, h, 2 * w, dtype=dtype, device=device)[..., ::2]
    yield torch.randn(w, h, n, c, dtype=dtype, device=device).permute(2, 3, 1, 0)
    yield torch.randn(1, c, 1, 1, dtype=dtype, device=device).expand(shape)


@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_mixed_and_strided_layouts(backend, device, function):
    """x, residual or skip, and dout in any layout: values and gradients are those of plain ones."""
    problem = make_problem(function, (3, 5, 4, 6), torch.float64, device=device)
    names = [name for name in ("x", "residual", "skip") if getattr(problem, name) is not None]
    views = {
        name: list(strided_views(getattr(problem, name).shape, torch.float64, device))
        for name in (*names, "dout")
    }
    n = len(views["x"])
    for i, step in itertools.product(range(n), (1, 3)):
        tensors = {
            name: of_name[(i + k * step) % n] for k, (name, of_name) in enumerate(views.items())
        }
        for name, tensor in tensors.items():
            getattr(problem, name).copy_(tensor)
        want = run(problem)
        leaves = problem.leaves()
        for name in tensors.keys() & leaves.keys():
            leaves[name] = tensors[name].detach().requires_grad_()
        out = call(problem, **leaves, **problem.buffers())
        torch.testing.assert_close(out, want["out"], rtol=1e-12, atol=1e-12)
        gradients = torch.autograd.grad(out, leaves.values(), tensors["dout"])
        for name, gradient in zip(leaves, gradients, strict=True):
            torch.testing.assert_close(gradient, want[f"d{name}"], rtol=1e-10, atol=1e-10)


def test_strided_output_follows_the_input(backend, device):
    """A slice of a channels-last tensor gives a channels-last output, as F.batch_norm does."""
    shape = (3, 5, 4, 6)
    views = (strided_views(shape, torch.float32, where) for where in (device, "cpu"))
    for x, on_cpu in zip(*views, strict=True):
        ours = fusedskip.batch_norm_relu(x, None, None, training=True)
        eager = F.batch_norm(on_cpu, None, None, training=True)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            if eager.is_contiguous(memory_format=memory_format):
                assert ours.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_unaligned_pointers(backend, device, function, dtype, layout):
    """Dense tensors that begin one element behind the boundary that wide accesses want."""

    def unaligned(tensor):
        roomy = tensor.new_empty(tensor.numel() + 1)[1:]
        return roomy.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    problem = make_problem(function, (3, 16, 4, 8), dtype, layout, device).map(unaligned)
    assert problem.x.data_ptr() % 16
    assert_as_good_as_eager(problem)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_of_backward_is_that_of_forward(backend, device, dtype, layout, training):
    """Recomputed from x, bit for bit: with dout = 1, dbias counts the outputs above 0."""
    shape = (4, 9, 3, 5) if interpreted(backend) else (32, 40, 28, 29)
    problem = make_problem("batch_norm_relu", shape, dtype, layout, device, training)
    problem.dout.fill_(1)
    results = run(problem)
    open_gates = (results["out"] > 0).transpose(0, 1).flatten(1).sum(1)
    assert torch.equal(results["dbias"], open_gates.float())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_two_runs_are_bitwise_equal(backend, device, function, layout):
    shape = (6, 5, 9, 11) if interpreted(backend) else (16, 40, 28, 29)
    problem = make_problem(function, shape, torch.float32, layout, device)
    first, second = run(problem), run(problem)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shape", [(8, 40, 28, 29), (8, 16, 28, 28), (2, 2, 150, 151), (4001, 33)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_threads_do_not_change_a_bit(function, layout, shape):
    """Including the point where there are more threads than channels."""
    problem = make_problem(function, shape, torch.float32, layout)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with fusedskip.use_backend("cpu"):
                results.append(run(problem))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


@pytest.mark.filterwarnings("default:fusedskip runs eagerly")
@pytest.mark.parametrize("function", ["bias_add_relu", *NORMS, CAT])
def test_vectors_that_are_not_contiguous(backend, device, function):
    """As in eager mode, which stands in for the kernels; what lies between is left alone."""
    backends._warn_once.cache_clear()
    problem = make_problem(function, (3, 4, 2, 3), torch.float64, device=device)

    def spread(vector):
        if vector is None or vector.dim() > 1:
            return vector
        return torch.stack([vector, torch.full_like(vector, 7)], 1)[:, 0]

    strided = problem.map(spread)
    leaves, buffers = strided.leaves(), {n: spread(t) for n, t in strided.buffers().items()}
    with pytest.warns(UserWarning, match="parameters or running statistics are not contiguous"):
        out = call(strided, **leaves, **buffers)
    out.backward(problem.dout)
    want = run(problem)
    got = {"out": out, **{f"d{name}": leaf.grad for name, leaf in leaves.items()}, **buffers}
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)
    for buffer in buffers.values():
        assert torch.as_strided(buffer, (4,), (2,), 1).eq(7).all()


def test_the_raw_operators_refuse_them(backend, device):
    x, vector = torch.randn(3, 4, 2, 3, device=device), torch.ones(4, 2, device=device)[:, 0]
    none = (None,)
    for norm in ((vector, *3 * none), (*none, vector, *2 * none), (*2 * none, vector, vector)):
        with pytest.raises(RuntimeError, match="contiguous"):
            backends.KERNELS[backend].batch_norm(x, None, *norm, True, 0.1, 1e-5, True, False)

"""Values and gradients of the public functions against fp64, on every backend."""

import contextlib
import itertools

import pytest
import torch

import fusedskip
from fusedskip import functional

from .support import (
    CAT,
    DTYPES,
    FUNCTIONS,
    LAYOUTS,
    LEAVES,
    NORMS,
    assert_as_good_as_eager,
    call,
    interpreted,
    lay_out,
    make_problem,
    run,
    shapes_of,
)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_forward_and_backward(backend, device, function, dtype, layout, training):
    for shape in shapes_of(backend):
        problem = make_problem(function, shape, dtype, layout, device, training)
        if training and problem.x.numel() == shape[1]:
            continue
        assert_as_good_as_eager(problem)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("function", ["batch_norm_relu", "batch_norm_add", "batch_norm_add_relu"])
def test_compiled_kernels_check_arguments(monkeypatch, backend, device, function, training):
    """Nothing else does while all is well: what test_errors sees refused, they have refused."""
    checks = []
    monkeypatch.setattr(functional, "check_batch_norm", lambda *arguments: checks.append(arguments))
    run(make_problem(function, (2, 3, 4, 5), device=device, training=training))
    assert bool(checks) == (backend == "triton")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_many_tiles(backend, device, function, layout):
    """Shapes that are cut into several tiles, with a rest, in every direction the kernels cut."""
    shapes = ((3, 2, 61, 67), (40, 7, 5, 5)) if interpreted(backend) else (
        (40, 3, 97, 101), (3, 2, 150, 151), (700, 11, 5, 5), (9, 200, 29, 31), (70000, 3),
        (301, 2500), (40, 16, 28, 28), (9, 8, 14, 15),
    )  # fmt: skip
    for shape in shapes:
        for dtype in (torch.float32,) if interpreted(backend) else (torch.float32, torch.bfloat16):
            assert_as_good_as_eager(make_problem(function, shape, dtype, layout, device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("function", "training"),
    [("add_relu", False), ("batch_norm_add_relu", True), ("batch_norm_add_relu", False)],
)
def test_stores_past_the_caches(compiled_backend, device, function, dtype, layout, training):
    """10 MB, of rows and planes that begin on cache lines.

    Of 1024 elements a channel: of 20000, torch's own statistics are off by 100 units in the last
    place of fp64.
    """
    shape = (8, 9792 // dtype.itemsize, 8, 16)
    assert_as_good_as_eager(make_problem(function, shape, dtype, layout, device, training))


@pytest.mark.parametrize("shape", [(1, 1, 800, 2801), (1, 2_200_001), (1, 64, 185, 185)], ids=str)
def test_one_image_as_part_of_another(compiled_backend, device, shape):
    """Large enough for stores past the caches, but not where a cache line begins."""
    for layout in LAYOUTS:
        assert_as_good_as_eager(
            make_problem(CAT, shape, torch.float32, layout, device, training=len(shape) > 2)
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", [*NORMS, CAT])
def test_low_precision_parameters(backend, device, function, dtype, layout):
    problem = make_problem(function, (6, 13, 5, 3), dtype, layout, device, param_dtype=dtype)
    assert_as_good_as_eager(problem)
    assert_as_good_as_eager(
        make_problem(
            function, (6, 13, 5, 3), dtype, layout, device, training=False, param_dtype=dtype
        )
    )


@pytest.mark.parametrize("affine", ["none", "weight", "bias"])
@pytest.mark.parametrize("function", NORMS)
def test_absent_parameters(backend, device, function, affine):
    for layout, training in itertools.product(LAYOUTS, (True, False)):
        problem = make_problem(
            function, (4, 6, 3, 5), torch.float64, layout, device, training, affine=affine != "none"
        )
        if affine != "none":
            absent = "bias" if affine == "weight" else "weight"
            problem = problem.replaced(**{absent: None, f"residual_{absent}": None})
        assert_as_good_as_eager(problem)


@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_mean_far_above_std(backend, device, function):
    """x = 1000 + randn: variance, output and gradients no further from fp64 than eager's."""
    for layout in LAYOUTS:
        problem = make_problem(function, (8, 12, 9, 11), torch.float32, layout, device)
        problem.x.add_(1000)
        assert_as_good_as_eager(problem)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_variance_of_constant_channels(backend, device, layout):
    """Rounding makes it a little more than 0 at most: eps need not make up for it."""
    for shape in ((5, 16, 14, 12), (3, 16, 11, 3), (7, 16, 6, 5), (3, 16, 13, 3)):
        problem = make_problem(
            "batch_norm_relu", shape, torch.float32, layout, device, momentum=1.0, eps=1e-20
        )
        constants = torch.linspace(5e5, 1.5e6, 16, device=device).view(-1, 1, 1)
        problem.x.copy_(constants.expand(shape))
        results = run(problem)
        assert torch.all(results["running_var"] >= 0)
        assert torch.isfinite(results["out"]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_variance_with_mean_far_above_std(backend, device, layout):
    """momentum = 1 shows the batch variance itself; one ulp is what storing it costs."""
    problem = make_problem(
        "batch_norm_relu", (16, 12, 14, 15), torch.float32, layout, device, momentum=1.0
    )
    problem.x.add_(1000)
    want = problem.x.double().transpose(0, 1).flatten(1).var(1)
    got = run(problem)["running_var"]
    with fusedskip.use_backend("eager"):
        eager = run(problem)["running_var"]
    ulp = torch.finfo(torch.float32).eps * want.max()
    assert (got - want).abs().max() <= (eager - want).abs().max() + ulp


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_outlier_does_not_spoil_the_variance(backend, device, layout):
    """The first element, which a shifted single pass would take for its pivot, is far out."""
    problem = make_problem(
        "batch_norm_relu", (16, 5, 14, 15), torch.float32, layout, device, momentum=1.0
    )
    problem.x[0, :, 0, 0] = 1e5
    want = problem.x.double().transpose(0, 1).flatten(1).var(1)
    got = run(problem)["running_var"]
    # Rounding of a sum of n terms grows as sqrt(n); a bad pivot would cost n times an ulp.
    rtol = torch.finfo(torch.float32).eps * (problem.x.numel() / 5) ** 0.5
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=0)


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f != "batch_norm_relu"])
def test_residual_that_is_x(backend, device, function):
    for training in (True, False):
        problem = make_problem(
            function, (4, 5, 3, 3), torch.float64, device=device, training=training
        )
        results = []
        for name in (backend, "eager"):
            leaves = problem.leaves()
            leaves["residual"] = leaves["x"]
            with fusedskip.use_backend(name):
                out = call(problem, **leaves, **problem.buffers())
            out.backward(problem.dout)
            results.append((out.detach(), leaves["x"].grad))
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", LEAVES)
@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_one_gradient_alone(backend, device, function, wanted):
    """What is asked for is right, whatever else is not asked for; the rest stays None."""
    for layout, training in itertools.product(LAYOUTS, (True, False)):
        problem = make_problem(function, (4, 7, 3, 5), torch.float64, layout, device, training)
        leaves = problem.leaves()
        if wanted not in leaves:
            continue
        for name, leaf in leaves.items():
            leaf.requires_grad_(name == wanted)
        out = call(problem, **leaves, **problem.buffers())
        out.backward(problem.dout)
        everything = run(problem)
        assert torch.equal(out, everything["out"])
        # Where the mask is kept and not x, Triton adds up in another order.
        torch.testing.assert_close(
            leaves[wanted].grad, everything[f"d{wanted}"], rtol=1e-14, atol=1e-14
        )
        assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_without_gradients(backend, device, function, guard):
    """No graph, and bit by bit what there is with one."""
    for dtype, layout, training in itertools.product(DTYPES, LAYOUTS, (True, False)):
        problem = make_problem(function, (4, 17, 3, 3), dtype, layout, device, training)
        buffers = problem.buffers()
        with guard():
            out = call(problem, **problem.leaves(), **buffers)
        assert not out.requires_grad
        want = run(problem)
        assert torch.equal(out, want["out"])
        assert out.stride() == want["out"].stride()
        for name, buffer in buffers.items():
            assert torch.equal(buffer, want[name])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_kept_for_backward(backend, device, function):
    """What a norm was given, C-sized vectors and one bit an element: no other activation."""
    problem = make_problem(function, (4, 16, 6, 8), torch.float32, "channels_last", device)
    kept = []
    leaves = problem.leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(problem, **leaves, **problem.buffers())
    masks = [t for t in kept if t.dtype == torch.uint8]
    activations = [t for t in kept if t.shape == problem.x.shape]
    n_channels = problem.x.shape[1]
    vectors = [t for t in kept if t.shape[-1] == n_channels and t.numel() <= 4 * n_channels]
    assert len(masks) + len(activations) + len(vectors) == len(kept)
    normalised = ["x"] * problem.has_norm + ["residual"] * problem.is_dual
    assert [t.data_ptr() for t in activations] == [leaves[n].data_ptr() for n in normalised]
    has_mask = function not in ("batch_norm_relu", "batch_norm_add")
    assert sum(t.nbytes for t in masks) == (problem.x.numel() // 8 if has_mask else 0)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_saved_tensors_come_back_in_another_layout(backend, device, function, layout, training):
    """As `save_on_cpu(pin_memory=True)` gives them back, contiguous: also for a second derivative.

    Of 8 channels of 16 elements, a mask has as many bytes in either layout.
    """
    problem = make_problem(function, (2, 8, 4, 4), torch.float64, layout, device, training)
    other = LAYOUTS[1 - LAYOUTS.index(layout)]

    def pack(tensor):
        return lay_out(tensor.detach(), other) if tensor.dim() == 4 else tensor

    def gradients(hooks, create_graph):
        leaves = problem.leaves()
        with hooks:
            out = call(problem, **leaves, **problem.buffers())
        return torch.autograd.grad(
            out, list(leaves.values()), problem.dout, create_graph=create_graph
        )

    for create_graph in (False, True):
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        want = gradients(contextlib.nullcontext(), create_graph)
        torch.testing.assert_close(gradients(hooks, create_graph), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", NORMS)
def test_frozen_norms_keep_no_activation(backend, device, function):
    """In evaluation, without gradients of weights, the mask and C-sized vectors are all."""
    problem = make_problem(
        function, (4, 16, 6, 8), torch.float32, "channels_last", device, training=False
    )
    want, leaves, kept = run(problem), problem.leaves(), []
    for name, leaf in leaves.items():
        leaf.requires_grad_(not name.endswith("weight"))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = call(problem, **leaves, **problem.buffers())
    assert sum(t.nbytes for t in kept) < problem.x.nbytes / 8
    out.backward(problem.dout)
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, want[f"d{name}"])


def test_a_residual_behind_the_relu_alone(backend, device):
    """Its gradient is that of the sum: nothing is kept, and nothing computed."""
    problem = make_problem("relu_add", (4, 16, 6, 8), torch.float32, "channels_last", device)
    leaves = problem.leaves()
    leaves["x"].requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = call(problem, **leaves)
    assert kept == []
    (gradient,) = torch.autograd.grad(out, leaves["residual"], problem.dout)
    assert gradient.data_ptr() == problem.dout.data_ptr()


def test_same_layout_out_as_in(backend, device):
    for shape in ((3, 4, 5), (3, 4, 5, 6), (3, 4, 5, 6, 7)):
        for layout in LAYOUTS:
            x = lay_out(torch.randn(shape, device=device), layout)
            residual = lay_out(torch.randn(shape, device=device), layout)
            for out in (
                fusedskip.add_relu(x, residual),
                fusedskip.relu_add(x, residual),
                fusedskip.bias_add_relu(x, residual, torch.ones(4, device=device)),
                fusedskip.batch_norm_relu(x, None, None, training=True),
                fusedskip.dual_batch_norm_add_relu(x, residual, *[None] * 4, training=True),
                fusedskip.batch_norm_add_relu(x, residual, None, None, training=True),
            ):
                assert out.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nan_of_any_payload_stays_nan(backend, device, dtype):
    """Rounding must not carry the bits of a NaN into a number: nor of one that is all ones."""
    for bits in (0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001):
        bias = torch.full((40,), bits, dtype=torch.int32).view(torch.float32).to(device)
        statistics = torch.zeros(40, device=device), torch.ones(40, device=device)
        x = torch.ones(2, 40, 3, 3, dtype=dtype, device=device)
        assert fusedskip.batch_norm_relu(x, *statistics, bias=bias).isnan().all(), hex(bits)

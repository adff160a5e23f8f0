"""The four Triton ops by themselves, against fp64 torch: layouts, mask bytes, launch parameters."""

import math
from dataclasses import replace

import pytest
import torch
from fusedskip.triton_kernels import launch, ops

from fusedskip import triton_kernels

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="CPU tensors need the interpreter"
)

SHAPES = [
    (2, 3),
    (1, 3),
    (5, 7, 3),
    (2, 5, 3, 3),
    (3, 11, 5, 5),
    (4, 8, 1, 1),
    (2, 13, 2, 3, 2),
    (9, 130),
]
LAYOUTS = ["channels_first", "channels_last"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS, MOMENTUM = 1e-5, 0.3


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Whatever an op allocates starts as NaN, or as bits of 1: what is not written is seen."""

    def filled(allocate):
        def allocate_filled(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(math.nan if tensor.is_floating_point() else 255)

        return allocate_filled

    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


@pytest.fixture(params=["chosen", "tiny"])
def tiles(request, monkeypatch):
    """Launch parameters as chosen, or such that a small tensor has blocks, splits and tails."""

    def tiny(view, itemsize):
        chosen = launch.plan(view, itemsize)
        block_channels = min(chosen.block_channels, 8 if view.n_outer > 1 else 1024)
        n_positions = view.n_outer * view.n_inner
        return replace(
            chosen,
            long_index=True,
            block_positions=16,
            block_channels=block_channels,
            stats_positions=32,
            channel_blocks=math.ceil(view.n_channels / block_channels),
            n_splits=min(3, math.ceil(n_positions / 32)),
            n_programs=2,
            num_warps=1,
        )

    if request.param == "tiny":
        monkeypatch.setattr(ops, "plan", tiny)


def make(shape, dtype=torch.float64, layout="channels_first", shift=0.0):
    x = (torch.randn(shape, dtype=torch.float64) + shift).to(dtype)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x


def parameters(n_channels, dtype=torch.float64):
    """weight, bias, running_mean, running_var."""
    values = torch.randn(3, n_channels), 0.5 + torch.rand(1, n_channels)
    return tuple(torch.cat(values).to(dtype).unbind())


def packed(bits, view):
    """The mask that belongs to a bool tensor, bit by bit."""
    if view.n_inner == 1 and bits.dim() > 2:
        bits = bits.movedim(1, -1)
    rows = bits.reshape(-1, view.n_inner if view.n_inner > 1 else view.n_channels).to(torch.uint8)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8)).reshape(len(rows), -1, 8)
    return (rows << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def assert_rounded(actual, exact, arithmetic=1e-5):
    """`actual` is `exact` after fp32 (for fp64: fp64) arithmetic and one rounding to its dtype."""
    if actual.dtype == torch.float64:
        rtol, atol = 1e-11, 1e-11
    else:
        rtol, atol = 0.51 * torch.finfo(actual.dtype).eps + arithmetic, arithmetic
    torch.testing.assert_close(actual.double(), exact, rtol=rtol, atol=atol, equal_nan=True)


def per_channel(x):
    """x as (n, C), in fp64."""
    return x.double().movedim(1, -1).reshape(-1, x.shape[1])


def channels(values, x):
    """(C,) to broadcast against x."""
    return values.double().reshape(-1, *[1] * (x.dim() - 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5, 3, 3), (3, 67, 5, 5)])
def test_add_relu(shape, layout, dtype, tiles):
    layout = layout if len(shape) > 2 else "channels_first"
    x, residual, dout = (make(shape, dtype, layout) for _ in range(3))
    out, mask = triton_kernels.add_relu(x, residual, True)
    assert out.stride() == x.stride()
    torch.testing.assert_close(out, (x + residual).relu(), rtol=0, atol=0)
    in_memory = out.movedim(1, -1) if layout == "channels_last" else out
    assert torch.equal(mask, packed(in_memory.reshape(1, -1) > 0, launch.View.flat(x)))
    dx = triton_kernels.add_relu_backward(dout, mask)
    torch.testing.assert_close(dx, torch.where(out > 0, dout, 0), rtol=0, atol=0)
    again, no_mask = triton_kernels.add_relu(x, residual, False)
    assert torch.equal(again, out)
    assert no_mask.shape == (0,)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm(shape, layout, training, tiles):
    if training and shape == (1, 3):
        return  # one value per channel
    check_batch_norm(shape, layout, torch.float64, torch.float64, training)


@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float16,) * 2],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_norm_dtypes(layout, dtype, parameter_dtype, tiles):
    check_batch_norm((3, 11, 5, 5), layout, dtype, parameter_dtype, True)


def check_batch_norm(shape, layout, dtype, parameter_dtype, training):
    """relu(bn(x) + residual): forward, mask, statistics, and all gradients."""
    x, residual, dout = (make(shape, dtype, layout) for _ in range(3))
    weight, bias, running_mean, running_var = parameters(shape[1], parameter_dtype)
    old_mean, old_var = running_mean.double().clone(), running_var.double().clone()
    out, mask, mean, rstd = triton_kernels.batch_norm(
        x, residual, weight, bias, running_mean, running_var, training, MOMENTUM, EPS, True, True
    )

    rows = per_channel(x)
    true_mean, true_var = old_mean, old_var
    if training:
        true_mean, true_var = rows.mean(0), rows.var(0, correction=0)
        assert_rounded(running_mean, (1 - MOMENTUM) * old_mean + MOMENTUM * true_mean)
        assert_rounded(running_var, (1 - MOMENTUM) * old_var + MOMENTUM * rows.var(0))
    true_rstd = (true_var + EPS).rsqrt()
    assert mean.dtype == rstd.dtype == launch.statistics_dtype(x)
    assert_rounded(mean, true_mean)
    assert_rounded(rstd, true_rstd)
    x_hat = (x.double() - channels(true_mean, x)) * channels(true_rstd, x)
    pre = x_hat * channels(weight, x) + channels(bias, x) + residual.double()
    assert out.stride() == x.stride()
    assert_rounded(out, pre.relu())
    assert torch.equal(mask, packed(out > 0, launch.View.of(x)))

    dx, dresidual, dweight, dbias = triton_kernels.batch_norm_backward(
        dout, x, mask, weight, bias, mean, rstd, training, True, True, True, True
    )
    g = torch.where(out > 0, dout, 0)
    assert torch.equal(dresidual, g)
    sum_g, sum_gx = per_channel(g).sum(0), (per_channel(g) * per_channel(x_hat)).sum(0)
    assert_rounded(dbias, sum_g)
    assert_rounded(dweight, sum_gx)
    inner = g.double()
    if training:
        inner -= (channels(sum_g, x) + x_hat * channels(sum_gx, x)) / len(rows)
    assert dx.stride() == x.stride()
    assert_rounded(dx, channels(weight, x) * channels(true_rstd, x) * inner)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threshold_recomputed_from_x_is_that_of_forward(dtype, layout, tiles):
    x, dout = make((4, 9, 3, 5), dtype, layout), torch.ones(4, 9, 3, 5, dtype=dtype)
    dout = dout.as_strided(x.shape, x.stride())
    weight, bias, *_ = parameters(9, torch.float32)
    out, mask, mean, rstd = triton_kernels.batch_norm(
        x, None, weight, bias, None, None, True, 0.1, EPS, True, False
    )
    assert mask.shape == (0,)
    _, _, _, dbias = triton_kernels.batch_norm_backward(
        dout, x, None, weight, bias, mean, rstd, True, True, False, False, True
    )
    assert torch.equal(dbias, per_channel(out > 0).sum(0).float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_what_is_needed(layout):
    x, residual, dout = (make((3, 9, 4, 5), torch.float32, layout) for _ in range(3))
    weight, bias, *_ = parameters(9, torch.float32)
    _, mask, mean, rstd = triton_kernels.batch_norm(
        x, residual, weight, bias, None, None, True, 0.1, EPS, True, True
    )
    for training in (True, False):

        def backward(*needs, weight=weight, bias=bias, training=training):
            return triton_kernels.batch_norm_backward(
                dout, x, mask, weight, bias, mean, rstd, training, True, *needs
            )

        everything = backward(True, True, True)
        for needs in [
            (True, False, False),
            (False, True, False),
            (False, False, True),
            (False,) * 3,
        ]:
            for part, whole, needed in zip(
                backward(*needs), everything, (*needs, needs[2]), strict=True
            ):
                assert torch.equal(part, whole) if needed else part.shape == (0,)
        _, _, dweight, dbias = backward(False, False, True, bias=None)
        assert torch.equal(dweight, everything[2])
        assert dbias.shape == (0,)
        dx, _, dweight, dbias = backward(True, False, True, weight=None, bias=None)
        assert dweight.shape == dbias.shape == (0,)
        torch.testing.assert_close(dx * channels(weight, x).float(), everything[0])


def test_without_relu():
    x, residual, dout = (make((3, 9, 4, 5)) for _ in range(3))
    out, _, mean, rstd = triton_kernels.batch_norm(
        x, residual, None, None, None, None, True, 0.1, EPS, False, False
    )
    x_ref = x.clone().requires_grad_()
    expected = torch.nn.functional.batch_norm(x_ref, None, None, training=True, eps=EPS) + residual
    assert_rounded(out, expected.detach())
    dx, *_ = triton_kernels.batch_norm_backward(
        dout, x, None, None, None, mean, rstd, True, False, True, False, False
    )
    expected.backward(dout)
    assert_rounded(dx, x_ref.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_inf(layout, tiles):
    x = make((2, 10, 3, 3), torch.float32, layout)
    x[0, 1, 0, 0], x[1, 2, 1, 1], x[0, 3, 2, 2] = math.nan, math.inf, -math.inf
    residual = torch.zeros_like(x)
    running_mean, running_var = torch.zeros(10), torch.ones(10)
    expected_mean, expected_var = running_mean.clone(), running_var.clone()
    expected = torch.nn.functional.batch_norm(x, expected_mean, expected_var, training=True).relu()
    out, mask, _, _ = triton_kernels.batch_norm(
        x, residual, None, None, running_mean, running_var, True, 0.1, EPS, True, True
    )
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(running_mean, expected_mean, equal_nan=True)
    torch.testing.assert_close(running_var, expected_var, equal_nan=True)
    assert torch.equal(mask, packed(~(out <= 0), launch.View.of(x)))

    out, mask = triton_kernels.add_relu(x, residual, True)
    torch.testing.assert_close(out, x.relu(), equal_nan=True, rtol=0, atol=0)
    dout = torch.where(out > 0, 1.0, math.nan)
    torch.testing.assert_close(
        triton_kernels.add_relu_backward(dout, mask),
        torch.where(out > 0, 1.0, torch.where(out.isnan(), math.nan, 0.0)),
        equal_nan=True,
    )


def test_threshold_is_that_of_the_stored_value():
    """1e-8 + 0 is positive, but 0 in fp16: out is 0, so no gradient passes."""
    x = torch.zeros(1, 8, dtype=torch.float16)
    tiny, zero, one = torch.full((8,), 1e-8), torch.zeros(8), torch.ones(8)
    out, mask, _, _ = triton_kernels.batch_norm(
        x, x, one, tiny, zero, one, False, 0.0, EPS, True, True
    )
    assert out.eq(0).all()
    assert mask.eq(0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_far_above_std(layout, tiles):
    x = make((4, 8, 6, 7), torch.float32, layout, shift=1000.0)
    _, _, mean, rstd = triton_kernels.batch_norm(
        x, None, None, None, None, None, True, 0.1, EPS, True, False
    )
    rows = per_channel(x)
    torch.testing.assert_close(mean.double(), rows.mean(0), rtol=2**-23, atol=0)
    torch.testing.assert_close(
        rstd.double(), (rows.var(0, correction=0) + EPS).rsqrt(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_are_bitwise_equal(layout, tiles):
    x, residual, dout = (make((4, 11, 5, 3), torch.float32, layout) for _ in range(3))
    weight, bias, *_ = parameters(11, torch.float32)

    def run():
        out, mask, mean, rstd = triton_kernels.batch_norm(
            x, residual, weight, bias, None, None, True, 0.1, EPS, True, True
        )
        grads = triton_kernels.batch_norm_backward(
            dout, x, mask, weight, bias, mean, rstd, True, True, True, True, True
        )
        return out, mask, mean, rstd, *grads

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)

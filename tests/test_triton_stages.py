"""The Triton ops by themselves, against fp64 torch: layouts, mask bytes, launch parameters."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from fusedskip.triton_kernels import launch, ops, tile

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
# Fewer channels: every one more is a program more, of two tensors.
DUAL_SHAPES = [(2, 3), (1, 3), (4, 8, 1, 1), (3, 3, 5, 5), (9, 21)]
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

    def tiny(view, itemsize, n_norms=1):
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
            stats_splits=min(3, math.ceil(n_positions / 32)),
            bwd_splits=min(4, math.ceil(n_positions / 16)),
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
@pytest.mark.parametrize(
    ("shape", "relu_first"),
    [
        ((), False),
        ((3,), True),
        ((2, 5, 3, 3), False),
        ((2, 5, 3, 3), True),
        ((3, 67, 5, 5), False),
    ],
)
def test_add_relu(shape, layout, dtype, relu_first, tiles):
    layout = layout if len(shape) > 2 else "channels_first"
    x, residual, dout = (make(shape, dtype, layout) for _ in range(3))
    gate = (x if relu_first else x + residual) > 0
    expected = torch.where(gate, x, 0) + residual if relu_first else (x + residual).relu()
    out, mask = ops.add_relu(x, residual, relu_first, True)
    assert out.stride() == x.stride()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    in_memory = gate.movedim(1, -1) if layout == "channels_last" else gate
    assert torch.equal(mask, packed(in_memory.reshape(1, -1), launch.View.flat(x)))
    dx = ops.add_relu_backward(dout, mask)
    torch.testing.assert_close(dx, torch.where(gate, dout, 0), rtol=0, atol=0)
    again, no_mask = ops.add_relu(x, residual, relu_first, False)
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
    check_dual_batch_norm((3, 3, 5, 5), layout, dtype, parameter_dtype, True)


def check_batch_norm(shape, layout, dtype, parameter_dtype, training):
    """relu(bn(x) + residual): forward, mask, statistics, and all gradients."""
    x, residual, dout = (make(shape, dtype, layout) for _ in range(3))
    norm = parameters(shape[1], parameter_dtype)
    truth = TrueNorm(x, *norm, training, MOMENTUM, EPS)
    out, mask, statistics = ops.batch_norm(x, residual, *norm, training, MOMENTUM, EPS, True, True)
    truth.check_statistics(statistics, *norm[2:])
    assert out.stride() == x.stride()
    assert_rounded(out, (truth.out + residual.double()).relu())
    assert torch.equal(mask, packed(out > 0, launch.View.of(x)))

    weight, bias, *_ = norm
    dx, dresidual, *dparams = ops.batch_norm_backward(
        dout, x, mask, weight, bias, statistics, training, True, True, True, True
    )
    g = torch.where(out > 0, dout, 0)
    assert torch.equal(dresidual, g)
    truth.check_gradients(g, dx, *dparams)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", DUAL_SHAPES)
def test_dual_batch_norm(shape, layout, training, tiles):
    if training and shape == (1, 3):
        return  # one value per channel
    check_dual_batch_norm(shape, layout, torch.float64, torch.float64, training)


def check_dual_batch_norm(shape, layout, dtype, parameter_dtype, training):
    """relu(bn(x) + bn'(residual)), no number of one norm being that of the other."""
    x, dout = (make(shape, dtype, layout) for _ in range(2))
    residual = make(shape, dtype, layout, shift=3.0)
    norm, residual_norm = (parameters(shape[1], parameter_dtype) for _ in range(2))
    truth = TrueNorm(x, *norm, training, MOMENTUM, EPS)
    residual_truth = TrueNorm(residual, *residual_norm, training, 0.6, 1e-2)
    out, mask, statistics = ops.dual_batch_norm(
        x, residual, *norm, *residual_norm, training, MOMENTUM, EPS, 0.6, 1e-2, True
    )
    truth.check_statistics(statistics[0], *norm[2:])
    residual_truth.check_statistics(statistics[1], *residual_norm[2:])
    assert out.stride() == x.stride()
    assert_rounded(out, (truth.out + residual_truth.out).relu())
    assert torch.equal(mask, packed(out > 0, launch.View.of(x)))

    dx, dresidual, dweight, dbias, *residual_dparams = ops.dual_batch_norm_backward(
        dout, x, residual, mask, *norm[:2], *residual_norm[:2], statistics, training,
        True, True, True,
    )  # fmt: skip
    g = torch.where(out > 0, dout, 0)
    truth.check_gradients(g, dx, dweight, dbias)
    residual_truth.check_gradients(g, dresidual, *residual_dparams)


class TrueNorm:
    """A batch norm in fp64, computed before the op updates the running statistics."""

    def __init__(self, x, weight, bias, running_mean, running_var, training, momentum, eps):
        rows = per_channel(x)
        self.x, self.weight, self.training = x, channels(weight, x), training
        self.mean, var = running_mean.double().clone(), running_var.double().clone()
        self.running_mean, self.running_var = self.mean, var
        if training:
            self.running_mean = (1 - momentum) * self.mean + momentum * rows.mean(0)
            self.running_var = (1 - momentum) * var + momentum * rows.var(0)
            self.mean, var = rows.mean(0), rows.var(0, correction=0)
        self.rstd = (var + eps).rsqrt()
        self.x_hat = (x.double() - channels(self.mean, x)) * channels(self.rstd, x)
        self.out = self.x_hat * self.weight + channels(bias, x)

    def check_statistics(self, statistics, running_mean, running_var):
        assert statistics.dtype == launch.statistics_dtype(self.x)
        mean, rstd = statistics
        assert_rounded(mean, self.mean)
        assert_rounded(rstd, self.rstd)
        assert_rounded(running_mean, self.running_mean)
        assert_rounded(running_var, self.running_var)

    def check_gradients(self, g, dx, dweight, dbias):
        rows = per_channel(g)
        sum_g, sum_gx = rows.sum(0), (rows * per_channel(self.x_hat)).sum(0)
        assert_rounded(dbias, sum_g)
        assert_rounded(dweight, sum_gx)
        inner = g.double()
        if self.training:
            inner = inner - (channels(sum_g, g) + self.x_hat * channels(sum_gx, g)) / len(rows)
        assert dx.stride() == self.x.stride()
        assert_rounded(dx, self.weight * channels(self.rstd, g) * inner)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threshold_recomputed_from_x_is_that_of_forward(dtype, layout, tiles):
    x, dout = make((4, 9, 3, 5), dtype, layout), torch.ones(4, 9, 3, 5, dtype=dtype)
    dout = dout.as_strided(x.shape, x.stride())
    weight, bias, *_ = parameters(9, torch.float32)
    out, mask, statistics = ops.batch_norm(
        x, None, weight, bias, None, None, True, 0.1, EPS, True, False
    )
    assert mask.shape == (0,)
    _, _, _, dbias = ops.batch_norm_backward(
        dout, x, None, weight, bias, statistics, True, True, False, False, True
    )
    assert torch.equal(dbias, per_channel(out > 0).sum(0).float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_what_is_needed(layout):
    x, residual, dout = (make((3, 9, 4, 5), torch.float32, layout) for _ in range(3))
    weight, bias, *_ = parameters(9, torch.float32)
    _, mask, statistics = ops.batch_norm(
        x, residual, weight, bias, None, None, True, 0.1, EPS, True, True
    )
    for training in (True, False):

        def backward(*needs, weight=weight, bias=bias, training=training):
            return ops.batch_norm_backward(
                dout, x, mask, weight, bias, statistics, training, True, *needs
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_what_is_needed_of_two_norms(layout):
    x, residual, dout = (make((2, 2, 3, 5), torch.float32, layout) for _ in range(3))
    weight, bias, residual_weight, residual_bias = parameters(2, torch.float32)
    no_buffers = None, None
    _, mask, statistics = ops.dual_batch_norm(
        x, residual, weight, bias, *no_buffers, residual_weight, residual_bias, *no_buffers,
        True, 0.1, EPS, 0.1, EPS, True,
    )  # fmt: skip
    for training in (True, False):

        def backward(parameters, *needs, training=training):
            return ops.dual_batch_norm_backward(
                dout, x, residual, mask, *parameters, statistics, training, *needs
            )

        given = weight, bias, residual_weight, residual_bias
        everything = backward(given, True, True, True)
        for needs in itertools.product((True, False), repeat=3):
            for part, whole, needed in zip(
                backward(given, *needs), everything, (*needs, *[needs[2]] * 3), strict=True
            ):
                assert torch.equal(part, whole) if needed else part.shape == (0,)
        # The gradient of bias needs no weight, and either norm may be without both.
        _, _, *dparams = backward((None, bias, residual_weight, None), False, False, True)
        for part, whole, needed in zip(
            dparams, everything[2:], (False, True, True, False), strict=True
        ):
            assert torch.equal(part, whole) if needed else part.shape == (0,)
        dx, dresidual, *dparams = backward((None,) * 4, True, True, True)
        assert all(gradient.shape == (0,) for gradient in dparams)
        torch.testing.assert_close(dx * channels(weight, x).float(), everything[0])
        unscaled = dresidual * channels(residual_weight, x).float()
        torch.testing.assert_close(unscaled, everything[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_without_running_statistics(layout):
    x, residual = (make((2, 9, 3, 5), torch.float32, layout) for _ in range(2))
    _, bias, _, residual_bias = parameters(9, torch.float32)
    shifted = x + channels(bias, x).float()
    out, mask, statistics = ops.batch_norm(
        x, residual, None, bias, None, None, False, 0.0, 0.0, True, True
    )
    assert torch.equal(out, (shifted + residual).relu())
    assert torch.equal(mask, packed(out > 0, launch.View.of(x)))
    neutral = torch.stack([torch.zeros(9), torch.ones(9)])
    assert torch.equal(statistics, neutral)
    out, no_mask, statistics = ops.dual_batch_norm(
        x, residual, None, bias, None, None, None, residual_bias, None, None,
        False, 0.0, 0.0, 0.0, 0.0, False,
    )  # fmt: skip
    assert torch.equal(out, (shifted + (residual + channels(residual_bias, x).float())).relu())
    assert no_mask.shape == (0,)
    assert torch.equal(statistics, neutral.expand(2, 2, 9))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 4, 5), (1, 5, 4, 5), (7, 9)])
def test_into_part_of_a_wider_tensor(shape, layout, tiles):
    n_channels = shape[1]
    x = make(shape, torch.float32, layout)
    wider = make((shape[0], n_channels + 3, *shape[2:]), torch.float32, layout)
    expected = wider.clone()
    norm = parameters(n_channels, torch.float32)
    part = slice(2, 2 + n_channels)
    for training in (False, True):  # in this order: training updates the running statistics
        expected[:, part], _, statistics = ops.batch_norm(
            x, None, *norm[:2], *(None, None) if training else norm[2:], training, MOMENTUM, EPS,
            True, False,
        )  # fmt: skip
        ours = ops.batch_norm_relu_into(x, *norm, wider[:, part], training, MOMENTUM, EPS)
        assert torch.equal(wider, expected)
        assert torch.equal(ours, statistics)


def test_without_relu():
    x, residual, dout = (make((3, 9, 4, 5)) for _ in range(3))
    out, _, statistics = ops.batch_norm(
        x, residual, None, None, None, None, True, 0.1, EPS, False, False
    )
    x_ref = x.clone().requires_grad_()
    expected = torch.nn.functional.batch_norm(x_ref, None, None, training=True, eps=EPS) + residual
    assert_rounded(out, expected.detach())
    dx, *_ = ops.batch_norm_backward(
        dout, x, None, None, None, statistics, True, False, True, False, False
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
    out, mask, _ = ops.batch_norm(
        x, residual, None, None, running_mean, running_var, True, 0.1, EPS, True, True
    )
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(running_mean, expected_mean, equal_nan=True)
    torch.testing.assert_close(running_var, expected_var, equal_nan=True)
    assert torch.equal(mask, packed(~(out <= 0), launch.View.of(x)))

    for relu_first in (False, True):
        out, mask = ops.add_relu(x, residual, relu_first, True)
        torch.testing.assert_close(out, x.relu(), equal_nan=True, rtol=0, atol=0)
        dout = torch.where(out > 0, 1.0, math.nan)
        torch.testing.assert_close(
            ops.add_relu_backward(dout, mask),
            torch.where(out > 0, 1.0, torch.where(out.isnan(), math.nan, 0.0)),
            equal_nan=True,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_in_either_of_two_norms(layout):
    """The sum of infinities too: it passes, and a channel of one norm is no other's."""
    x, residual = (make((2, 4, 3, 3), torch.float32, layout) for _ in range(2))
    x[0, 0, 0, 0] = residual[0, 1, 0, 0] = math.nan
    x[0, 2, 1, 1], residual[0, 2, 1, 1] = math.inf, -math.inf
    mean, var = torch.zeros(4), torch.ones(4)
    for training in (True, False):
        buffers = [None, None] if training else [mean, var]
        expected = sum(
            torch.nn.functional.batch_norm(z, *buffers, training=training) for z in (x, residual)
        ).relu()
        norm = None, None, *buffers
        out, mask, *_ = ops.dual_batch_norm(
            x, residual, *norm, *norm, training, 0.1, EPS, 0.1, EPS, True
        )
        torch.testing.assert_close(out, expected, equal_nan=True)
        assert torch.equal(mask, packed(~(out <= 0), launch.View.of(x)))


def test_threshold_is_that_of_the_stored_value():
    """1e-8 + 0 is positive, but 0 in fp16: out is 0, so no gradient passes."""
    x = torch.zeros(1, 8, dtype=torch.float16)
    tiny, zero, one = torch.full((8,), 1e-8), torch.zeros(8), torch.ones(8)
    out, mask, _ = ops.batch_norm(x, x, one, tiny, zero, one, False, 0.0, EPS, True, True)
    assert out.eq(0).all()
    assert mask.eq(0).all()


@triton.jit
def count_octets_kernel(counts_ptr, n, INDEX_DTYPE: tl.constexpr):
    tl.store(counts_ptr, tile.n_octets(n))
    tl.store(counts_ptr + 1, tile.in_octets(n, INDEX_DTYPE))


@pytest.mark.parametrize("n", [1, 7, 8, 9, 2**31 - 8, 2**31 - 7, 2**31 - 1, 2**31])
def test_sizes_just_below_32_bits(n):
    """A mask byte for the last few elements; and positions have 64 bits before they need them."""
    counts = torch.zeros(2, dtype=torch.int64)
    is_long = launch.plan(launch.View(1, 2, n), 2).long_index
    count_octets_kernel[(1,)](counts, n, INDEX_DTYPE=tl.int64 if is_long else tl.int32)
    assert counts.tolist() == [math.ceil(n / 8), math.ceil(n / 8) * 8]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_far_above_std(layout, tiles):
    x = make((4, 3, 6, 7), torch.float32, layout, shift=1000.0)
    residual = make((4, 3, 6, 7), torch.float32, layout, shift=-3000.0)
    norm = None, None, None, None
    _, _, alone = ops.batch_norm(x, None, *norm, True, 0.1, EPS, True, False)
    _, _, both = ops.dual_batch_norm(x, residual, *norm, *norm, True, 0.1, EPS, 0.1, EPS, False)
    for values, (mean, rstd) in [(x, alone), (x, both[0]), (residual, both[1])]:
        rows = per_channel(values)
        torch.testing.assert_close(mean.double(), rows.mean(0), rtol=2**-23, atol=0)
        torch.testing.assert_close(
            rstd.double(), (rows.var(0, correction=0) + EPS).rsqrt(), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stats_alone_are_those_of_forward(layout, tiles):
    x = make((4, 9, 5, 3), torch.float32, layout, shift=1000.0)
    norm = None, None, None, None
    _, _, statistics = ops.batch_norm(x, None, *norm, True, 0.1, EPS, True, False)
    our_mean, m2, count = ops.batch_norm_stats(x).split([9, 9, 1])
    assert count.tolist() == [4 * 5 * 3]
    mean, rstd = statistics
    assert torch.equal(our_mean, mean)
    torch.testing.assert_close((m2 / count + EPS).rsqrt(), rstd)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_are_bitwise_equal(layout, tiles):
    x, residual, dout = (make((4, 3, 5, 3), torch.float32, layout) for _ in range(3))
    weight, bias, *_ = parameters(3, torch.float32)
    no_buffers = weight, bias, None, None

    def run():
        out, mask, statistics = ops.batch_norm(x, residual, *no_buffers, True, 0.1, EPS, True, True)
        yield from (out, mask, statistics)
        yield from ops.batch_norm_backward(
            dout, x, mask, weight, bias, statistics, True, True, True, True, True
        )
        out, mask, statistics = ops.dual_batch_norm(
            x, residual, *no_buffers, *no_buffers, True, 0.1, EPS, 0.1, EPS, True
        )
        yield from (out, mask, statistics)
        yield from ops.dual_batch_norm_backward(
            dout, x, residual, mask, weight, bias, weight, bias, statistics, True, True, True, True
        )

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)

"""The stages that a synchronised batch norm has of its own, against fp64 torch."""

import math

import pytest
import torch
import torch.nn.functional as F

from fusedskip import backends, ops

from .support import DTYPES, LAYOUTS, SHAPES, interpreted, lay_out, per_channel_view


def shapes_of(backend):
    return [(3, 2, 5)] if interpreted(backend) else SHAPES


def activation(shape, layout, device, dtype, shift=0.0):
    values = torch.randn(shape, dtype=torch.float64) + shift
    return lay_out(values.to(device, dtype), layout)


def channel_rows(x):
    """(C, elements a channel), in fp64 on the CPU."""
    return x.cpu().double().transpose(0, 1).flatten(1)


def eps_of(dtype):
    return torch.finfo(dtype).eps


def true_moments(x):
    """Mean and M2 of each channel. Subtracting 1000 from near it is exact."""
    deviations = channel_rows(x) - 1000
    count = deviations.shape[1]
    return 1000 + deviations.mean(1), deviations.var(1, correction=0) * count, count


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats(backend, device, layout, dtype):
    """As good as eager's, mean >> std, but for four roundings."""
    stats = backends.KERNELS[backend].batch_norm_stats
    for shape in shapes_of(backend):
        x = activation(shape, layout, device, dtype, shift=1000)
        moments = stats(x)
        assert moments.dtype == ops.statistics_dtype(dtype)
        assert torch.equal(moments, stats(x))
        true_mean, true_m2, count = true_moments(x)
        buffers = torch.zeros(2, shape[1], dtype=moments.dtype, device=device)
        F.batch_norm(x, *buffers, training=True, momentum=1)
        eager_mean, eager_var = buffers.double().cpu()
        mean, m2, [our_count] = moments.double().cpu().split([shape[1], shape[1], 1])
        assert our_count == count
        for truth, eager, ours in (
            (true_mean, eager_mean, mean),
            (true_m2, eager_var * (count - 1), m2),
        ):
            bound = 2 * (eager - truth).abs().max() + 4 * eps_of(moments.dtype) * truth.abs().max()
            assert (ours - truth).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(4, 0, 1, 2), (0, 2, 5)], ids=str)
def test_merge_of_uneven_parts(backend, device, dtype, sizes):
    kernels = backends.KERNELS[backend]
    n_channels = 300  # more than a block of any kernel has
    x = activation((sum(sizes), n_channels), "contiguous", device, dtype, shift=1000)
    moments = torch.stack(
        [
            kernels.batch_norm_stats(part) if len(part) else x.new_zeros(2 * n_channels + 1)
            for part in x.split(sizes)
        ]
    )
    mean, var, count = kernels.batch_norm_merge(moments, None, None, 0.1)
    assert mean.dtype == var.dtype == count.dtype == dtype
    true_mean, true_m2, true_count = true_moments(x)
    assert count.tolist() == [true_count]
    # The means that ranks send are rounded, and so is theirs.
    rounding = 2 * eps_of(dtype) * true_mean.abs().max()
    spread = (channel_rows(x) - true_mean[:, None]).abs().max()
    assert (mean.cpu() - true_mean).abs().max() <= rounding
    assert (var.cpu() - true_m2 / true_count).abs().max() <= spread * rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_updates_running_statistics(backend, device, dtype):
    kernels = backends.KERNELS[backend]
    x = activation((6, 3), "contiguous", device, ops.statistics_dtype(dtype))
    running = [torch.rand(3, dtype=torch.float64).to(device, dtype) for _ in range(2)]
    expected = [vector.cpu().to(torch.float64, copy=True) for vector in running]
    F.batch_norm(x.double().cpu(), *expected, training=True, momentum=0.3)
    moments = torch.stack([kernels.batch_norm_stats(part) for part in x.split([2, 4])])
    kernels.batch_norm_merge(moments, *running, 0.3)
    for ours, want in zip(running, expected, strict=True):
        assert ours.dtype == dtype
        rtol = eps_of(dtype)
        torch.testing.assert_close(ours.double().cpu(), want, rtol=rtol, atol=4 * rtol)


def test_nan_and_inf_spread_to_their_channels(backend, device):
    kernels = backends.KERNELS[backend]
    x = activation((4, 5), "contiguous", device, torch.float32)
    x[0, 1], x[3, 2], x[0, 3], x[3, 3] = math.nan, math.inf, math.inf, -math.inf
    running, expected = torch.zeros(2, 5, device=device), torch.zeros(2, 5)
    F.batch_norm(x.cpu(), *expected, training=True, momentum=1)
    moments = torch.stack([kernels.batch_norm_stats(part) for part in x.split([1, 3])])
    mean, var, _ = kernels.batch_norm_merge(moments, *running, 1.0)
    torch.testing.assert_close(mean.cpu(), expected[0], equal_nan=True)
    for ours, want in zip(running, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), want, equal_nan=True)
    assert var.isnan().tolist() == [False, True, True, True, False]


def forward(kernels, x, weight, bias, residual, relu=True):
    """out, mask or None, and the statistics of a norm in training."""
    saves = relu and residual is not None
    out, mask, statistics = kernels.batch_norm(
        x, residual, weight, bias, None, None, True, 0.1, 1e-5, relu, saves
    )
    return out, mask if saves else None, statistics


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ["mask", "recomputed", "none"])
def test_backward_apply(backend, device, layout, dtype, gate):
    """By its formula, and by forward's own gate."""
    kernels = backends.KERNELS[backend]
    for shape in shapes_of(backend):
        x, dout, residual = (activation(shape, layout, device, dtype) for _ in range(3))
        weight, bias = (torch.randn(shape[1], dtype=dtype, device=device) for _ in range(2))
        relu = gate != "none"
        out, mask, statistics = forward(
            kernels, x, weight, bias, residual if gate == "mask" else None, relu
        )
        g = torch.where(out > 0, dout, 0) if relu else dout
        mean, rstd = statistics
        centred = x.double() - per_channel_view(mean.double(), x)
        x_hat = centred * per_channel_view(rstd.double(), x)
        # Not those of this x: the rest of the batch is elsewhere.
        means = torch.randn(2, shape[1], dtype=torch.float64).to(device, mean.dtype)
        mean_g, mean_gx = (per_channel_view(vector.double(), x) for vector in means)
        dx, dresidual = kernels.batch_norm_backward_apply(
            dout, x, mask, weight, bias, statistics, means.flatten(), relu, True, True
        )
        assert torch.equal(dresidual, g)
        scale = per_channel_view(weight.double() * rstd.double(), x)
        want = scale * (g.double() - mean_g - x_hat * mean_gx)
        terms = scale.abs() * (g.double().abs() + mean_g.abs() + (x_hat * mean_gx).abs())
        bound = eps_of(dtype) * want.abs().max() + 4 * eps_of(mean.dtype) * terms.max()
        assert (dx.double() - want).abs().max() <= bound


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(3,), (2, 1)], ids=str)
def test_parts_of_a_batch_are_one_norm(backend, device, layout, sizes):
    """Forward and backward of one rank or two; collectives are a stack and a sum."""
    kernels = backends.KERNELS[backend]
    n_channels = 3
    shape = (sum(sizes), n_channels, 2, 3)
    x, residual, dout = (activation(shape, layout, device, torch.float64) for _ in range(3))
    weight, bias = torch.randn(2, n_channels, dtype=torch.float64, device=device)
    out, mask, statistics = forward(kernels, x, weight, bias, residual)
    dx, dresidual, dweight, dbias = kernels.batch_norm_backward(
        dout, x, mask, weight, bias, statistics, True, True, True, True, True
    )

    parts = list(zip(*(tensor.split(sizes) for tensor in (x, residual, dout)), strict=True))
    moments = torch.stack([kernels.batch_norm_stats(part) for part, _, _ in parts])
    mean, var, count = kernels.batch_norm_merge(moments, None, None, 0.1)
    normalised = [
        kernels.batch_norm(
            part, skip, weight, bias, mean, var, False, 0.0, 1e-5, True, True
        )
        for part, skip, _ in parts
    ]  # fmt: skip
    saved = [
        (gradient, part, mask, weight, bias, statistics)
        for (part, _, gradient), (_, mask, statistics) in zip(parts, normalised, strict=True)
    ]
    sums = [
        kernels.batch_norm_backward(*given, False, True, False, False, True)[2:] for given in saved
    ]
    sum_gx, sum_g = (sum(of_ranks) for of_ranks in zip(*sums, strict=True))
    means = torch.cat([sum_g, sum_gx]) / count
    gradients = [
        kernels.batch_norm_backward_apply(*given, means, True, True, True) for given in saved
    ]
    for ours, want in (
        (torch.cat([part for part, *_ in normalised]), out),
        (torch.cat([of_x for of_x, _ in gradients]), dx),
        (torch.cat([of_residual for _, of_residual in gradients]), dresidual),
        (sum_gx, dweight),
        (sum_g, dbias),
    ):
        torch.testing.assert_close(ours, want)


def test_only_what_is_needed(backend, device):
    kernels = backends.KERNELS[backend]
    x, dout = (activation((2, 3, 5), "contiguous", device, torch.float32) for _ in range(2))
    _, mask, statistics = forward(kernels, x, None, None, None)
    given = dout, x, mask, None, None, statistics, torch.rand(6, device=device), True
    everything = kernels.batch_norm_backward_apply(*given, True, True)
    for needs in ((True, False), (False, True), (False, False)):
        results = kernels.batch_norm_backward_apply(*given, *needs)
        for part, whole, needed in zip(results, everything, needs, strict=True):
            assert torch.equal(part, whole) if needed else part.shape == (0,)

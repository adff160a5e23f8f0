"""The raw operators: torch's checks of schema, fakes and strides, and the format of the mask."""

import itertools

import pytest
import torch

from fusedskip import backends, ops

from .support import LAYOUTS, interpreted, lay_out

SHAPES = ((4, 3), (3, 9, 5), (2, 3, 5, 7), (2, 16, 1, 1), (3, 1, 4, 4), (2, 3, 2, 3, 4))


def activation(shape, layout, device, dtype=torch.float32):
    return lay_out(torch.randn(shape, dtype=dtype, device=device), layout)


def batch_norm_arguments(shape, layout, device, residual, training, dtype=torch.float32):
    vectors = [torch.rand(shape[1], device=device) + 0.5 for _ in range(4)]
    return (
        activation(shape, layout, device, dtype),
        activation(shape, layout, device, dtype) if residual else None,
        *vectors, training, 0.1, 1e-5, True, residual,
    )  # fmt: skip


def opcheck(op, arguments, symbolic=True):
    """torch.library.opcheck; `symbolic` is its tracing with symbols for sizes, 95% of the time.

    The fake is all that symbols meet of an op, one for all backends, and flags are no symbols: so
    interpreted, and for further flags, it is left out.
    """
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if symbolic:
        utils.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op, arguments, test_utils=utils)


def operators(backend):
    """Those of a backend as torch knows them, which `backends.KERNELS` may have wrapped."""
    return getattr(torch.ops, ops.TRITON if backend == "triton" else ops.COMPILED)


def shapes_of(backend):
    """Interpreted, two: test_mask has all."""
    return SHAPES[1:3] if interpreted(backend) else SHAPES


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_add_relu(backend, device, layout):
    kernels = operators(backend)
    for shape in SHAPES:
        x, residual = (activation(shape, layout, device) for _ in range(2))
        for flags in itertools.product((True, False), repeat=2):
            opcheck(kernels.add_relu, (x, residual, *flags), symbolic=flags[0])
        _, mask = kernels.add_relu(x, residual, False, True)
        opcheck(kernels.add_relu_backward, (x, mask))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_opcheck_batch_norm(backend, device, layout, training):
    kernels = operators(backend)
    for shape, residual in itertools.product(shapes_of(backend), (True, False)):
        arguments = batch_norm_arguments(shape, layout, device, residual, training)
        opcheck(kernels.batch_norm, arguments, symbolic=not interpreted(backend))
        x, _, weight, bias, *_ = arguments
        _, mask, statistics = kernels.batch_norm(*arguments)
        if not training:
            inference = (*arguments[:6], 1e-5, True)
            opcheck(kernels.batch_norm_inference, inference, symbolic=not interpreted(backend))
        for needs in ((True, residual, True), (False, False, True), (True, False, False)):
            opcheck(
                kernels.batch_norm_backward,
                (
                    torch.randn_like(x), x, mask if residual else None, weight, bias, statistics,
                    training, True, *needs,
                ),
                symbolic=all(needs[::2]) and not interpreted(backend),
            )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_opcheck_batch_norm_into(backend, device, layout, training):
    kernels = operators(backend)
    for shape in shapes_of(backend):
        x, _, weight, bias, *running = batch_norm_arguments(shape, layout, device, False, True)[:6]
        # opcheck makes a copy of a part of a tensor, which then lies otherwise.
        arguments = (x, weight, bias, *running, torch.empty_like(x), training, 0.1, 1e-5)
        opcheck(kernels.batch_norm_relu_into, arguments, symbolic=not interpreted(backend))


def dual_batch_norm_arguments(shape, layout, device, training, save_mask=True):
    vectors = [torch.rand(shape[1], device=device) + 0.5 for _ in range(8)]
    activations = [activation(shape, layout, device) for _ in range(2)]
    return (*activations, *vectors, training, 0.1, 1e-5, 0.2, 1e-3, save_mask)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_opcheck_dual_batch_norm(backend, device, layout, training):
    kernels = operators(backend)
    for shape in shapes_of(backend):
        arguments = dual_batch_norm_arguments(shape, layout, device, training)
        opcheck(kernels.dual_batch_norm, arguments, symbolic=not interpreted(backend))
        _, mask, statistics = kernels.dual_batch_norm(*arguments)
        x, residual, weight, bias, _, _, residual_weight, residual_bias, *_ = arguments
        saved = (mask, weight, bias, residual_weight, residual_bias, statistics, training)
        for needs in ((True, True, True), (False, True, False)):
            opcheck(
                kernels.dual_batch_norm_backward,
                (torch.randn_like(x), x, residual, *saved, *needs),
                symbolic=all(needs) and not interpreted(backend),
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_synchronised_batch_norm(backend, device, layout):
    kernels = operators(backend)
    x, _, weight, bias, *running = batch_norm_arguments(SHAPES[2], layout, device, False, True)[:6]
    opcheck(kernels.batch_norm_stats, (x,))
    moments = kernels.batch_norm_stats(x).expand(3, -1).contiguous()
    opcheck(kernels.batch_norm_merge, (moments, *running, 0.1))
    mean, var, _ = kernels.batch_norm_merge(moments, None, None, 0.1)
    opcheck(
        kernels.batch_norm_backward_apply,
        (
            x, x, None, weight, bias, torch.stack([mean, var]), torch.cat([mean, var]),
            True, True, False,
        ),
    )  # fmt: skip


def unpack(mask, row_length):
    """The bits of a mask as a bool tensor (rows, row_length), and those of its padding."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    bits = bits.flatten(1).bool()
    return bits[:, :row_length], bits[:, row_length:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mask(backend, device, layout, dtype):
    """One bit an element in memory order, rows padded with zeros to whole bytes."""
    for shape in SHAPES:
        arguments = batch_norm_arguments(shape, layout, device, True, True, dtype)
        if dtype == torch.float64:
            vectors = [v if v is None else v.double() for v in arguments[2:6]]
            arguments = (*arguments[:2], *vectors, *arguments[6:])
        x = arguments[0]
        out, mask, _ = backends.KERNELS[backend].batch_norm(*arguments)
        view = ops.memory_view(x)
        assert tuple(mask.shape) == ops.mask_shape(view)
        in_memory_order = out if view[2] > 1 or x.dim() == 2 else out.movedim(1, -1)
        row_length = view[2] if view[2] > 1 else view[1]
        bits, padding = unpack(mask, row_length)
        assert torch.equal(bits.flatten(), in_memory_order.contiguous().flatten() > 0)
        assert not padding.any()
        assert mask.dtype == torch.uint8


def test_nothing_is_computed_that_was_not_asked_for(backend, device):
    kernels = backends.KERNELS[backend]
    arguments = batch_norm_arguments((2, 3, 4, 5), "contiguous", device, True, True)
    x, residual, weight, bias, *_ = arguments
    assert kernels.add_relu(x, residual, False, False)[1].shape == (0,)
    assert kernels.batch_norm(*arguments[:-1], False)[1].shape == (0,)
    _, mask, statistics = kernels.batch_norm(*arguments)
    results = kernels.batch_norm_backward(
        x, x, mask, weight, bias, statistics, True, True, False, False, False
    )
    assert all(result.shape == (0,) for result in results)

    *arguments, _ = dual_batch_norm_arguments((2, 3, 4, 5), "contiguous", device, True)
    assert kernels.dual_batch_norm(*arguments, False)[1].shape == (0,)
    _, mask, statistics = kernels.dual_batch_norm(*arguments, True)
    parameters = (*arguments[2:4], *arguments[6:8])
    results = kernels.dual_batch_norm_backward(
        x, x, residual, mask, *parameters, statistics, True, False, False, False
    )
    assert all(result.shape == (0,) for result in results)


def test_statistics_are_what_they_are_called(backend, device):
    arguments = batch_norm_arguments((5, 3, 4, 5), "channels_last", device, True, True)
    x = arguments[0]
    _, _, statistics = backends.KERNELS[backend].batch_norm(*arguments)
    rows = x.double().transpose(0, 1).flatten(1)
    expected = torch.stack([rows.mean(1), (rows.var(1, correction=0) + 1e-5).rsqrt()])
    torch.testing.assert_close(statistics.double(), expected, rtol=1e-6, atol=1e-6)


class TestCompiledOperatorsGuardMemory:
    """What goes around fusedskip.functional meets an error, not another tensor's memory."""

    kernels = backends.KERNELS["cpu"]
    x = torch.randn(2, 3, 4, 5)

    def batch_norm(self, x=x, **replaced):
        arguments = {
            "residual": None, "weight": None, "bias": None,
            "running_mean": None, "running_var": None, **replaced,
        }  # fmt: skip
        return self.kernels.batch_norm(x, *arguments.values(), True, 0.1, 1e-5, True, False)

    @pytest.mark.parametrize(
        "residual", [x[:1], x.double(), x.to(memory_format=torch.channels_last), x[..., 0]]
    )
    def test_residual(self, residual):
        with pytest.raises(RuntimeError, match="residual: expected"):
            self.batch_norm(residual=residual)
        with pytest.raises(RuntimeError, match="residual: expected"):
            self.kernels.add_relu(self.x, residual, False, False)
        with pytest.raises(RuntimeError, match="residual: expected"):
            self.kernels.dual_batch_norm(
                self.x, residual, *[None] * 8, True, 0.1, 1e-5, 0.1, 1e-5, True
            )

    def test_inference(self):
        for name, argument in (("residual", self.x[:1]), ("weight", torch.ones(2))):
            arguments = dict.fromkeys(("residual", "weight", "bias", "running_mean", "running_var"))
            arguments[name] = argument
            with pytest.raises(RuntimeError, match=f"{name}: expected"):
                self.kernels.batch_norm_inference(self.x, **arguments, eps=1e-5, relu=True)

    @pytest.mark.parametrize("vector", [torch.ones(2), torch.ones(3, 2)[:, 0], torch.ones(1, 3)])
    def test_channel_vectors(self, vector):
        with pytest.raises(RuntimeError, match="weight: expected"):
            self.batch_norm(weight=vector)

    def test_running_statistics(self):
        with pytest.raises(RuntimeError, match="running_mean, running_var: expected both"):
            self.batch_norm(running_mean=torch.ones(3))

    def test_statistics(self):
        """Those of a single norm are too few for a dual one."""
        dual = dual_batch_norm_arguments((2, 3, 4, 5), "contiguous", "cpu", True)
        _, mask, statistics = self.kernels.dual_batch_norm(*dual)
        for wrong in (statistics[0], statistics.double(), statistics.transpose(0, 1)):
            with pytest.raises(RuntimeError, match="statistics: not those"):
                self.kernels.dual_batch_norm_backward(
                    *dual[:1], *dual[:2], mask, *[None] * 4, wrong, True, True, True, True
                )

    @pytest.mark.parametrize(
        "moments", [torch.ones(7), torch.ones(2, 6), torch.ones(0, 7), torch.ones(2, 7).half()]
    )
    def test_moments(self, moments):
        with pytest.raises(RuntimeError, match="moments: expected those"):
            self.kernels.batch_norm_merge(moments, None, None, 0.1)

    def test_running_statistics_of_moments(self):
        with pytest.raises(RuntimeError, match="running_var: expected one number a channel"):
            self.kernels.batch_norm_merge(torch.ones(2, 7), None, torch.ones(7), 0.1)
        with pytest.raises(RuntimeError, match="running_mean: expected float64"):
            self.kernels.batch_norm_merge(torch.ones(2, 7), torch.ones(3).double(), None, 0.1)

    def test_no_elements(self):
        nothing = self.x[:0]
        for call in (
            lambda: self.kernels.add_relu(nothing, nothing, False, True),
            lambda: self.kernels.add_relu_backward(nothing, torch.ones(1, 0, dtype=torch.uint8)),
            lambda: self.batch_norm(nothing),
            lambda: self.kernels.batch_norm_stats(nothing),
        ):
            with pytest.raises(RuntimeError, match="x: expected elements"):
                call()

    def test_memory_that_is_not_filled(self):
        """An output laid out alike would be smaller than its elements, or have gaps."""
        for x in (torch.ones(1).expand(4), torch.ones(2, 6)[:, ::2]):
            with pytest.raises(RuntimeError, match="x: expected a dense tensor"):
                self.kernels.add_relu(x, x, False, True)
            with pytest.raises(RuntimeError, match="x: expected a dense tensor"):
                self.kernels.add_relu_backward(x, torch.ones(1, 1, dtype=torch.uint8))
        for x in (self.x[0, 0, 0], self.x[..., ::2], self.x[:1, :1].expand(2, 3, 4, 5)):
            with pytest.raises(RuntimeError, match="x: expected a dense"):
                self.batch_norm(x)

    def test_means(self):
        for means in (torch.ones(5), torch.ones(6).double()):
            with pytest.raises(RuntimeError, match="means: expected two a channel"):
                self.kernels.batch_norm_backward_apply(
                    self.x, self.x, None, None, None, torch.ones(2, 3), means, True, True, True
                )

    def test_strided_x(self):
        with pytest.raises(RuntimeError, match="x: expected a dense"):
            self.batch_norm(x=self.x[:, :2])

    def test_mask(self):
        with pytest.raises(RuntimeError, match="mask:"):
            self.kernels.add_relu_backward(self.x, torch.zeros(1, 3, dtype=torch.uint8))

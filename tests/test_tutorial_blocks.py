"""The tutorials' blocks against their eager twins."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedskip
from fusedskip import blocks, functional

from . import eager_blocks
from .support import LAYOUTS, assert_trains_alike, fused_calls, interpreted, lay_out

# The convolutional ones, by (in_channels, out_channels); SkipConnection's second are hidden.
KINDS = (
    "ResidualBlock",
    "PlainResidualBlock",
    "SkipConnection",
    "SkipConnectionBlock",
    "SkipConnectionBlockConcat",
)


def skip_sequential(module, in_channels, out_channels):
    """in_channels -> out_channels, of which the layers add the difference."""
    width = out_channels - in_channels
    return module.SkipSequential(
        nn.Conv2d(in_channels, width, 3, padding=1, padding_mode="reflect"),
        nn.Tanh(),
        nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect"),
    )


def repeating_block(module, in_channels, width):
    """The usual place of a SkipSequential: a strided convolution behind it takes both halves."""
    return nn.Sequential(
        skip_sequential(module, in_channels, in_channels + width),
        nn.Tanh(),
        nn.Conv2d(in_channels + width, width, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Tanh(),
    )


def make_pair(make):
    return [make(module) for module in (blocks, eager_blocks)]


def make_block(kind, *channels):
    return make_pair(lambda module: getattr(module, kind)(*channels))


@pytest.mark.parametrize("out_channels", [6, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_block_trains_as_its_twin(backend, device, kind, out_channels):
    if interpreted(backend):
        shape, steps = (2, 6, 2, 3), 2
    else:
        shape, steps = (3, 6, 5, 7), 3
    assert_trains_alike(*make_block(kind, 6, out_channels), shape, steps, device=device)


def test_skip_sequential_in_its_usual_place():
    """Reflect-padded, halved by the convolution behind, twice."""
    pair = make_pair(
        lambda module: nn.Sequential(
            repeating_block(module, 3, 16), repeating_block(module, 16, 24), nn.Flatten()
        )
    )
    assert_trains_alike(*pair, (2, 3, 8, 12))
    assert pair[0](torch.randn(2, 3, 8, 12).double()).shape == (2, 24 * 2 * 3)


def test_skip_sequential_fuses_a_norm_and_its_relu(monkeypatch):
    pair = make_pair(
        lambda module: module.SkipSequential(
            nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1)
        )
    )
    assert_trains_alike(*pair, (3, 4, 5, 5))
    calls = fused_calls(monkeypatch, pair[0], torch.randn(3, 4, 5, 5).double())
    assert calls == {"_batch_norm": 1}


def network(block, second):
    """3 -> 64 -> 128 channels, as in the tutorials."""
    return nn.Sequential(
        block(3, 64), second(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)
    )


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "SkipConnection"])
def test_two_block_network(kind):
    pair = make_pair(lambda module: network(getattr(module, kind), getattr(module, kind)))
    assert_trains_alike(*pair, (2, 3, 4, 5), steps=2)


def test_two_block_network_of_skip_connections():
    """They keep the channels, so a convolution widens in front."""
    pair = make_pair(
        lambda module: network(
            lambda *channels: nn.Sequential(module.SkipConnection(3, 6), nn.Conv2d(*channels, 1)),
            lambda *channels: nn.Sequential(module.SkipConnection(64, 8), nn.Conv2d(*channels, 1)),
        )
    )
    assert_trains_alike(*pair, (2, 3, 4, 5), steps=2)


def test_two_block_network_of_skip_sequentials():
    def block(module):
        return lambda *channels: skip_sequential(module, *channels)

    assert_trains_alike(*make_pair(lambda m: network(block(m), block(m))), (2, 3, 4, 5), steps=2)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    """The dtype is the twin's, the values as good as bf16 is."""
    ours, twin = make_block(kind, 6, 9)
    ours.load_state_dict(twin.state_dict())
    truth = copy.deepcopy(twin).double()
    x = torch.randn(3, 6, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        outs = [model(x) for model in (ours, twin)]
    assert outs[0].dtype == outs[1].dtype
    lost = [(out.double() - truth(x.double())).abs().max() for out in outs]
    assert lost[0] <= 2 * lost[1] + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", KINDS)
def test_layout_is_kept(kind, layout):
    block, _ = make_block(kind, 6, 9)
    block = block.to(memory_format=layout)
    x = torch.randn(2, 6, 4, 5).to(memory_format=layout)
    assert block(x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind):
    block = make_block(kind, 6, 9)[0].eval()
    x = torch.randn(2, 6, 4, 4)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(other) is type(block)
        assert torch.equal(other(x), block(x))


@pytest.mark.parametrize("kind", KINDS[2:])
def test_block_traces_whole(kind):
    torch._dynamo.reset()
    block = make_block(kind, 6, 9)[0]
    x = torch.randn(2, 6, 4, 4)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("kind", ["PlainResidualBlock", "SkipConnection", "SkipConnectionBlock"])
def test_one_image_without_a_batch(kind):
    """As many rows as channels, or a bias could not go wrong unnoticed."""
    ours, twin = make_block(kind, 6, 6)
    ours.load_state_dict(twin.state_dict())
    x = torch.randn(6, 6, 4)
    torch.testing.assert_close(ours(x), twin(x))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_no_images(kind):
    ours, twin = make_block(kind, 6, 8)
    for block in (ours, twin):
        out = block(torch.randn(0, 6, 4, 4))
        out.sum().backward()
        assert out.shape == (0, 6 if kind == "SkipConnection" else 8, 4, 4)
        assert all(not p.grad.any() for p in block.parameters())


class TestSkipConnection:
    def test_defaults_are_the_tutorials_channels(self):
        block = blocks.SkipConnection()
        assert block.conv_layer1.weight.shape == (6, 3, 3, 3)
        assert block.conv_layer2.weight.shape == (3, 6, 3, 3)
        assert blocks.SkipConnection(5).conv_layer1.out_channels == 10

    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
    @pytest.mark.parametrize("kernel_size", [1, 2, (2, 5)])
    def test_any_kernel_keeps_the_shape(self, kernel_size):
        x = torch.randn(2, 3, 7, 6)
        assert blocks.SkipConnection(3, 4, kernel_size)(x).shape == x.shape

    def test_tutorials_convolutions_are_refused(self):
        block = blocks.SkipConnection(3, 6, kernel_size=2, stride=2, padding=2)
        text = r"keep the shape \(1, 3, 32, 32\) of the input.* got \(1, 3, 11, 11\)"
        with pytest.raises(ValueError, match=text):
            block(torch.randn(1, 3, 32, 32))

    def test_nothing_is_broadcast(self):
        """32x1 halved is 16x1, and eager would spread 1x1 over an image."""
        block = blocks.SkipConnection(3, 6, kernel_size=4, stride=4, padding=0)
        with pytest.raises(ValueError, match=r"\(1, 3, 16, 16\) of the input.* got \(1, 3, 1, 1\)"):
            block(torch.randn(1, 3, 16, 16))

    def test_same_padding_takes_no_stride(self):
        with pytest.raises(ValueError, match="padding='same' is not supported"):
            blocks.SkipConnection(3, 6, stride=2)

    def test_a_relu_that_is_observed_is_called(self, monkeypatch):
        ours, twin = make_block("SkipConnection", 3, 4)
        ours.load_state_dict(twin.state_dict())
        x, seen = torch.randn(2, 3, 4, 4), []
        monkeypatch.setattr(functional, "relu_add", None)
        ours.relu2.register_forward_hook(lambda *_: seen.append("relu2"))
        assert torch.equal(ours(x), twin(x))
        assert seen == ["relu2"]
        ours.relu2 = nn.AdaptiveMaxPool2d(1)
        with pytest.raises(ValueError, match=r"got \(2, 3, 1, 1\)"):
            ours(x)


@pytest.mark.parametrize("kind", ["PlainResidualBlock", "SkipConnectionBlock"])
def test_shapes_of_branch_and_shortcut_must_agree(kind):
    block, _ = make_block(kind, 3, 4)
    block.conv2.stride = (2, 2)
    text = r"residual: expected shape \(2, 4, 4, 4\) like x, got \(2, 4, 8, 8\)"
    with pytest.raises(ValueError, match=text):
        block(torch.randn(2, 3, 8, 8))


class TestSkipSequential:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("spatial", [(5,), (4, 5), (2, 3, 4)])
    def test_result_may_be_changed_in_place(self, layout, spatial):
        """Also where autograd watches: it is no view of another tensor."""
        x = lay_out(torch.randn(2, 3, *spatial, dtype=torch.float64), layout).requires_grad_()
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(spatial) - 1](3).double()
        out = blocks.SkipSequential(norm, nn.ReLU())(x)
        assert out.stride() == lay_out(out, layout).stride()
        out.mul_(2)
        want = torch.cat([x, norm(x).relu()], 1) * 2
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)

    def test_is_a_sequential(self):
        layers = [nn.Conv2d(3, 4, 1), nn.Tanh()]
        block = blocks.SkipSequential(*layers)
        block.load_state_dict(nn.Sequential(*layers).state_dict())
        assert isinstance(block, nn.Sequential)
        assert block[0] is layers[0]
        assert len(block) == 2

    @pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6), (2, 5, 3, 3, 3)])
    def test_any_number_of_dimensions(self, shape):
        layer = {2: nn.Linear(5, 7), 3: nn.Conv1d(5, 7, 1), 5: nn.Conv3d(5, 7, 1)}[len(shape)]
        x = torch.randn(shape)
        out = blocks.SkipSequential(layer)(x)
        assert torch.equal(out, torch.cat([x, layer(x)], dim=1))

    @pytest.mark.parametrize(
        ("layer", "got"),
        [
            (nn.Conv2d(3, 4, 3, stride=2, padding=1), "(2, 4, 4, 4)"),
            (nn.Conv2d(3, 4, 3), "(2, 4, 6, 6)"),
            (nn.Flatten(), "(2, 192)"),
            (nn.Unflatten(0, (1, 2)), "(1, 2, 3, 8, 8)"),
        ],
    )
    def test_what_cannot_be_concatenated(self, layer, got):
        with pytest.raises(ValueError, match="a stride cannot stand inside") as error:
            blocks.SkipSequential(layer)(torch.randn(2, 3, 8, 8))
        assert f"shape (2, 3, 8, 8), got {got};" in str(error.value)

    def test_layers_that_are_observed_are_called(self):
        layers = [nn.BatchNorm2d(3), nn.ReLU()]
        seen = []
        layers[0].register_forward_hook(lambda *_: seen.append("norm"))
        blocks.SkipSequential(*layers)(torch.randn(2, 3, 4, 4))
        assert seen == ["norm"]


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def hooked(module, seen):
    module.register_forward_hook(lambda *_: seen.append("hook"))


def patched(module, seen):
    module.forward = lambda x, forward=module.forward: seen.append("forward") or forward(x)


def parametrized(module, seen):
    if hasattr(module, "weight"):
        nn.utils.parametrize.register_parametrization(module, "weight", Double())


def without_bias(module, seen):
    module.bias = None


BYPASSED = (
    ("SkipConnectionBlock", "conv2"),
    ("SkipConnectionBlock", "skip_projection"),
    ("SkipConnectionBlock", "relu"),
    ("SkipConnectionBlockConcat", "concat_projection"),
    ("SkipConnectionBlockConcat", "relu"),
)
CHANGES = (hooked, patched, parametrized, without_bias)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(("kind", "name"), BYPASSED)
def test_children_that_are_not_what_they_were_are_called(monkeypatch, kind, name, change):
    if name == "relu" and change in (parametrized, without_bias):
        pytest.skip("a ReLU has no parameters")
    ours, twin = (block.double() for block in make_block(kind, 6, 8))
    ours.load_state_dict(twin.state_dict())
    x, seen = torch.randn(2, 6, 4, 4).double(), ([], [])
    ours(x)
    for block, calls in zip((ours, twin), seen, strict=True):
        change(getattr(block, name), calls)
    monkeypatch.setattr(functional, "bias_add_relu", None)
    outs = []
    for block in (ours, twin):
        block.zero_grad()
        out = block(x)
        out.square().mean().backward()
        outs.append(out)
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("kind", ["SkipConnectionBlock", "SkipConnectionBlockConcat"])
def test_a_class_that_is_patched(monkeypatch, kind):
    ours, twin = (block.double() for block in make_block(kind, 6, 8))
    ours.load_state_dict(twin.state_dict())
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: forward(self, x) / 2)
    x = torch.randn(2, 6, 4, 4).double()
    torch.testing.assert_close(ours(x), twin(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["SkipConnectionBlock", "SkipConnectionBlockConcat"])
def test_global_hooks_fire(monkeypatch, kind):
    block, _ = make_block(kind, 6, 8)
    monkeypatch.setattr(functional, "bias_add_relu", None)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        block(torch.randn(2, 6, 4, 4))
    finally:
        handle.remove()
    assert set(block.children()) < set(seen)


class TestSkipConnectionBlockConcat:
    def test_tutorials_checkpoint(self):
        """The tutorial's own widths, where they fit: 64 = 128 - 128 // 2."""
        assert blocks.SkipConnectionBlockConcat(64, 128).concat_projection.weight.shape == (
            128, 128, 1, 1,
        )  # fmt: skip

    def test_odd_width(self):
        assert_trains_alike(*make_block("SkipConnectionBlockConcat", 3, 5), (2, 3, 4, 4))

    def test_shape_errors(self):
        x = torch.randn(2, 6, 8, 8)
        block = blocks.SkipConnectionBlockConcat(6, 8)
        with pytest.raises(ValueError, match=r"x: expected shape \(N, C, H, W\), got \(6, 8, 8\)"):
            block(x[0])
        block.conv2.stride = (2, 2)
        text = r"of the input, shape \(2, 6, 8, 8\), got \(2, 4, 4, 4\)"
        with pytest.raises(ValueError, match=text):
            block(x)
        block = blocks.SkipConnectionBlockConcat(6, 8)
        block.concat_projection = nn.Conv2d(8, 8, 1)  # the tutorial's
        text = r"takes 8 channels, got shapes \(2, 4, 8, 8\) and \(2, 6, 8, 8\)"
        with pytest.raises(ValueError, match=text):
            block(x)

    def test_a_projection_with_groups_is_called(self):
        ours, twin = make_block("SkipConnectionBlockConcat", 4, 8)
        for block in (ours, twin):
            block.concat_projection = nn.Conv2d(8, 8, 1, groups=2)
        assert_trains_alike(ours, twin, (2, 4, 4, 4))

    def test_a_wider_projection(self):
        """Any convolution of a concatenation is the sum of two: 3x3, strided, reflect-padded."""
        ours, twin = make_block("SkipConnectionBlockConcat", 4, 8)
        for block in (ours, twin):
            block.concat_projection = nn.Conv2d(
                8, 8, 3, stride=2, padding=1, padding_mode="reflect"
            )
        assert_trains_alike(ours, twin, (2, 4, 6, 5))

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_the_concatenated_tensor_is_never_made(self, layout):
        """Neither in forward nor, as a gradient, in backward; and less is kept in between."""
        shape, concatenated = (2, 24, 10, 10), (2, 40, 10, 10)
        kept = []
        for block, made in zip(
            make_block("SkipConnectionBlockConcat", 24, 32), (False, True), strict=True
        ):
            block.to(memory_format=layout)
            x = torch.randn(shape).to(memory_format=layout).requires_grad_()
            created, keeping = Created(), Kept(block)
            with fusedskip.use_backend("cpu"), created, keeping:
                out = block(x)
            with created:
                out.sum().backward()
            assert (concatenated in created.shapes) is made
            assert out.shape in created.shapes  # that shapes are seen at all
            kept.append(keeping.bytes)
        # Both keep x and what is before and behind conv2: the twin that within the concatenation,
        # beside a copy of x, and the output where ours has a bit an element of it.
        copy_of_x, output = (2 * channels * 10 * 10 * 4 for channels in (24, 32))
        assert kept[1] - kept[0] > 0.95 * (copy_of_x + output - output / 32)


class Created(TorchDispatchMode):
    """The shapes of all tensors that any operator returns, in backward too."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.shapes |= {t.shape for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        return result


class Kept(saved_tensors_hooks):
    """How many bytes autograd keeps for backward, parameters aside, each storage once."""

    def __init__(self, module):
        own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.storages = storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage  # held, so that no address comes back
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients(kind, training):
    ours, twin = (block.train(training) for block in make_block(kind, 6, 8))
    ours.load_state_dict(twin.state_dict())
    x = torch.randn(2, 6, 4, 5)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), twin(x))


@pytest.mark.parametrize("ending", ["norm and ReLU", "module"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_norm_at_the_end_of_skip_sequential_is_not_copied(backend, device, layout, ending):
    """It is written where it belongs: eager's values and gradients, and no call of cat."""
    norms = {"norm and ReLU": nn.BatchNorm2d(6), "module": fusedskip.BatchNormReLU2d(6)}
    tail = [norms[ending], nn.ReLU()][: 2 if ending == "norm and ReLU" else 1]
    fused = blocks.SkipSequential(nn.Conv2d(3, 6, 3, padding=1), *tail).double().to(device)
    nn.init.uniform_(norms[ending].bias)
    conv, norm = copy.deepcopy(fused[0]), nn.BatchNorm2d(6).double().to(device)
    norm.load_state_dict(norms[ending].state_dict())
    x = lay_out(torch.randn(2, 3, 5, 7, dtype=torch.float64, device=device), layout)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    with torch.profiler.profile() as profile:
        ours = fused(leaves[0])
    assert "aten::cat" not in {event.key for event in profile.key_averages()}
    theirs = torch.cat([leaves[1], norm(conv(leaves[1])).relu()], dim=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    dout = torch.randn_like(theirs)
    ours.backward(dout)
    theirs.backward(dout)
    pairs = [leaves, (fused[0].weight, conv.weight), (norms[ending].weight, norm.weight)]
    for a, b in (*pairs, (norms[ending].bias, norm.bias)):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
    assert norms[ending].num_batches_tracked == 1

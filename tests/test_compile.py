"""torch.compile traces through without a break; the values are those of eager mode."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad

import fusedskip
from fusedskip import blocks

from .libraries import torchvision
from .networks import skip_network, twins
from .support import CAT, FUNCTIONS, call, make_problem, run

# How AOTAutograd calls an operator that updates running statistics.
functionalized = torch.ops.higher_order.auto_functionalized_v2


@pytest.fixture(autouse=True)
def reset():
    """Or it would give up on a function that is compiled over and over."""
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
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
    assert out.stride() == run(problem)["out"].stride()


class Graphs:
    """A compiler that records the operators of each graph it is given, and runs it as it is."""

    def __init__(self):
        self.forward, self.backward = [], []

    def __call__(self, graph, inputs):
        return aot_autograd(
            fw_compiler=self.recorder(self.forward), bw_compiler=self.recorder(self.backward)
        )(graph, inputs)

    def recorder(self, graphs):
        def compile(graph, inputs):
            calls = [node for node in graph.graph.nodes if node.op == "call_function"]
            operators = (n.args[0] if n.target is functionalized else n.target for n in calls)
            graphs.append([op for op in operators if hasattr(op, "namespace")])
            return make_boxed_func(graph.forward)

        return compile

    def namespaces(self, graphs):
        return {target.namespace for graph in graphs for target in graph}


def results(network, x):
    leaf = x.clone().requires_grad_()
    out = network(leaf)
    out.square().mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return {"out": out.detach(), "x": leaf.grad, **gradients, **network.state_dict()}


@pytest.mark.parametrize(("training", "momentum"), [(True, 0.1), (True, None), (False, 0.1)])
def test_network_is_one_graph_for_all_batches(compiled_backend, device, training, momentum):
    """Whatever the batch size, and however many steps; with cumulative averages, too."""
    eager, fused = (n.train(training) for n in twins(device=device, dtype=torch.float64))
    for module in (*eager.modules(), *fused.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    graphs = Graphs()
    compiled = copy.deepcopy(fused)
    compiled.compile(fullgraph=True, dynamic=True, backend=graphs)
    for n in (4, 4, 3, 7):
        x = torch.randn(n, 3, 8, 8, device=device, dtype=torch.float64)
        for network in (eager, compiled):
            network.zero_grad()
        torch.testing.assert_close(results(compiled, x), results(eager, x))
    assert len(graphs.forward) == len(graphs.backward) == 1
    assert any(name.startswith("fusedskip") for name in graphs.namespaces(graphs.backward))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_resnet50_is_one_graph(compiled_backend, device, training):
    """53 norms, and no batch norm, sum or ReLU of torch's left beside the kernels."""
    network = fusedskip.fuse(torchvision.models.resnet50(), strict=True).to(device).train(training)
    graphs = Graphs()
    compiled = torch.compile(network, fullgraph=True, backend=graphs)
    for _ in range(2):
        compiled(torch.randn(2, 3, 32, 32, device=device))
    [forward] = graphs.forward
    kernels = [op for op in forward if op.namespace.startswith("fusedskip")]
    assert len(kernels) == 49  # four of them have two norms
    assert not {op.name() for op in forward} & {"aten::relu", "aten::native_batch_norm"}


def test_evaluation_without_gradients_is_left_to_inductor(compiled_backend, device):
    """It is pointwise, and Inductor fuses it with its neighbours."""
    eager, fused = (n.eval() for n in twins(device=device))
    graphs = Graphs()
    compiled = torch.compile(fused, fullgraph=True, backend=graphs)
    x = torch.randn(2, 3, 8, 8, device=device)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), eager(x))
    assert graphs.namespaces(graphs.forward) <= {"aten", "prims"}


def test_modules_and_blocks_trace_whole(compiled_backend, device):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.norm_add = fusedskip.BatchNormReLU2d(6), fusedskip.BatchNormAddReLU2d(6)
            self.add = fusedskip.AddReLU()
            self.blocks = nn.Sequential(
                blocks.BasicBlock(6, 6),
                blocks.ResidualBlock(6, 6),
                blocks.PlainResidualBlock(6, 6),
                blocks.SkipConnection(6),
                blocks.SkipConnectionBlock(6, 6),
                blocks.SkipConnectionBlockConcat(6, 6),
                blocks.SkipSequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()),
            )

        def forward(self, x):
            return self.blocks(self.add(self.norm_add(self.norm(x), x), x))

    network = Network().to(device, torch.float64)
    compiled = copy.deepcopy(network)
    compiled.compile(fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 5, 5, device=device, dtype=torch.float64)
    torch.testing.assert_close(results(compiled, x), results(network, x))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(compiled_backend, device, mode):
    """Its generated code around the kernels; with CUDA graphs where there is a GPU."""
    eager, fused = twins(device=device, dtype=torch.float64)
    compiled = copy.deepcopy(fused)
    compiled.compile(fullgraph=True, mode=mode)
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8, device=device, dtype=torch.float64)
        for network in (eager, compiled):
            network.zero_grad()
        torch.testing.assert_close(results(compiled, x), results(eager, x))


def test_network_that_is_fused_after_it_was_compiled(compiled_backend, device):
    """Dynamo guards on the classes of modules: it compiles again."""
    network = skip_network().to(device)
    x = torch.randn(2, 3, 8, 8, device=device)
    graphs = Graphs()
    compiled = torch.compile(network, fullgraph=True, backend=graphs)
    compiled(x)
    fusedskip.fuse(network)
    compiled(x)
    assert [len(graphs.namespaces([graph])) for graph in graphs.forward] == [1, 2]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_second_derivatives_are_refused(compiled_backend, device, compiler):
    """What runs the graph as it stands would leave out the terms of fused tails."""
    _, network = twins(device=device, dtype=torch.float64)
    x, weight = torch.randn(2, 3, 8, 8, device=device, dtype=torch.float64), network[0].weight
    compiled = torch.compile(network, fullgraph=True, backend=compiler)
    compiled(x).square().sum().backward()
    want = weight.grad
    network.zero_grad()
    network(x).square().sum().backward()
    torch.testing.assert_close(weight.grad, want)
    loss = compiled(x).square().sum()
    with pytest.raises(RuntimeError, match=r"cannot be differentiated|create_graph=False"):
        torch.autograd.grad(loss, weight, create_graph=True)


@pytest.mark.parametrize("function", ["add_relu", "batch_norm_add_relu", "cat_batch_norm_relu"])
def test_residual_that_is_x(compiled_backend, device, function):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=device)
    norm = function != "add_relu"
    options = {"running_mean": None, "running_var": None, "training": True} if norm else {}

    def tail(x):
        return getattr(fusedskip, function)(x, x, **options)

    gradients = []
    for run_tail in (tail, torch.compile(tail, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        run_tail(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_backward_copies_nothing(compiled_backend, device, function, layout):
    """Gradients come as they are laid out, and are not asked how: but for the part that `cat` has.

    A stride asked of one while tracing would have dynamo make all of them contiguous.
    """
    problem = make_problem(function, (2, 8, 4, 6), torch.float32, layout, device)
    graphs, leaves = Graphs(), problem.leaves()
    compiled = torch.compile(lambda x: call(problem, **leaves | x), backend=graphs, fullgraph=True)
    out = compiled({"x": leaves["x"]})
    torch.autograd.grad(out, list(leaves.values()), problem.dout)
    copies = [op for op in graphs.backward[0] if op._opname in ("clone", "copy", "copy_")]
    assert len(copies) == (function == CAT)


@pytest.mark.filterwarnings("ignore:fusedskip runs eagerly inside the transforms")
def test_tangents_of_a_function_compiled_without_them(compiled_backend, device):
    x, tangent = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64, device=device)

    def tail(x):
        return fusedskip.batch_norm_add_relu(x, x, None, None, training=True)

    def tangent_of(tail):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(tail(forward_ad.make_dual(x, tangent))).tangent

    compiled = torch.compile(tail, backend="aot_eager")
    compiled(x)
    torch.testing.assert_close(tangent_of(compiled), tangent_of(tail))


@pytest.mark.parametrize("name", ["bn1", "relu", "bn2"])
def test_a_child_patched_after_compiling(compiled_backend, device, name):
    eager = torchvision.models.resnet.BasicBlock(4, 4).to(device).eval()
    fused = fusedskip.fuse(copy.deepcopy(eager))
    fused.compile(backend="eager", fullgraph=True)
    x = torch.randn(2, 4, 5, 5, device=device)
    torch.testing.assert_close(fused(x), eager(x))
    for block in (eager, fused):
        getattr(block, name).forward = lambda x: 2 * x.abs() + 1
    torch.testing.assert_close(fused(x), eager(x))


def test_parameters_that_are_one(compiled_backend, device):
    """Two norms with one weight, one of which has that for its bias, too."""
    x, residual = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64, device=device)

    def tail(weight):
        out = fusedskip.batch_norm_add_relu(x, residual, None, None, weight, weight, training=True)
        return fusedskip.dual_batch_norm_add_relu(
            out, residual, *[None] * 4, weight=weight, residual_weight=weight, training=True
        )

    gradients = []
    for run_tail in (tail, torch.compile(tail, fullgraph=True, backend="aot_eager")):
        weight = torch.tensor([0.5, 1, 2], dtype=torch.float64, device=device, requires_grad=True)
        run_tail(weight).square().sum().backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


def test_channels_last_slice_of_any_size(compiled_backend, device):
    wide = torch.randn(2, 8, 6, 6, device=device).to(memory_format=torch.channels_last)

    def tail(wide):
        return fusedskip.batch_norm_relu(wide[:, :4], None, None, training=True)

    leaf = wide.requires_grad_()
    compiled = torch.compile(tail, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(leaf), tail(leaf))


def test_gradients_inside_the_graph_are_differentiated(compiled_backend, device):
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch does not trace autograd.grad")
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64, device=device)

    def penalty(weight):
        leaf = x.clone().requires_grad_()
        out = fusedskip.batch_norm_relu(leaf, None, None, weight, training=True)
        (dx,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        return dx.square().sum()

    gradients = []
    for run_penalty in (penalty, torch.compile(penalty, backend="aot_eager")):
        weight = torch.full((3,), 0.7, dtype=torch.float64, device=device, requires_grad=True)
        with torch._dynamo.config.patch(trace_autograd_ops=True):  # monkeypatch would delete it
            loss = run_penalty(weight)
        loss.backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:fusedskip runs eagerly where parameters")
def test_vectors_that_are_not_contiguous(compiled_backend, device):
    x, vectors = torch.randn(2, 3, 4, 4, device=device), torch.rand(3, 2, device=device)

    def tail(x, vectors):
        return fusedskip.batch_norm_relu(x, None, None, *vectors.unbind(1), training=True)

    leaf = vectors.requires_grad_()
    compiled = torch.compile(tail, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, leaf), tail(x, leaf))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at that of out
@pytest.mark.parametrize("function", [*FUNCTIONS, CAT])
def test_backward_alone_is_compiled(compiled_backend, device, function):
    """Compiled autograd takes the graph that eager calls have left."""
    problem = make_problem(function, (2, 8, 4, 5), torch.float32, "channels_last", device)
    want, leaves = run(problem), problem.leaves()
    torch._dynamo.utils.counters.clear()
    out = call(problem, **leaves, **problem.buffers())
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: out.backward(problem.dout), backend="aot_eager")()
    assert torch._dynamo.utils.counters["compiled_autograd"]["captures"] == 1
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, want[f"d{name}"])

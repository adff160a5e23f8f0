"""What leaves the process as a graph is made of torch's operators, and needs no fusedskip."""

import pytest
import torch
from torch import nn

import fusedskip
from fusedskip import blocks

from .libraries import torchvision
from .networks import twins

ONNX_OPERATORS = {"Conv", "Relu", "Add"}


def evaluated():
    _, network = twins()
    return network.eval(), torch.randn(2, 3, 8, 8)


class Functions(nn.Module):
    """Every public function, as a user's own network calls them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x, y):
        bn = self.norm
        running, affine = (bn.running_mean, bn.running_var), (bn.weight, bn.bias)
        x = fusedskip.add_relu(x, y)
        x = fusedskip.relu_add(x, y)
        x = fusedskip.bias_add_relu(x, y, bn.bias)
        x = fusedskip.batch_norm_relu(x, *running, *affine)
        x = fusedskip.batch_norm_add(x, y, *running, *affine)
        x = fusedskip.batch_norm_add_relu(x, y, *running, *affine, eps=1e-3)
        x = fusedskip.dual_batch_norm_add_relu(x, y, *running, *running, *affine, *affine)
        return fusedskip.cat_batch_norm_relu(x, y, *running, *affine)


class Modules(nn.Module):
    """The modules, as a user's own network holds them."""

    def __init__(self):
        super().__init__()
        self.norm = fusedskip.BatchNormReLU2d(3)
        self.norm_add = fusedskip.BatchNormAddReLU2d(3)
        self.add = fusedskip.AddReLU()

    def forward(self, x, y):
        return self.add(self.norm_add(input=self.norm(input=x), residual=y), y)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_export_has_torch_operators_alone(training):
    network, x = evaluated()
    program = torch.export.export(
        network.train(training), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    )
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {target.namespace for target in calls if hasattr(target, "namespace")} == {"aten"}
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(program.module()(x), network(x))


def test_functions_export():
    x, y = torch.randn(2, 2, 3, 4, 4)
    program = torch.export.export(Functions().eval(), (x, y))
    assert "fusedskip" not in {getattr(n.target, "namespace", "") for n in program.graph.nodes}
    torch.testing.assert_close(program.module()(x, y), Functions()(x, y))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the exporter's own
def test_onnx():
    """The norms are folded into the convolutions, as those of an eager model are."""
    reference = pytest.importorskip("onnx.reference")
    network, x = evaluated()
    model = torch.onnx.export(network, (x,), dynamo=True, verbose=False).model_proto
    assert {(node.domain, node.op_type) for node in model.graph.node} == {
        ("", op) for op in ONNX_OPERATORS
    }
    (out,) = reference.ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), network(x).detach())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # checks of shapes are constants
def test_jit_trace():
    network, x = evaluated()
    traced = torch.jit.trace(network, x)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not [kind for kind in kinds if kind.startswith("fusedskip")]
    torch.testing.assert_close(traced(x), network(x))


def nodes(graph):
    return [(node.op, node.target) for node in graph.nodes]


def test_fx_sees_a_fused_network_as_it_was():
    eager, fused = twins()
    traced = torch.fx.symbolic_trace(fused)
    # The name of the argument is that of the forward, the fused one's or torch's.
    assert nodes(traced.graph)[1:] == nodes(torch.fx.symbolic_trace(eager).graph)[1:]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(traced(x), eager(x))


def test_fx_sees_a_fused_block_of_a_constant_as_it_was():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = torchvision.models.resnet.BasicBlock(4, 4).eval()
            self.constant = nn.Buffer(torch.randn(2, 4, 5, 5))

        def forward(self, x):
            return x + self.block(self.constant)

    model, x = Constant(), torch.randn(2, 4, 5, 5)
    want = model(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(fusedskip.fuse(model))(x), want)


def test_fx_sees_one_call_for_a_function_or_module():
    traced = torch.fx.symbolic_trace(Functions())
    called = [target for op, target in nodes(traced.graph) if op == "call_function"]
    assert [function.__name__ for function in called] == [
        "add_relu", "relu_add", "bias_add_relu", "batch_norm_relu", "batch_norm_add",
        "batch_norm_add_relu", "dual_batch_norm_add_relu", "cat_batch_norm_relu",
    ]  # fmt: skip
    x, y = torch.randn(2, 2, 3, 4, 4)
    assert torch.equal(traced(x, y), Functions()(x, y))
    modules = Modules()
    traced = torch.fx.symbolic_trace(modules)
    assert [target for op, target in nodes(traced.graph) if op == "call_module"] == [
        "norm",
        "norm_add",
    ]
    assert torch.equal(traced.eval()(x, y), modules.eval()(x, y))
    assert modules.norm.num_batches_tracked == 0  # tracing is not training


FX_BLOCKS = {
    "BasicBlock": (lambda: blocks.BasicBlock(4, 4), (2, 4, 6, 6)),
    "Bottleneck": (lambda: blocks.Bottleneck(8, 2), (2, 8, 6, 6)),
    "ResNet": (lambda: blocks.ResNet(blocks.BasicBlock, (1, 1, 1, 1)), (2, 3, 32, 32)),
    "ResidualBlock": (lambda: blocks.ResidualBlock(4, 4), (2, 4, 6, 6)),
    "PlainResidualBlock": (lambda: blocks.PlainResidualBlock(4, 4), (2, 4, 6, 6)),
    "SkipConnection": (lambda: blocks.SkipConnection(4), (2, 4, 6, 6)),
    "SkipConnectionBlock": (lambda: blocks.SkipConnectionBlock(4, 6), (2, 4, 6, 6)),
    "SkipConnectionBlockConcat": (lambda: blocks.SkipConnectionBlockConcat(4, 6), (2, 4, 6, 6)),
    "SkipSequential": (lambda: blocks.SkipSequential(nn.Conv2d(4, 4, 1)), (2, 4, 6, 6)),
    "SkipConnectionRNN": (lambda: blocks.SkipConnectionRNN(4, 4), (2, 5, 4)),
}


@pytest.mark.parametrize("name", FX_BLOCKS)
def test_fx_traces_blocks(name):
    make, shape = FX_BLOCKS[name]
    network = nn.Sequential(make()).double()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), network(x))

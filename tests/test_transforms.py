"""torch.func: the same derivatives, by torch's own operators, and a warning that says so."""

import copy
import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vmap,
)

import fusedskip
from fusedskip import backends, functional

from .networks import skip_network, twins
from .support import CAT, NORMS, call, make_problem

pytestmark = pytest.mark.filterwarnings("ignore:fusedskip runs eagerly inside the transforms")


def evaluated_twins(device):
    return [network.eval() for network in twins(device=device, dtype=torch.float64)]


def images(device, n=3):
    return torch.randn(n, 3, 6, 6, dtype=torch.float64, device=device)


def test_functional_call_is_fused(compiled_backend, device, monkeypatch):
    eager, fused = twins(device=device, dtype=torch.float64)
    state = {name: 1.01 * tensor for name, tensor in eager.state_dict().items()}
    x = images(device)
    outs = [functional_call(m, copy.deepcopy(state), (x,)) for m in (fused, eager)]
    torch.testing.assert_close(*outs)
    monkeypatch.setattr(functional.reference, "batch_norm", None)
    functional_call(fused, copy.deepcopy(state), (x,))


def test_grad(compiled_backend, device):
    x = images(device)

    def gradients(network):
        buffers = dict(network.named_buffers())

        def loss(parameters):
            return functional_call(network, (parameters, buffers), (x,)).square().mean()

        return grad(loss)(dict(network.named_parameters()))

    torch.testing.assert_close(*map(gradients, evaluated_twins(device)))


def test_refused_in_training_before_anything_changes(compiled_backend, device):
    """`functional_call` without the buffers: a transform cannot count in a tensor around it."""
    norm = fusedskip.BatchNormReLU2d(3, device=device)
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(4, 3, 5, 5, device=device) + 3
    with pytest.raises(RuntimeError, match="attempted to call in-place"):
        grad(lambda p: functional_call(norm, p, (x,)).sum())(dict(norm.named_parameters()))
    torch.testing.assert_close(norm.state_dict(), before)


def test_per_sample_gradients(compiled_backend, device):
    x = images(device)

    def gradients(network):
        buffers = dict(network.named_buffers())

        def loss(parameters, image):
            return functional_call(network, (parameters, buffers), (image[None],)).square().mean()

        return vmap(grad(loss), (None, 0))(dict(network.named_parameters()), x)

    torch.testing.assert_close(*map(gradients, evaluated_twins(device)))


def test_ensemble(compiled_backend, device):
    networks = [fusedskip.fuse(skip_network().to(device, torch.float64)).eval() for _ in range(3)]
    x = images(device)
    parameters, buffers = stack_module_state(networks)
    outs = vmap(lambda *state: functional_call(networks[0], state, (x,)))(parameters, buffers)
    torch.testing.assert_close(outs, torch.stack([network(x) for network in networks]))


def test_vmap_over_the_residual_alone(compiled_backend, device):
    x, y = images(device), torch.stack([images(device), images(device)])
    mean, var = torch.zeros(3, device=device).double(), torch.ones(3, device=device).double()
    out = vmap(lambda residual: fusedskip.batch_norm_add_relu(x, residual, mean, var))(y)
    one_by_one = [fusedskip.batch_norm_add_relu(x, residual, mean, var) for residual in y]
    torch.testing.assert_close(out, torch.stack(one_by_one))
    torch.testing.assert_close(
        vmap(lambda residual: fusedskip.add_relu(x, residual))(y), torch.relu(x + y)
    )


def test_hessian_and_jacobian(compiled_backend, device):
    x, y = torch.randn(2, 2, 3, 2, dtype=torch.float64, device=device)

    def loss(x):
        return fusedskip.batch_norm_add_relu(x, y, None, None, training=True).square().sum()

    def eager(x):
        with fusedskip.use_backend("eager"):
            return loss(x)

    torch.testing.assert_close(hessian(loss)(x), hessian(eager)(x))
    torch.testing.assert_close(jacrev(loss)(x), jacrev(eager)(x))


@pytest.mark.filterwarnings("default:fusedskip runs eagerly")
def test_says_once_that_it_runs_eagerly(compiled_backend, device):
    backends._warn_once.cache_clear()
    x = torch.randn(2, 3, device=device)

    def transform():
        grad(lambda x: fusedskip.add_relu(x, x).sum())(x)

    with pytest.warns(UserWarning, match="fusedskip runs eagerly inside the transforms"):
        transform()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform()


@pytest.mark.parametrize("function", [*NORMS, CAT])
def test_compiled_grad(compiled_backend, device, function):
    """Dynamo traces into a transform, where nothing says that a gradient is needed."""
    torch._dynamo.reset()
    problem = make_problem(function, (4, 3, 5, 5), device=device)
    problem = problem.replaced(**dict.fromkeys(problem.buffers()))  # a transform refuses to write
    weight = problem.weight

    def loss(weight):
        return call(problem, **problem.tensors | {"weight": weight}).square().sum()

    torch.testing.assert_close(torch.compile(grad(loss))(weight), grad(loss)(weight))
    batch = torch.stack([weight, 2 * weight])
    torch.testing.assert_close(torch.compile(vmap(loss))(batch), vmap(loss)(batch))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch.func.linearize
@pytest.mark.parametrize("training", [True, False])
def test_forward_mode(compiled_backend, device, training):
    x, tangent = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64, device=device)
    mean, var = torch.zeros(3, device=device).double(), torch.ones(3, device=device).double()

    def tail(x):
        return fusedskip.batch_norm_relu(x, mean.clone(), var.clone(), training=training)

    want = jvp(tail, (x,), (tangent,))[1]
    assert want.abs().sum() > 1
    for leaf in (x, x.clone().requires_grad_()):
        with forward_ad.dual_level():
            got = forward_ad.unpack_dual(tail(forward_ad.make_dual(leaf, tangent))).tangent
        torch.testing.assert_close(got.detach(), want)
    torch.testing.assert_close(linearize(tail, x)[1](tangent), want)


@pytest.mark.parametrize("function", ["add_relu", "batch_norm_add_relu"])
def test_forward_mode_over_backward(compiled_backend, device, function):
    """A backward pass is linear in what it is given, and so are its tangents."""
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, device=device, requires_grad=True)
    dout, tangent = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64, device=device)
    statistics = () if function == "add_relu" else (x.new_zeros(3), x.new_ones(3))
    out = getattr(fusedskip, function)(x, dout, *statistics)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(dout, tangent)
        (dx,) = torch.autograd.grad(out, x, dual, retain_graph=True)
        got = forward_ad.unpack_dual(dx).tangent
    torch.testing.assert_close(got, torch.autograd.grad(out, x, tangent)[0])

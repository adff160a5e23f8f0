"""cuDNN's fused batch norm, through nvidia-cudnn-frontend: one graph forward, one backward.

Channels-last; the mask is a byte an element. Written without a GPU: the graphs have been built, and
never run.
"""

import functools
from collections.abc import Callable

import cudnn
import torch
from torch import Tensor

TYPES = {
    torch.float32: cudnn.data_type.FLOAT,
    torch.bfloat16: cudnn.data_type.BFLOAT16,
    torch.bool: cudnn.data_type.BOOLEAN,
}
SCALARS = torch.full((1, 1, 1, 1), 1e-5), torch.full((1, 1, 1, 1), 0.1)  # eps, momentum


@functools.cache
def handle():
    return cudnn.create_handle()


def new_graph(x: Tensor):
    return cudnn.pygraph(
        io_data_type=TYPES[x.dtype],
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=handle(),
    )


def ready(graph, inputs: list, outputs: dict) -> Callable[[list[Tensor], list[Tensor]], None]:
    """The call that runs it; `outputs` has the dtype of each."""
    for output, dtype in outputs.items():
        output.set_output(True).set_data_type(TYPES[dtype])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(graph.get_workspace_size(), device="cuda", dtype=torch.uint8)

    def run(tensors: list[Tensor], results: list[Tensor]) -> None:
        cudnn.set_stream(handle=handle(), stream=torch.cuda.current_stream().cuda_stream)
        pack = dict(zip((*inputs, *outputs), (*tensors, *results), strict=True))
        graph.execute(pack, workspace, handle=handle())

    return run


def forward_graph(tensors: list[Tensor]):
    """Of x, weight, bias, running statistics, eps, momentum, zeros, and perhaps a residual."""
    x = tensors[0]
    graph = new_graph(x)
    inputs = [graph.tensor_like(tensor) for tensor in tensors]
    names = "input", "scale", "bias", "in_running_mean", "in_running_var", "epsilon", "momentum"
    out, *statistics = graph.batchnorm(name="norm", **dict(zip(names, inputs, strict=False)))
    if len(inputs) > 8:
        out = graph.add(name="add", a=out, b=inputs[8])
    out = graph.relu(name="relu", input=out)
    mask = graph.cmp_gt(name="mask", input=out, comparison=inputs[7])
    dtypes = {out: x.dtype, mask: torch.bool} | dict.fromkeys(statistics, torch.float32)
    return ready(graph, inputs, dtypes)


def backward_graph(tensors: list[Tensor]):
    """Of dout, mask, x, weight, mean and rstd."""
    x = tensors[2]
    graph = new_graph(x)
    inputs = dout, mask, *norm = [graph.tensor_like(tensor) for tensor in tensors]
    g = graph.scale(name="relu", input=dout, scale=mask)
    names = "input", "scale", "mean", "inv_variance"
    dx, *parameters = graph.batchnorm_backward(
        name="norm", grad=g, **dict(zip(names, norm, strict=True))
    )
    dtypes = {g: x.dtype, dx: x.dtype} | dict.fromkeys(parameters, torch.float32)
    return ready(graph, inputs, dtypes)


_graphs: dict[tuple, Callable] = {}


def run(make: Callable, tensors: list[Tensor], results: list[Tensor]) -> None:
    key = make, len(tensors), tensors[0].dtype, tensors[0].shape, tensors[0].stride()
    if key not in _graphs:
        _graphs[key] = make(tensors)
    _graphs[key](tensors, results)


class BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, zero, mean, var, weight, bias):
        vectors = [vector.detach().view(1, -1, 1, 1) for vector in (weight, bias, mean, var)]
        out, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
        saved_mean, rstd = torch.empty_like(vectors[0]), torch.empty_like(vectors[0])
        added = [] if residual is None else [residual]
        run(
            forward_graph,
            [x, *vectors, *SCALARS, zero, *added],
            [out, mask, saved_mean, rstd, *vectors[2:]],
        )
        ctx.save_for_backward(mask, x, vectors[0], saved_mean, rstd)
        return out

    @staticmethod
    def backward(ctx, dout):
        mask, x, weight, *statistics = ctx.saved_tensors
        g, dx = torch.empty_like(x), torch.empty_like(x)
        dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
        run(backward_graph, [dout, mask, x, weight, *statistics], [g, dx, dweight, dbias])
        return dx, g, None, None, None, dweight.view(-1), dbias.view(-1)


@functools.lru_cache(maxsize=1)
def zeros(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="cuda").zero_()


def forward(function: str, inputs) -> Tensor:
    x, residual, *norm = inputs[:6]
    added = residual if function == "batch_norm_add_relu" else None
    return BatchNormReLU.apply(x, added, zeros(x.shape, x.stride(), x.dtype), *norm)

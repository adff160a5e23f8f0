"""What the public functions demand of their arguments; every message names the argument."""

import torch
from torch import Tensor

# Of activations, and those of the parameters and buffers that go with each.
_DTYPES = {
    torch.float64: (torch.float64,),
    torch.float32: (torch.float32,),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}


def check_activation(x: Tensor) -> None:
    """Raise `TypeError` unless kernels take tensors like `x`."""
    _check_tensor("x", x)
    if x.dtype not in _DTYPES:
        raise TypeError(f"x: expected dtype float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else x.layout
        raise TypeError(f"x: expected a strided tensor, got layout {layout}")


def check_same_shape(residual: Tensor, x: Tensor) -> None:
    """Raise `ValueError`, which names both shapes, if they differ: a sum never broadcasts.

    `TypeError` unless it is a tensor.
    """
    _check_tensor("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual: expected shape {tuple(x.shape)} like x, got {tuple(residual.shape)}"
        )


def _check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        text = f"{name}: expected dtype {x.dtype} like x, got {tensor.dtype}"
        if torch.is_autocast_enabled(x.device.type):
            text += f"; autocast converts neither: {name}.to(x.dtype)"
        raise TypeError(text)
    if tensor.layout != x.layout:
        raise TypeError(f"{name}: expected layout {x.layout} like x, got {tensor.layout}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} like x, got {tensor.device}")


def check_residual(residual: Tensor, x: Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless `residual` is like `x`."""
    check_same_shape(residual, x)
    _check_like("residual", residual, x)


def check_skip(skip: Tensor, x: Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless `skip` is like `x` but for its channels."""
    _check_tensor("skip", skip)
    if skip.shape[:1] + skip.shape[2:] != x.shape[:1] + x.shape[2:] or skip.dim() != x.dim():
        raise ValueError(
            f"skip: expected shape {tuple(x.shape)} of x but for the channels, "
            f"got {tuple(skip.shape)}"
        )
    _check_like("skip", skip, x)


def _channel_vector_error(name: str, vector: Tensor, x: Tensor) -> Exception:
    _check_tensor(name, vector)
    if vector.shape != x.shape[1:2]:
        return ValueError(
            f"{name}: expected shape ({x.shape[1]},) for x of shape {tuple(x.shape)}, "
            f"got {tuple(vector.shape)}"
        )
    if vector.dtype not in (dtypes := _DTYPES[x.dtype]):
        expected = " or ".join(map(str, dtypes))
        return TypeError(
            f"{name}: expected dtype {expected} for x of {x.dtype}, got {vector.dtype}"
        )
    return ValueError(f"{name}: expected device {x.device} like x, got {vector.device}")


def check_channel_vectors(x: Tensor, **vectors: Tensor | None) -> None:
    """Raise `TypeError` or `ValueError` unless each is one number a channel of `x`, or None."""
    channels, device, dtypes = x.shape[1:2], x.device, _DTYPES[x.dtype]
    for name, vector in vectors.items():
        if vector is not None and not (
            isinstance(vector, Tensor)
            and vector.shape == channels
            and vector.dtype in dtypes
            and vector.device == device
        ):
            raise _channel_vector_error(name, vector, x)


def check_channels(x: Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless `x` is an activation `(N, C, *)`."""
    check_activation(x)
    if x.dim() < 2:
        raise ValueError(f"x: expected at least 2 dimensions (N, C, *), got shape {tuple(x.shape)}")


def _names(prefix: str) -> str:
    return f"{prefix}running_mean, {prefix}running_var"


def check_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    prefix: str = "",
) -> None:
    """Raise `ValueError` unless there are the statistics that the mode needs, and no others.

    `TypeError` unless the mode is one.
    """
    if not isinstance(training, bool):
        raise TypeError(f"training: expected a bool, got {type(training).__name__}")
    if running_mean is None or running_var is None:
        if running_mean is not running_var:
            raise ValueError(f"{_names(prefix)}: expected both or neither")
        if not training:
            raise ValueError(f"{_names(prefix)}: expected tensors when not training")
    elif (running_mean.requires_grad or running_var.requires_grad) and torch.is_grad_enabled():
        raise ValueError(f"{_names(prefix)}: expected tensors that require no gradient")
    if training:
        if eps <= 0:
            raise ValueError(f"{prefix}eps: expected a positive number when training, got {eps}")
    elif eps < 0:
        raise ValueError(f"{prefix}eps: expected a number not below 0, got {eps}")


def check_batch_norm(
    x: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    synchronised: bool = False,
) -> None:
    """Raise `TypeError` or `ValueError` unless the arguments of a `batch_norm_*` function fit.

    Synchronised with other processes, one value a channel, or none, may be this one's part.
    """
    check_channels(x)
    if residual is not None:
        check_residual(residual, x)
    check_channel_vectors(
        x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias
    )
    check_statistics(running_mean, running_var, training, eps)
    if training and not synchronised and x.numel() == x.shape[1] > 0:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
        )

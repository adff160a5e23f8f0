"""fusedskip: the tail of every skip connection as one fused operation, forward and backward."""

from fusedskip.backends import available_backends, use_backend
from fusedskip.functional import add_relu, batch_norm_add, batch_norm_add_relu, batch_norm_relu
from fusedskip.modules import (
    AddReLU,
    BatchNormAddReLU1d,
    BatchNormAddReLU2d,
    BatchNormAddReLU3d,
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
)

__version__ = "0.1.0"

__all__ = [
    "AddReLU",
    "BatchNormAddReLU1d",
    "BatchNormAddReLU2d",
    "BatchNormAddReLU3d",
    "BatchNormReLU1d",
    "BatchNormReLU2d",
    "BatchNormReLU3d",
    "add_relu",
    "available_backends",
    "batch_norm_add",
    "batch_norm_add_relu",
    "batch_norm_relu",
    "use_backend",
]

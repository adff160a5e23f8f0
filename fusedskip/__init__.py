"""fusedskip: the tail of every skip connection as one fused operation, forward and backward."""

from fusedskip.backends import available_backends, use_backend
from fusedskip.functional import (
    add_relu,
    batch_norm_add,
    batch_norm_add_relu,
    batch_norm_relu,
    bias_add_relu,
    cat_batch_norm_relu,
    dual_batch_norm_add_relu,
    relu_add,
)
from fusedskip.modules import (
    AddReLU,
    BatchNormAddReLU1d,
    BatchNormAddReLU2d,
    BatchNormAddReLU3d,
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
    SyncBatchNorm,
    SyncBatchNormAddReLU,
    SyncBatchNormReLU,
    convert_sync_batchnorm,
)
from fusedskip.surgery import explain, fuse, unfuse

__version__ = "0.1.0"

__all__ = [
    "AddReLU",
    "BatchNormAddReLU1d",
    "BatchNormAddReLU2d",
    "BatchNormAddReLU3d",
    "BatchNormReLU1d",
    "BatchNormReLU2d",
    "BatchNormReLU3d",
    "SyncBatchNorm",
    "SyncBatchNormAddReLU",
    "SyncBatchNormReLU",
    "add_relu",
    "available_backends",
    "batch_norm_add",
    "batch_norm_add_relu",
    "batch_norm_relu",
    "bias_add_relu",
    "cat_batch_norm_relu",
    "convert_sync_batchnorm",
    "dual_batch_norm_add_relu",
    "explain",
    "fuse",
    "relu_add",
    "unfuse",
    "use_backend",
]

"""The four stages in Triton: stats, apply, bwd_reduce and bwd_apply, behind the raw ops.

Nothing here imports fusedskip: a call goes ops → launcher → kernel; checks are the caller's.
"""

from triton import knobs

from . import interpreter
from .ops import (
    add_relu,
    add_relu_backward,
    batch_norm,
    batch_norm_backward,
    batch_norm_backward_apply,
    batch_norm_merge,
    batch_norm_relu_into,
    batch_norm_stats,
    dual_batch_norm,
    dual_batch_norm_backward,
)

__all__ = [
    "add_relu",
    "add_relu_backward",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_apply",
    "batch_norm_merge",
    "batch_norm_relu_into",
    "batch_norm_stats",
    "dual_batch_norm",
    "dual_batch_norm_backward",
]

if knobs.runtime.interpret:
    interpreter.repair()

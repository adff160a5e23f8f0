"""The traffic model: how much memory each runner must move, in training.

The operations are memory-bound, so bytes over time is what to judge them by. Caches can undercut
the model, where a second read of a tensor comes from a cache; nothing goes below `floor`, where it
stays on chip.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Passes over one activation tensor, and over one 1-bit mask."""

    tensors: int
    masks: int = 0

    def bytes(self, numel: int, itemsize: int) -> float:
        return self.tensors * numel * itemsize + self.masks * numel / 8

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.tensors + other.tensors, self.masks + other.masks)


BYTES = 8  # in 1-bit masks

# eager: torch's kernels, with add_ and relu_ in place. compile: what Inductor makes of them; its
# masks are a byte an element. fused: stats, apply; bwd_reduce, bwd_apply. floor: no tensor is read
# twice.
FORWARD = {
    "batch_norm_add_relu": {
        "eager": Traffic(8),  # read x twice, write out; read out, residual, write; read out, write
        "compile": Traffic(4, BYTES),  # read x; read x, residual, write out, bytes
        "fused": Traffic(4, 1),  # read x; read x, residual, write out, mask
        "floor": Traffic(3, 1),  # read x, residual, write out, mask
    },
    "batch_norm_relu": {
        "eager": Traffic(5),  # read x twice, write out; read out, write out
        "compile": Traffic(3, BYTES),  # read x; read x, write out, bytes
        "fused": Traffic(3),  # read x; read x, write out
        "floor": Traffic(2),  # read x, write out
    },
    # Two tensors, each with a norm of its own, and their sum.
    "dual_batch_norm_add_relu": {
        "eager": Traffic(11),  # read twice, write, of x and residual; read both, write; read, write
        "compile": Traffic(5, BYTES),  # read x, residual; read x, residual, write out, bytes
        "fused": Traffic(5, 1),  # read x, residual; read x, residual, write out, mask
        "floor": Traffic(3, 1),  # read x, residual, write out, mask
    },
    "batch_norm_add": {
        "eager": Traffic(6),  # read x twice, write out; read out, residual, write
        "compile": Traffic(4),  # read x; read x, residual, write out
        "fused": Traffic(4),
        "floor": Traffic(3),  # read x, residual, write out
    },
    # skip has as many channels as x, so that out is two tensors.
    "cat_batch_norm_relu": {
        "eager": Traffic(9),  # read x twice, write y; read y, write y; read skip, y, write out
        "compile": Traffic(5),  # read x; read x, skip, write out
        "fused": Traffic(5),  # read skip, write its half; read x; read x, write the other half
        "floor": Traffic(4),  # read x, skip, write out
    },
    "bias_add_relu": {
        "eager": Traffic(7),  # read x, residual, write out; read out, write out, twice
        "compile": Traffic(3, BYTES),  # read x, residual, write out, bytes
        "fused": Traffic(3, 1),  # read x, residual, write out, mask
        "floor": Traffic(3, 1),
    },
    "relu_add": {
        "eager": Traffic(5),  # read x, write; read that, residual, write out
        "compile": Traffic(3, BYTES),  # read x, residual, write out, bytes
        "fused": Traffic(3, 1),  # read x, residual, write out, mask
        "floor": Traffic(3, 1),
    },
    "add_relu": {
        "eager": Traffic(5),  # read x, residual, write out; read out, write out
        "compile": Traffic(3, BYTES),  # read x, residual, write out, bytes
        "fused": Traffic(3, 1),  # read x, residual, write out, mask
        "floor": Traffic(3, 1),
    },
}
BACKWARD = {
    "batch_norm_add_relu": {
        "eager": Traffic(8),  # read dout, out, write g; read g, x; read g, x, write dx
        "compile": Traffic(6, 2 * BYTES),  # as fused, with bytes for mask
        "fused": Traffic(6, 2),  # read dout, mask, x; read dout, mask, x, write dx, dresidual
        "floor": Traffic(4, 1),  # read dout, mask, x, write dx, dresidual
    },
    "batch_norm_relu": {
        "eager": Traffic(8),  # read dout, out, write g; read g, x; read g, x, write dx
        "compile": Traffic(5, 2 * BYTES),  # read dout, bytes, x; read dout, bytes, x, write dx
        "fused": Traffic(5),  # read dout, x; read dout, x, write dx
        "floor": Traffic(3),  # read dout, x, write dx
    },
    "dual_batch_norm_add_relu": {
        "eager": Traffic(13),  # read dout, out, write g; of each: read g, x; read g, x, write dx
        "compile": Traffic(8, 2 * BYTES),  # as fused, with bytes for mask
        "fused": Traffic(8, 2),  # read dout, mask, x, residual; the same, write dx, dresidual
        "floor": Traffic(5, 1),  # read dout, mask, x, residual, write dx, dresidual
    },
    "batch_norm_add": {
        "eager": Traffic(5),  # read dout, x; read dout, x, write dx; dresidual is dout
        "compile": Traffic(5),
        "fused": Traffic(5),
        "floor": Traffic(3),  # read dout, x, write dx
    },
    "cat_batch_norm_relu": {
        "eager": Traffic(8),  # as batch_norm_relu; dskip is a view of dout
        "compile": Traffic(5),  # read half of dout, x; read both, write dx
        "fused": Traffic(7),  # read half of dout, write it by itself; read it, x; read it, x, write
        "floor": Traffic(3),  # read half of dout, x, write dx
    },
    "bias_add_relu": {
        "eager": Traffic(4),  # read dout, out, write dx; read dx
        "compile": Traffic(3, 2 * BYTES),  # as fused, with bytes for mask
        "fused": Traffic(3, 2),  # read dout, mask; read dout, mask, write dx
        "floor": Traffic(2, 1),  # read dout, mask, write dx
    },
    "relu_add": {
        "eager": Traffic(3),  # read dout, what ReLU gave, write dx; dresidual is dout
        "compile": Traffic(2, BYTES),  # read dout, bytes, write dx
        "fused": Traffic(2, 1),  # read dout, mask, write dx
        "floor": Traffic(2, 1),
    },
    "add_relu": {
        "eager": Traffic(3),  # read dout, out, write dx, which is dresidual too
        "compile": Traffic(2, BYTES),
        "fused": Traffic(2, 1),  # read dout, mask, write dx
        "floor": Traffic(2, 1),
    },
}


# timm calls torch's kernels, as eager does. What has others is counted as fusedskip is.
LIKE_EAGER = ("eager", "timm")


def moved(function: str, passes: str, row: str) -> Traffic:
    """What `row` of the tables moves in one pass, or in `"both"`."""
    if passes == "both":
        return FORWARD[function][row] + BACKWARD[function][row]
    return {"forward": FORWARD, "backward": BACKWARD}[passes][function][row]


def figures(
    function: str,
    passes: str,
    runner: str,
    shape: tuple[int, ...],
    itemsize: int,
    seconds: float,
    eager_seconds: float,
    copy_seconds: float,
) -> dict[str, float]:
    """What a measured pass, or both, says about `runner`, for `extra_info`.

    Args:
        runner: one of `runners.RUNNERS`.
        seconds, eager_seconds, copy_seconds: medians; the copy is of one tensor.
    """
    row = "eager" if runner in LIKE_EAGER else "compile" if runner == "compile" else "fused"
    numel = math.prod(shape)
    n_bytes, floor = (moved(function, passes, r).bytes(numel, itemsize) for r in (row, "floor"))
    copy_bandwidth = Traffic(2).bytes(numel, itemsize) / copy_seconds  # read, write
    return {
        "ms": 1e3 * seconds,
        "bytes": n_bytes,
        "gb_s": n_bytes / seconds / 1e9,
        "copy_gb_s": copy_bandwidth / 1e9,
        "copy_share": n_bytes / seconds / copy_bandwidth,
        "over_floor": seconds * copy_bandwidth / floor,
        "floor_share": floor / (seconds * copy_bandwidth),
        "speed": eager_seconds / seconds,
    }

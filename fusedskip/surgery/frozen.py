"""Norms that are frozen for good, of which most detectors have a class of their own.

Each is a copy of torchvision's `FrozenBatchNorm2d`: the statistics and parameters of a batch norm
in buffers, and a forward that applies them.
"""

from torch import nn

from fusedskip import tails
from fusedskip.surgery.fingerprints import known_method

# The forwards of torchvision and of transformers.
_FORWARDS = "228cfd874a3f db52c6d24328"


def learn(model: nn.Module) -> None:
    """Let kernels compute those in `model`."""
    for kind in {type(module) for module in model.modules()} - tails.NORMS.keys():
        if kind.__name__.endswith("FrozenBatchNorm2d") and known_method(kind, "forward", _FORWARDS):
            tails.NORMS[kind] = lambda norm: True
            tails.FORWARDS[kind] = kind.forward

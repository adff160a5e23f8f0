"""Norms that are frozen for good, of which most detectors have a class of their own.

Each is a copy of torchvision's `FrozenBatchNorm2d`: the statistics and parameters of a batch norm
in buffers, and a forward that applies them.
"""

from torch import nn

from fusedskip import tails
from fusedskip.modules import FROZEN
from fusedskip.surgery.fingerprints import known_method

# The forwards of torchvision and of transformers, and the eps of these.
_FORWARDS = {"228cfd874a3f": None, "db52c6d24328": 1e-5}


def learn(model: nn.Module) -> None:
    """Let kernels compute those in `model`."""
    for kind in {type(module) for module in model.modules()} - tails.NORMS.keys():
        if kind.__name__.endswith("FrozenBatchNorm2d"):
            for known, eps in _FORWARDS.items():
                if known_method(kind, "forward", known):
                    FROZEN[kind], tails.NORMS[kind] = eps, tails.always
                    tails.FORWARDS[kind] = kind.forward

"""What `fuse` makes of torch's own container."""

from torch import nn

from fusedskip.surgery.fused import FusedChain

# Every Sequential that inherits its forward.
SEQUENTIAL = "95e8a9b3e99c"


class FusedSequential(FusedChain, nn.Sequential, forward=SEQUENTIAL):
    """A Sequential in which a norm is followed by its ReLU."""

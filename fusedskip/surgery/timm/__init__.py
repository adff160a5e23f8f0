"""What `fuse` makes of timm's blocks (1.0)."""

from fusedskip.surgery.timm import byobnet, efficientnet, layers, res2net, resnet, selective

__all__ = ["byobnet", "efficientnet", "layers", "res2net", "resnet", "selective"]

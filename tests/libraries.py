"""The libraries of models, importable beside a torch that torchvision was not built for."""

import importlib
import importlib.util
from pathlib import Path

import torch

# Its models need none of those operators, but importing it registers fakes for two of them.
try:
    torch.ops.load_library(
        *Path(importlib.util.find_spec("torchvision").origin).parent.glob("_C*.so")
    )
except OSError:
    _operators = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision
import torchvision.models

__all__ = ["torchvision"]  # and what __getattr__ knows


def __getattr__(name):  # seconds each, which tests of torchvision's blocks need not wait
    if name in ("timm", "transformers"):
        return importlib.import_module(name)
    raise AttributeError(name)

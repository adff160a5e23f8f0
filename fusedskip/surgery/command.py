"""`python -m fusedskip explain LIBRARY:MODEL`: the report of a model that a library can build."""

import argparse
import importlib
import inspect
import sys
from typing import Any

from torch import nn

from fusedskip.surgery import explain


def add_command(commands: Any) -> None:
    """Add `explain` to the subparsers of the command line."""
    parser = commands.add_parser(
        "explain",
        help="what fusedskip.fuse does with a model",
        description="Print what fusedskip.fuse does with a model. No weights are downloaded.",
    )
    parser.add_argument(
        "model", help="torchvision:resnet50, timm:resnet50d or transformers:microsoft/resnet-50"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the report; 2 if there is no such model."""
    library, _, name = options.model.partition(":")
    builders = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}
    if library not in builders or not name:
        expected = f"LIBRARY:NAME, LIBRARY one of {', '.join(builders)}"
        print(f"model: expected {expected}", file=sys.stderr)
        return 2
    try:
        model, origin = builders[library](name)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        print(f"{options.model}: {error}", file=sys.stderr)
        return 2
    print(origin)
    print(explain(model), end="")
    return 0


def _torchvision(name: str) -> tuple[nn.Module, str]:
    models = importlib.import_module("torchvision.models")
    builder = models.get_model_builder(name)
    arguments = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        arguments["weights_backbone"] = None
    return builder(**arguments), f"torchvision.models.{name}"


def _timm(name: str) -> tuple[nn.Module, str]:
    timm = importlib.import_module("timm")
    return timm.create_model(name, pretrained=False), f"timm {name}"


def _transformers(name: str) -> tuple[nn.Module, str]:
    """The model of a configuration class's defaults: the hub, which knows others, is not asked."""
    auto = importlib.import_module("transformers.models.auto")
    key = _letters(name.rpartition("/")[2])
    types = [t for t in auto.configuration_auto.CONFIG_MAPPING if key.startswith(_letters(t))]
    if not types:
        raise ValueError("no model type of transformers begins this name")
    config = auto.configuration_auto.CONFIG_MAPPING[max(types, key=len)]()
    model = auto.modeling_auto.AutoModel.from_config(config)
    return model, f"transformers {type(model).__name__} of {type(config).__name__}()"


def _letters(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")

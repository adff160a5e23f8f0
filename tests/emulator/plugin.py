"""A pytest plugin: `fusedskip._C` is the extension that EMULATED_EXTENSION names."""

import importlib.util
import os
import sys

import torch  # noqa: F401  the extension links to it

_spec = importlib.util.spec_from_file_location("fusedskip._C", os.environ["EMULATED_EXTENSION"])
sys.modules["fusedskip._C"] = importlib.util.module_from_spec(_spec)

import os

import torch

# Read by Triton when it is imported. Without a GPU its kernels run interpreted, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import settings

import fusedskip

from .support import BACKENDS, device_of

# Interpreted kernels take as long as they take.
settings.register_profile("fusedskip", deadline=None, derandomize=True)
settings.load_profile("fusedskip")


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every backend with kernels of its own, active for the test. Its tensors live on `device`."""
    name = request.param
    if device_of(name) is None:
        pytest.skip(f"backend {name} needs a CUDA device")
    with fusedskip.use_backend(name):
        yield name


@pytest.fixture
def device(backend):
    return device_of(backend)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

import fcntl
import os
import tempfile
from pathlib import Path

import torch

# Read by Triton when it is imported. Without a GPU its kernels run interpreted, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import HealthCheck, settings

import fusedskip

from .support import BACKENDS, device_of, interpreted, parameter

# What convolutions are compared by: cuDNN's defaults round to 10 bits, and add in any order.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cudnn.deterministic = True

# Interpreted kernels take as long as they take, and a GPU takes a second to start.
settings.register_profile(
    "fusedskip",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fusedskip")


def pytest_collection_modifyitems(items):
    """First what needs a GPU most: `make gpu` may run out of time.

    And before that what one test at a time has room for: what xdist deals to its first worker. Then
    what takes minutes by itself: begun last, it would have the other workers wait for its end.
    """
    first = ("test_gpu.py", "test_on_chip.py", "test_cuda_emulated.py")

    def place(item):
        name = item.path.name
        return "much_memory" not in item.fixturenames, (*first, name).index(name)

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A kernel's bad access spoils all that its process does on the GPU: xdist starts another."""
    reported = yield
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return reported


@pytest.fixture(params=map(parameter, BACKENDS))
def backend(request):
    """Every backend with kernels of its own, active for the test. Its tensors live on `device`."""
    with fusedskip.use_backend(request.param):
        yield request.param


@pytest.fixture
def compiled_backend(backend):
    """Those that are not interpreted: for whole networks, and what lies above kernels."""
    if interpreted(backend):
        pytest.skip("interpreted Triton is too slow; what is tested is the same for all backends")


@pytest.fixture
def device(backend):
    return device_of(backend)


@pytest.fixture
def much_memory():
    """24 GB of the GPU, which one test at a time takes."""
    if torch.cuda.get_device_properties(0).total_memory < 32e9:
        pytest.skip("needs a GPU with 32 GB of memory")
    with (Path(tempfile.gettempdir()) / "fusedskip-much-memory").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def resnet():
    from .libraries import torchvision

    return torchvision.models.resnet18(num_classes=10).double()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

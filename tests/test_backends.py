"""Which backend a call runs on, and what is said when it cannot."""

import contextlib
import importlib
import os
import subprocess
import sys
import warnings

import pytest
import torch

import fusedskip
from fusedskip import backends

from .support import BACKENDS, make_problem, run


def python(code, **environment):
    """Run code in a fresh interpreter; its combined output."""
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return process.stdout + process.stderr


def test_available_backends_are_ordered_and_end_in_eager():
    available = fusedskip.available_backends()
    assert available[-1] == "eager"
    assert list(available) == [name for name in backends.NAMES if name in available]
    assert "cpu" in available


def test_auto_takes_the_compiled_kernels():
    assert backends.select(torch.ones(1)) == "cpu"


@pytest.mark.parametrize(
    ("working", "best"), [(("cuda", "triton"), "cuda"), (("triton",), "triton")]
)
def test_auto_on_a_gpu(monkeypatch, working, best):
    monkeypatch.setattr(backends, "unavailable", lambda name, *_: None if name in working else "no")
    assert backends._auto.__wrapped__(torch.device("cuda")) == best


def test_auto_on_a_gpu_without_kernels(monkeypatch):
    monkeypatch.setattr(backends, "unavailable", lambda *_: "not here")
    with pytest.warns(UserWarning, match="runs eagerly on cuda tensors"):
        assert backends._auto.__wrapped__(torch.device("cuda")) == "eager"


@pytest.mark.parametrize(
    ("megabytes", "error"),
    [
        (8, "RuntimeError [enforce fail"),
        (65, "OutOfMemoryError CPU out of memory. Tried to allocate 2097152 bytes"),
    ],
)
def test_no_memory(megabytes, error):
    """Of 64 MB of out torch's own error; of 2 MB of mask, for which it then has room, one like it.

    Nothing has been updated. On a GPU test_gpu.py tests the same.
    """
    code = f"""
import resource
import torch
from fusedskip.backends import KERNELS
x, running = torch.ones(2**12, 2**12), torch.zeros(2**12)
arguments = x, x, None, None, running, running, True, 0.1, 1e-5, True, True
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + {megabytes} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    KERNELS["cuda"].batch_norm(*arguments)
except RuntimeError as error:
    print(type(error).__name__, error)
print(running.any())
"""
    said = python(code, MALLOC_ARENA_MAX="1", OMP_NUM_THREADS="1")
    assert said.startswith(error)
    assert "\ntensor(False)\n" in said  # torch 2.11 also says on stderr what has failed


def test_a_gpu_that_the_kernels_were_not_built_for(monkeypatch):
    """It is that of the tensor which is asked, be another the current one."""
    current = [0]

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    extension = importlib.import_module("fusedskip._C")
    error = lambda: "no kernel image" if current[-1] == 1 else None  # noqa: E731
    monkeypatch.setattr(extension, "cuda_error", error, raising=False)
    monkeypatch.setattr(backends.ops, "has_kernel", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", device)
    reason = backends.unavailable.__wrapped__("cuda", "cuda", 1)
    assert reason == "its kernels do not load on this GPU: no kernel image"
    assert backends.unavailable.__wrapped__("cuda", "cuda", 0) is None
    assert current == [0]


def test_use_backend_nests_and_restores():
    x = torch.ones(1)
    with fusedskip.use_backend("eager"):
        assert backends.select(x) == "eager"
        with fusedskip.use_backend("auto"):
            assert backends.select(x) == "cpu"
        with pytest.raises(KeyError), fusedskip.use_backend("cpu"):
            raise KeyError
        assert backends.select(x) == "eager"
    assert backends.select(x) == "cpu"


def test_other_accelerators_run_eagerly_and_say_so_once():
    mps = torch.device("mps")
    backends._auto.cache_clear()
    with pytest.warns(UserWarning, match="runs eagerly on mps tensors .*: it takes cuda tensors"):
        assert backends._auto(mps) == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (backends._auto(mps), backends._auto(torch.device("meta"))) == ("eager", "eager")


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of"):
        fusedskip.use_backend("cudnn")


def test_backend_that_cannot_take_the_tensor():
    with fusedskip.use_backend("cuda"), pytest.raises(RuntimeError, match="takes cuda tensors"):
        fusedskip.add_relu(torch.ones(2), torch.ones(2))


@pytest.mark.skipif(
    backends.ops.has_kernel(backends.ops.COMPILED, "CUDA"), reason="there are launches to choose"
)
def test_launches_of_a_backend_that_is_not_there():
    with pytest.raises(RuntimeError, match="backend 'cuda': this installation"), backends.on_chip():
        pass


def test_backward_stays_on_the_backend_of_its_forward():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    with fusedskip.use_backend("cpu"):
        out = fusedskip.add_relu(x, torch.randn_like(x))
    with fusedskip.use_backend("eager"), torch.profiler.profile() as profile:
        out.sum().backward()
    assert "fusedskip::add_relu_backward" in {event.name for event in profile.events()}
    assert torch.equal(x.grad, (out > 0).float())


def test_backends_agree():
    problem = make_problem("batch_norm_add_relu", (3, 9, 4, 5), torch.float64, "channels_last")
    results = []
    for name in ("cpu", "eager"):
        with fusedskip.use_backend(name):
            results.append(run(problem))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_environment_chooses():
    code = "import torch, fusedskip.backends as b; print(b.select(torch.ones(1)))"
    assert python(code, FUSEDSKIP_BACKEND="eager").strip() == "eager"
    assert "backend: expected 'auto'" in python(code, FUSEDSKIP_BACKEND="fast")


def test_triton_needs_a_gpu_or_the_interpreter():
    code = (
        "import torch, fusedskip\n"
        "with fusedskip.use_backend('triton'): fusedskip.add_relu(torch.ones(2), torch.ones(2))"
    )
    assert "under TRITON_INTERPRET=1" in python(code, TRITON_INTERPRET="0")


def test_without_the_extension_eager_serves_and_says_so_once():
    code = (
        "import sys; sys.modules['fusedskip._C'] = None\n"
        "import torch, fusedskip\n"
        "print(fusedskip.available_backends())\n"
        "for _ in range(2): print(fusedskip.add_relu(torch.ones(2), torch.ones(2)).tolist())"
    )
    output = python(code, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert "('eager',)" in output
    assert output.count("[2.0, 2.0]") == 2
    assert output.count("fusedskip runs eagerly on cpu tensors") == 1
    assert "the extension fusedskip._C did not load" in output


@pytest.mark.skipif("cpu" not in BACKENDS, reason="backend cpu: not asked for")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability):
    """The kernels of lesser processors, over the whole of the functional tests."""
    from fusedskip import _C

    code = "from fusedskip import _C; print(_C.cpu_instruction_set())"
    chosen = python(code, ATEN_CPU_CAPABILITY=capability).strip()
    expected = {"default": "baseline"}.get(capability, capability)
    if chosen != expected:
        pytest.skip(f"this processor has no {capability}: it runs {chosen}")
    if chosen == _C.cpu_instruction_set():
        pytest.skip(f"all other tests run {chosen}")
    process = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "cpu",
            os.path.join(os.path.dirname(__file__), "test_functional.py"),
        ],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-3000:]

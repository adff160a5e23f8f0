"""`python -m fusedskip` and its demo: what they print, and when they fail."""

import os
import subprocess
import sys

import pytest
import torch

import fusedskip
from fusedskip import backends
from fusedskip.__main__ import main

needs_cpu_kernels = pytest.mark.skipif(
    "cpu" not in fusedskip.available_backends(), reason="built without cpu kernels"
)


@pytest.fixture
def wrong_cpu_kernels(monkeypatch):
    """CPU kernels whose batch norm gets the first channel a little wrong."""
    batch_norm = backends.KERNELS["cpu"].batch_norm

    def wrong(*arguments):
        out, *rest = batch_norm(*arguments)
        out[:, 0] *= 1.01
        return out, *rest

    monkeypatch.setattr(backends.KERNELS["cpu"], "batch_norm", wrong)


@pytest.fixture
def without_triton(monkeypatch):
    """Spares a test that is not about Triton the interpreter."""
    monkeypatch.setattr(backends, "NAMES", ("cpu", "eager"))


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """A few steps of the demo in this process; returns the exit code and the path of the plot.

    On the CPU: the demo of a GPU, which times a ResNet-50, is in test_gpu.py.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "8000000000")  # or it would start anew
    plot = tmp_path / "plot.png"
    return lambda: (main(["demo", "--steps", "3", "--output", str(plot)]), plot)


def test_info_names_versions_devices_and_every_backend(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert f"fusedskip {fusedskip.__version__}, torch {torch.__version__}" in printed
    assert f"{torch.get_num_threads()} threads" in printed
    for name in backends.NAMES:
        state = "ok" if name in fusedskip.available_backends() else "not here"
        assert f"  {name:8}{state}" in printed


@needs_cpu_kernels
@pytest.mark.usefixtures("without_triton", "wrong_cpu_kernels")
def test_info_names_the_backend_that_computes_something_else(capsys):
    assert main([]) == 1
    printed = capsys.readouterr().out
    assert "  cpu     FAILED" in printed
    assert "batch_norm_add_relu float32 channels_last training on cpu: out is" in printed
    assert "add_relu float32 channels_last training on cpu: dx" not in printed
    assert "  eager   ok" in printed


@needs_cpu_kernels
@pytest.mark.usefixtures("without_triton")
def test_info_survives_a_backend_that_raises(capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(backends.KERNELS["cpu"], "add_relu_backward", broken)
    assert main([]) == 1
    assert "on cpu: RuntimeError: no such instruction" in capsys.readouterr().out


def test_info_without_the_extension():
    program = (
        "import sys; sys.modules['fusedskip._C'] = None\n"
        "from fusedskip.__main__ import main; sys.exit(main([]))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "no: fusedskip._C did not load" in run.stdout
    assert "  cpu     not here: the extension fusedskip._C did not load" in run.stdout


def test_demo_compares_and_draws(capsys, demo):
    code, plot = demo()
    printed = capsys.readouterr().out
    assert code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    for row in ("final loss", "test accuracy", "median step", "speed", "The loss curves agree"):
        assert row in printed


@needs_cpu_kernels
@pytest.mark.usefixtures("wrong_cpu_kernels")
def test_demo_fails_where_the_loss_curves_disagree(capsys, demo):
    code, _ = demo()
    assert code == 1
    assert "The loss curves DISAGREE" in capsys.readouterr().out


def test_demo_that_cannot_be_run_is_not_begun(capsys, tmp_path):
    for arguments in (["--steps", "0"], ["--output", str(tmp_path / "missing" / "plot.png")]):
        assert main(["demo", *arguments]) == 2
        assert "at least one step, and a folder" in capsys.readouterr().err


def test_demo_says_what_to_install(capsys, demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    code, plot = demo()
    assert code == 2
    assert not plot.exists()
    assert "sklearn; pip install '.[demo]'" in capsys.readouterr().err

"""`python -m fusedskip`: what is installed, what was built, and whether it computes the truth."""

import argparse
import importlib
import importlib.util
import platform
import sys

import torch

import fusedskip
from fusedskip import backends, demo, ops, selfcheck
from fusedskip.surgery import command as explain


def main(arguments: list[str] | None = None) -> int:
    """Run one command of the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fusedskip", description=fusedskip.__doc__)
    parser.set_defaults(run=info)
    commands = parser.add_subparsers(title="commands (none: versions, devices and a self-check)")
    demo.add_command(commands)
    explain.add_command(commands)
    options = parser.parse_args(arguments)
    return int(options.run(options))


def info(_: argparse.Namespace) -> int:
    """Print versions, devices, compiled kernels and a self-check; 1 if a backend fails it."""
    print(_versions())
    print("\ndevices")
    for name, description in _devices().items():
        print(f"  {name:8}{description}")
    print("\ncompiled kernels")
    for name in ("cpu", "cuda"):
        print(f"  {name:8}{_compiled(name)}")
    print("\nbackends")
    failed = False
    for name in backends.NAMES:
        if not (devices := selfcheck.devices(name)):
            print(f"  {name:8}not here: {_why_not(name)}")
            continue
        result = selfcheck.check(name)
        where = " and ".join(devices)
        if result.failures:
            failed = True
            print(f"  {name:8}FAILED {len(result.failures)} of {result.n_cases} checks on {where}")
            print(*(f"    {line}" for line in result.failures), sep="\n")
        else:
            print(f"  {name:8}ok, {result.n_cases} checks on {where}")
    return int(failed)


def _versions() -> str:
    has_triton = importlib.util.find_spec("triton") is not None
    triton = importlib.import_module("triton").__version__ if has_triton else "not installed"
    return (
        f"fusedskip {fusedskip.__version__}, torch {torch.__version__}, triton {triton}, "
        f"Python {platform.python_version()}"
    )


def _devices() -> dict[str, str]:
    cpu = f"{torch.get_num_threads()} threads"
    if ops.compiled_error is None:
        compiled = importlib.import_module("fusedskip._C")
        cpu += f", {compiled.cpu_instruction_set()} kernels"
    gpus = {}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        gpus[f"cuda:{index}"] = f"{name}, compute capability {major}.{minor}"
    return {"cpu": cpu, **gpus}


def _compiled(device: str) -> str:
    if ops.compiled_error is not None:
        hint = "; was there a C++ compiler, and torch, when it was installed?"
        is_missing = isinstance(ops.compiled_error, ModuleNotFoundError)
        return f"no: fusedskip._C did not load: {ops.compiled_error}{hint if is_missing else ''}"
    return "yes" if ops.has_kernel(ops.COMPILED, device.upper()) else "no: not in this build"


def _why_not(backend: str) -> str | None:
    # Of a backend for GPUs, the reason that a GPU would get says more.
    device = "cuda" if backend == "cuda" and torch.cuda.is_available() else "cpu"
    return backends.unavailable(backend, device)


if __name__ == "__main__":
    sys.exit(main())

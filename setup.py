"""Builds fusedskip._C, the compiled kernels, through the LibTorch stable ABI.

FUSEDSKIP_BUILD says what is compiled:
    auto  CPU, CUDA where nvcc and a CUDA torch are found, nothing without a compiler (default)
    cpu   CPU alone
    cuda  CPU and CUDA
    none  nothing: Triton serves the GPU, eager the CPU
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob

from setuptools import setup

# One binary serves every torch from 2.11 on.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
# torch 2.11 would compile as C++17, which has neither designated initializers nor concepts.
STANDARD = "-std=c++20"
# Contraction would let every instruction set round differently: a kernel that wants an fma says so.
# errno and floating-point traps would keep loops from being vectorised, and nobody reads either.
# -g0: the debug information that Python's own flags ask for is ten times the code.
CXX_FLAGS = "-O3 -g0 -Wall -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math"
NVCC_FLAGS = "-O3 -Xcompiler=-fvisibility=hidden"
# Where TORCH_CUDA_ARCH_LIST does not say otherwise; later ones compile the last one's PTX. Before
# CUDA 12.8, nvcc knows none after 9.0.
CUDA_ARCHITECTURES, BEFORE_12_8 = "8.0;8.6;8.9;9.0;10.0;12.0+PTX", "8.0;8.6;8.9;9.0+PTX"

NO_TORCH = """\
fusedskip is compiled against the torch that it will run with, and there is none: {}
Install torch first, and then fusedskip with pip's --no-build-isolation.
FUSEDSKIP_BUILD=none installs it without compiled kernels."""


def compiler_error():
    """Why no extension for this Python can be compiled here, or None."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    include = sysconfig.get_path("include")
    try:
        subprocess.run(
            [*compiler, STANDARD, "-fsyntax-only", f"-I{include}", "-xc++", "-"],
            input="#include <Python.h>\n#include <concepts>\n",
            capture_output=True,
            text=True,
            check=True,
        )
    except OSError as error:
        return str(error)
    except subprocess.CalledProcessError as error:
        return error.stderr.strip()


def extension_args(build):
    """What setup() needs to build the extension; {} where nothing is to be compiled."""
    if build not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"FUSEDSKIP_BUILD: expected auto, cpu, cuda or none, got {build!r}")
    if build == "none":
        return {}
    if error := compiler_error():
        if build != "auto":
            sys.exit(f"FUSEDSKIP_BUILD={build} needs a C++20 compiler and Python.h: {error}")
        print(f"warning: no compiled kernels in this fusedskip: {error}", file=sys.stderr)
        return {}

    # pip's build isolation hides the installed torch from the import path, but leaves it in place.
    sys.path.append(sysconfig.get_path("platlib"))
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        sys.exit(NO_TORCH.format(error))

    cuda_sources = glob("csrc/cuda/*.cu")
    cuda_needs = {
        "nvcc": shutil.which("nvcc", path=CUDA_HOME and os.path.join(CUDA_HOME, "bin")),
        "a CUDA build of torch": torch.version.cuda,
        "csrc/cuda/*.cu": cuda_sources,
    }
    missing = ", ".join(need for need, found in cuda_needs.items() if not found)
    if build == "cuda" and missing:
        sys.exit(f"FUSEDSKIP_BUILD=cuda needs {', '.join(cuda_needs)}; not found: {missing}")

    extension_class, sources, flags = CppExtension, [], [STANDARD, *DEFINES]
    if build != "cpu" and not missing:
        extension_class, sources, flags = CUDAExtension, cuda_sources, [*flags, "-DUSE_CUDA"]
        is_before_12_8 = tuple(map(int, torch.version.cuda.split(".")[:2])) < (12, 8)
        architectures = BEFORE_12_8 if is_before_12_8 else CUDA_ARCHITECTURES
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures)
    extension = extension_class(
        "fusedskip._C",
        sorted(sources + glob("csrc/bindings/*.cpp") + glob("csrc/cpu/*.cpp")),
        extra_compile_args={
            "cxx": CXX_FLAGS.split() + flags,
            "nvcc": NVCC_FLAGS.split() + flags,
        },
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


# Metadata and source distributions are made without torch.
compiles = not {"egg_info", "dist_info", "sdist"} & set(sys.argv)
setup(**(extension_args(os.environ.get("FUSEDSKIP_BUILD", "auto")) if compiles else {}))

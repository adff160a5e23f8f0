"""Without a GPU: the CUDA kernels compile and link, do not spill, and access 16 bytes at a time."""

import os
import re
import shutil
import subprocess
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

SOURCES = sorted((Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100")
# As setup.py and torch's CUDAExtension pass them.
# Only kernels are looked at: the host's compiler need not try hard.
FLAGS = ["-std=c++20", "-O3", *COMMON_NVCC_FLAGS, "-Xcompiler=-Wall,-Werror,-fPIC,-O0"]
FLAGS += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]

# Tensors that the main loop of a kernel reads and writes; dual kernels normalise the residual too.
TENSORS = {
    "batch_norm_stats_kernel": (1, 0),
    "batch_norm_apply_kernel": (2, 1),
    "dual batch_norm_apply_kernel": (2, 1),
    "batch_norm_bwd_reduce_kernel": (2, 0),
    "dual batch_norm_bwd_reduce_kernel": (3, 0),
    "batch_norm_bwd_apply_kernel": (2, 2),
    "dual batch_norm_bwd_apply_kernel": (3, 2),
    "batch_norm_on_chip_kernel": (2, 1),
    "dual batch_norm_on_chip_kernel": (2, 1),
    "batch_norm_bwd_on_chip_kernel": (2, 2),
    "dual batch_norm_bwd_on_chip_kernel": (3, 2),
    "add_relu_kernel": (2, 1),
    "add_relu_backward_kernel": (1, 1),
}
# These work on numbers a channel alone.
CHANNEL_KERNELS = {"batch_norm_moments_kernel", "batch_norm_merge_kernel"}
ITEMSIZES = {"d": 8, "f": 4, "13__nv_bfloat16": 2, "6__half": 2}
OCTET = 8  # elements that a thread takes at a time


def toolkit_program(name):
    """Path of a program of the CUDA toolkit, some of which come with Triton."""
    triton = pytest.importorskip("triton", reason=f"{name}: not on PATH, nor Triton's")
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = shutil.which(name) or shutil.which(name, path=bundled)
    return path or pytest.skip(f"{name}: not on PATH, nor Triton's")


@dataclass(frozen=True)
class Kernel:
    arch: str
    function: str  # mangled
    instructions: dict[int, str]  # by address

    @property
    def name(self):
        """Without namespaces and template arguments, of which kNorms or kKind says dual."""
        name = re.search(r"\d((?:batch_norm|add_relu)\w*?_kernel)I", self.function)[1]
        return f"dual {name}" if re.search(r"(ELi|4KindE)2E", self.function) else name

    @property
    def itemsize(self):
        return ITEMSIZES[re.search(r"_kernelI(d|f|13__nv_bfloat16|6__half)L", self.function)[1]]

    @property
    def width(self):
        """Elements of an octet that exist together: the template argument kWidth."""
        return int(re.search(r"Li(\d)E", self.function)[1])

    def main_loop(self):
        """The longest innermost loop, of those that write if any does; all code if none loops."""
        loops = []  # address of the first and of the last instruction
        for address, instruction in self.instructions.items():
            branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", instruction)
            if branch and int(branch[1], 16) < address:
                loops.append((int(branch[1], 16), address))
        innermost = [
            [i for address, i in self.instructions.items() if first <= address <= last]
            for first, last in loops
            if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
        ]
        return max(
            innermost,
            key=lambda loop: (any("STG" in i for i in loop), len(loop)),
            default=list(self.instructions.values()),
        )

    def __str__(self):
        return f"sm_{self.arch} {self.function}"


def disassemble(object_file):
    """The kernels of an object file, for every architecture in it."""
    dump = subprocess.run(
        [toolkit_program("cuobjdump"), "--dump-sass", object_file],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    kernels = []
    for elf in dump.split("arch = sm_")[1:]:
        for function in elf.split("Function : ")[1:]:
            code = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.+?);", function)
            instructions = {int(address, 16): instruction for address, instruction in code}
            kernels.append(Kernel(elf.split()[0], function.split()[0], instructions))
    return kernels


def compile_sources(folder):
    """One object file for each source, for all architectures."""
    nvcc = shutil.which("nvcc") or pytest.skip("nvcc: not on PATH")

    def compile_source(source):
        output = folder / f"{source.stem}.o"
        command = [nvcc, *FLAGS, "-c", str(source), "-o", str(output)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_source, SOURCES))


def test_compiled(tmp_path):
    """One test, so that no worker compiles again what another has compiled."""
    objects = compile_sources(tmp_path)
    check_that_objects_link(objects, tmp_path)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = [kernel for of_file in pool.map(disassemble, objects) for kernel in of_file]
    check_that_every_kernel_is_there(kernels)
    check_that_nothing_spills(kernels)
    check_that_main_loops_access_16_bytes(kernels)
    check_that_second_stages_wait(kernels)


def check_that_objects_link(objects, tmp_path):
    library = tmp_path / "library.so"
    subprocess.run(["nvcc", "-shared", *map(str, objects), "-o", str(library)], check=True)
    # Three architectures of the six of a wheel, which is deflated and is to stay below 30 MB.
    assert len(zlib.compress(library.read_bytes())) < 15e6


def check_that_every_kernel_is_there(kernels):
    for arch in ARCHITECTURES:
        of_arch = [kernel for kernel in kernels if kernel.arch == arch]
        assert {kernel.name for kernel in of_arch} == set(TENSORS) | CHANNEL_KERNELS
        # (3 dtypes with widths 8, 4, 1 and fp64 with width 1) x 2 layouts x stages; all but stats
        # have a dual form, and the backward ones another that recomputes the threshold; add_relu
        # has one layout. Moments have no width, and to be merged neither dtype nor layout of x.
        # Both stages in one launch: 3 dtypes with width 8 in 2 layouts, and fp32 once with width 4.
        two_launches, one_launch = 1 + 2 + 3 + 3, 2 + 3
        assert len(of_arch) == 10 * 2 * (two_launches + 1) + 7 * one_launch + 4 * 2 + 2


def check_that_nothing_spills(kernels):
    for kernel in kernels:
        for instruction in kernel.instructions.values():
            assert not re.search(r"\b(LDL|STL)\b", instruction), kernel


def check_that_second_stages_wait(kernels):
    """Where they may start early: before they read or write anything, for all the first wrote."""
    firsts = {"batch_norm_stats_kernel", "batch_norm_bwd_reduce_kernel"}
    seconds = {
        "batch_norm_apply_kernel",
        "batch_norm_bwd_apply_kernel",
        "batch_norm_moments_kernel",
    }
    for kernel in kernels:
        code = list(kernel.instructions.values())
        name, overlaps = kernel.name.removeprefix("dual "), kernel.arch != "80"
        assert any("PREEXIT" in i for i in code) == (overlaps and name in firsts), kernel
        waits = [n for n, i in enumerate(code) if "ACQBULK" in i]
        assert len(waits) == (overlaps and name in seconds), kernel
        if waits:
            accesses = [n for n, i in enumerate(code) if re.search(r"\b(LD|ST|RED|ATOM)G?\b", i)]
            assert waits[0] < min(accesses), kernel


def check_that_main_loops_access_16_bytes(kernels):
    """Where the width allows; but for mask bytes, such a loop accesses nothing narrower."""
    elementwise = [k for k in kernels if k.name not in CHANNEL_KERNELS]
    wide = [k for k in elementwise if k.itemsize < 8 and k.width * k.itemsize >= 16]
    assert {kernel.name for kernel in wide} == set(TENSORS)
    for kernel in wide:
        code = "\n".join(kernel.main_loop())
        loads, stores = re.findall(r"\bLDG\S*", code), re.findall(r"\bSTG\S*", code)
        for accesses, tensors in zip((loads, stores), TENSORS[kernel.name], strict=True):
            widest = [access for access in accesses if "128" in access]
            assert len(widest) >= tensors * OCTET * kernel.itemsize // 16, f"{kernel}: {accesses}"
            if "batch_norm" in kernel.name:
                narrow = {access for access in accesses if "128" not in access}
                assert all(".U8" in access for access in narrow), f"{kernel}: {accesses}"

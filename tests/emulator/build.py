"""Compile csrc/cuda for the CPU into an extension like `fusedskip._C`.

python -m tests.emulator.build FOLDER [address|thread]
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
# The order of operations is the GPU's: no contraction where the source has no fma.
FLAGS = [
    *("-xc++", "-std=c++20", "-O1", "-fPIC", "-w", "-ffp-contract=off"),
    *("-include", "cuda_on_cpu.h"),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DUSE_CUDA",
]

# Of the address sanitizer, what watches tensors and shared memory: local arrays would take as long
# again.
SANITIZERS = {
    "address": ["-fsanitize=address", "--param=asan-stack=0", "--param=asan-globals=0"],
    "thread": ["-fsanitize=thread"],
}

# The assembly that only a GPU's compiler reads: a store, and hints about a pointer.
STORE = r'asm\("st\.global.*?"memory"\);'
HINT = r'asm\("" : .*?\);'
DYNAMIC_SHARED = r"extern __shared__ uint4 (\w+)\[\];"
SHARED = r"__shared__ ([\w:]+(?:<.*?>)?) (\w+)((?:\[\w+\])*);"


def cuda_headers():
    """The folder of CUDA's headers, as nvcc has it."""
    said = subprocess.run(
        ["nvcc", "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=True
    )
    return re.search(r'INCLUDES="-I(.+?)"', said.stderr)[1]


def translated(source):
    """CUDA C++ as C++: what a header cannot define away."""
    source = re.sub(STORE, "*p = a;", source, flags=re.DOTALL)
    source = re.sub(DYNAMIC_SHARED, r"uint4* \1 = emulator::dynamic_shared();", source)
    source = re.sub(SHARED, r"auto& \2 = emulator::shared<\1\3>([] {});", source)
    return re.sub(HINT, "", source)


def build(folder, sanitizer=None):
    """Return the extension, compiled in `folder`, its kernels instrumented for a sanitizer."""
    sources = []
    headers = [*CSRC.glob("*.h"), *CSRC.glob("*/*.h"), *CSRC.glob("cuda/*.cuh")]
    for path in (*headers, *CSRC.glob("cuda/*.cu"), CSRC / "bindings" / "cpu.cpp"):
        copy = folder / path.relative_to(CSRC)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(translated(path.read_text()))
        sources += [copy] if path.suffix in (".cu", ".cpp") else []
    for path in HERE.glob("*.cpp"):
        copy = folder / "emulator" / path.name
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
        sources.append(copy)
    includes = [HERE, cuda_headers(), sysconfig.get_path("include")]
    includes += cpp_extension.include_paths()
    flags = [*FLAGS, *(f"-I{path}" for path in includes)]

    def compiled(source):
        target = source.with_suffix(source.suffix + ".o")
        is_instrumented = sanitizer and source.suffix == ".cu"
        instrument = [*SANITIZERS[sanitizer], "-g1"] if is_instrumented else []
        subprocess.run(["c++", *flags, *instrument, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, sources))
    extension = folder / "_C.abi3.so"
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    # Its own CUDA runtime comes before one that torch has loaded.
    libraries += ["-ltorch", "-ltorch_cpu", "-lc10", "-Wl,-Bsymbolic"]
    libraries += [f"-l{sanitizer[0]}san"] if sanitizer else []
    subprocess.run(["c++", "-shared", *objects, *libraries, "-o", extension], check=True)
    return extension


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), *sys.argv[2:]))

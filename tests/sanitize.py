"""Every kernel on a few shapes: `compute-sanitizer python -m tests.sanitize`.

Without a GPU those of the extension that EMULATED_EXTENSION names, built to run under libtsan.
"""

import contextlib
import itertools

import torch

if not torch.cuda.is_available():
    from .emulator import plugin  # noqa: F401  ahead of fusedskip

import fusedskip
from fusedskip import backends

from .support import CAT, FUNCTIONS, LAYOUTS, make_problem, run

# Rows of whole vectors and not, and several splits of a reduction. Other tests have had Triton
# compile all of these, which here would take longer than the kernels.
CASES = [
    ((9, 130), torch.float32),
    ((2, 17, 3, 3), torch.bfloat16),
    ((2, 64, 4, 4), torch.bfloat16),
    ((700, 11, 5, 5), torch.float32),
]
# libtsan takes 0.14 s for the threads of a block. These are a few blocks of channels, two programs
# each, in one launch clusters and a grid; a block alone; single elements, which warps exchange; and
# a function for every form of the kernels.
EMULATED_CASES = (
    ((5, 3, 24, 32), "contiguous"),
    ((2, 72, 5, 5), "channels_last"),
    ((2, 16, 2, 2), "channels_last"),
    ((2, 2, 5, 5), "contiguous"),
)
EMULATED_FUNCTIONS = ("batch_norm_relu", "batch_norm_add_relu", "dual_batch_norm_add_relu")


def on_gpu():
    """Backends, whether in one launch, and what to run on them."""
    problems = [
        make_problem(function, shape, dtype, layout, "cuda")
        for (shape, dtype), function, layout in itertools.product(CASES, (*FUNCTIONS, CAT), LAYOUTS)
    ]
    for backend, one_launch in (("cuda", False), ("cuda", True), ("triton", False)):
        if backend in fusedskip.available_backends():
            yield backend, one_launch, problems


def emulated():
    problems = [
        make_problem(function, shape, torch.bfloat16, layout, "cpu")
        for (shape, layout), function in itertools.product(EMULATED_CASES, EMULATED_FUNCTIONS)
    ]
    for one_launch in (False, True):
        yield "cpu", one_launch, problems


def main():
    for backend, one_launch, problems in on_gpu() if torch.cuda.is_available() else emulated():
        compiled = backend != "triton"
        launches = backends.on_chip(one_launch) if compiled else contextlib.nullcontext()
        with fusedskip.use_backend(backend), launches:
            for problem in problems:
                run(problem)
        if backend != "cpu":
            torch.cuda.synchronize()
        print(f"{backend}{', one launch' if one_launch else ''}: {len(problems)} steps", flush=True)


if __name__ == "__main__":
    main()

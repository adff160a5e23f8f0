"""Every kernel on a few shapes: `compute-sanitizer python -m tests.sanitize`."""

import contextlib
import itertools

import torch

import fusedskip
from fusedskip import backends

from .support import CAT, FUNCTIONS, LAYOUTS, make_problem, run

# Rows of whole vectors and not, and several splits of a reduction. Other tests have had Triton
# compile all of these, which here would take longer than the kernels.
CASES = [
    *itertools.product(((9, 130), (2, 17, 3, 3), (2, 64, 4, 4)), (torch.float32, torch.bfloat16)),
    ((700, 11, 5, 5), torch.float32),
]


def main():
    functions = (*FUNCTIONS, CAT)
    available = fusedskip.available_backends()
    runs = [(backend, False) for backend in ("cuda", "triton") if backend in available]
    runs += [("cuda", True)] if "cuda" in available else []
    for backend, one_launch in runs:
        launches = backends.on_chip() if one_launch else contextlib.nullcontext()
        with fusedskip.use_backend(backend), launches:
            for (shape, dtype), function, layout in itertools.product(CASES, functions, LAYOUTS):
                run(make_problem(function, shape, dtype, layout, "cuda"))
        torch.cuda.synchronize()
        steps = len(CASES) * len(functions) * len(LAYOUTS)
        print(f"{backend}{', one launch' if one_launch else ''}: {steps} steps")


if __name__ == "__main__":
    main()

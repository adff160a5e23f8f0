"""Every kernel on a few shapes: `compute-sanitizer python -m tests.sanitize`."""

import itertools

import torch

import fusedskip

from .support import CAT, FUNCTIONS, LAYOUTS, make_problem, run

# Rows of whole vectors and not, and several splits of a reduction. Other tests have had Triton
# compile all of these, which here would take longer than the kernels.
CASES = [
    *itertools.product(((9, 130), (2, 17, 3, 3), (2, 64, 4, 4)), (torch.float32, torch.bfloat16)),
    ((700, 11, 5, 5), torch.float32),
]


def main():
    functions = (*FUNCTIONS, CAT)
    for backend in {"cuda", "triton"} & set(fusedskip.available_backends()):
        with fusedskip.use_backend(backend):
            for (shape, dtype), function, layout in itertools.product(CASES, functions, LAYOUTS):
                run(make_problem(function, shape, dtype, layout, "cuda"))
        torch.cuda.synchronize()
        print(f"{backend}: {len(CASES) * len(functions) * len(LAYOUTS)} steps")


if __name__ == "__main__":
    main()

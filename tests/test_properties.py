"""Any shape, layout, dtype and set of arguments that hypothesis thinks of, against fp64."""

import torch
from hypothesis import Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from .support import CAT, DTYPES, FUNCTIONS, assert_as_good_as_eager, make_problem


@st.composite
def problems(draw, device):
    """Problems whose activations are views: permuted, sliced with steps, or plain."""
    training = draw(st.booleans())
    spatial = draw(st.lists(st.integers(1, 9), min_size=0, max_size=3))
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 40)), *spatial)
    if training and shape[0] * torch.Size(spatial).numel() < 3:
        shape = (3, *shape[1:])  # two values a channel leave a gradient of nothing but rounding
    torch.manual_seed(draw(st.integers(0, 2**31)))
    problem = make_problem(
        draw(st.sampled_from([*FUNCTIONS, CAT])),
        shape,
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(["contiguous", "channels_last"])),
        device,
        training,
        affine=draw(st.booleans()),
    )

    def view(tensor):
        order = draw(st.permutations(range(tensor.dim())))
        steps = [draw(st.sampled_from([1, 1, 2])) for _ in order]
        roomy = tensor.new_zeros([tensor.shape[d] * steps[d] for d in order])
        sliced = roomy[tuple(slice(None, None, steps[d]) for d in order)]
        back = sorted(range(len(order)), key=order.__getitem__)
        return sliced.permute(back).copy_(tensor)

    if draw(st.booleans()):
        activations = {name: getattr(problem, name) for name in ("x", "residual", "skip", "dout")}
        problem = problem.replaced(
            **{name: view(t) for name, t in activations.items() if t is not None}
        )
    return problem


def test_any_problem(backend, device):
    # Triton is slow either way: interpreted, or compiling for nearly every example. To shrink one
    # that fails would take minutes.
    few = {"max_examples": 40, "phases": [Phase.generate]}

    @hypothesis_settings(**few if backend == "triton" else {"max_examples": 200})
    @given(problems(device))
    def check(problem):
        assert_as_good_as_eager(problem)

    check()

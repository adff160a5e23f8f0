"""Every model of a library that `fuse` changes, beside itself as it was: a step and an evaluation.

python -m tests.sweep timm|torchvision [PATTERN]

In fp64. Prints a line a model, and exits with 1 if one differs by more than rounding, or in
evaluation by more than ten times what a rounding of the images makes of it. It takes minutes: what
CI runs is a sample, in test_surgery_models.py.
"""

import collections
import copy
import fnmatch
import sys

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fusedskip

from . import libraries

# The least that a model takes of these: the smaller, the faster.
SIZES = 64, 96, 128, 224, 256, 384
MOST_PARAMETERS = 60e6
# Of the largest element. A rounding of 1e-16 grows by up to 1e8 through 150 norms over few images.
LIMIT = 1e-7


def builders(library):
    """How to build each model, by its name."""
    if library == "timm":
        timm = libraries.timm
        return {name: lambda n=name: timm.create_model(n) for name in timm.list_models()}
    models = libraries.torchvision.models
    parts = {models: {}, models.segmentation: {"weights_backbone": None}, models.video: {}}
    return {
        name: lambda n=name, options=options: models.get_model(n, weights=None, **options)
        for part, options in parts.items()
        for name in models.list_models(part)
    }


def images(name, size):
    frames = [16] if name.startswith(("mc3", "r2plus1d", "r3d", "s3d", "mvit", "swin3d")) else []
    # Of two, a norm over one pixel would leave a gradient of nothing but rounding.
    return torch.randn(3, 3, *frames, size, size, dtype=torch.float64)


def results(model, x):
    """The outputs, and in training every gradient and buffer, by name."""
    torch.manual_seed(0)  # of dropout
    leaf = x.clone().requires_grad_()
    outs = [out for out in tree_leaves(model(leaf)) if isinstance(out, torch.Tensor)]
    found = {f"output {i}": out.detach() for i, out in enumerate(outs)}
    if model.training:
        sum(out.square().mean() for out in outs).backward()
        found |= {f"buffer {n}": b for n, b in model.named_buffers() if b.is_floating_point()}
        found["gradient x"] = leaf.grad
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"gradient {name}"] = parameter.grad
    return found


def least_images(name, model):
    for size in SIZES:
        x = images(name, size)
        try:
            copy.deepcopy(model)(x)
        except (AssertionError, RuntimeError, ValueError) as error:
            refusal = error
        else:
            return x
    raise refusal


def difference(ours, theirs):
    """The largest, relative to the largest element of its tensor, and of what."""
    assert ours.keys() == theirs.keys()
    sizes = {name: want.abs().max() for name, want in theirs.items() if want.numel()}
    # A bias before a norm has a gradient of 0, of which only rounding is to be seen.
    gradients = {name: size for name, size in sizes.items() if name.startswith("gradient")}
    floors = dict.fromkeys(gradients, 1e-5 * max(gradients.values(), default=0))
    found = {
        name: (ours[name] - theirs[name]).abs().max() / (size + floors.get(name, 0) + 1e-300)
        for name, size in sizes.items()
    }
    # To Python's max, a NaN may be the least of all.
    return max((float(d.nan_to_num(nan=torch.inf)), name) for name, d in found.items())


def skeleton(build):
    """The model without its parameters' memory, where it can be built so."""
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:  # RegNet works out its widths in tensors
        return build()


def check(name, build):
    """ok, WRONG or large, and what there is to say of a model; None if nothing is fused."""
    model = skeleton(build)
    if not any(row.reason is None for row in fusedskip.explain(model)):
        return None
    n_parameters = sum(p.numel() for p in model.parameters())
    if n_parameters > MOST_PARAMETERS:
        return "large", f"{n_parameters / 1e6:.0f} million parameters: not tried"
    torch.manual_seed(0)
    eager = build().double().train()
    for module in eager.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    x = least_images(name, eager)
    fused = fusedskip.fuse(copy.deepcopy(eager))
    training = difference(results(fused, x), results(eager, x))
    fused.eval()
    eager.eval()
    want = results(eager, x)
    evaluation = difference(results(fused, x), want)
    # With the statistics of one batch over few pixels some are chaotic.
    noise = difference(results(eager, x * (1 + 2**-52)), want)
    worst = max(training, evaluation)
    report = fusedskip.explain(fused)
    covered = f"{report.n_covered} of {report.n_norms} norms, {x.shape[-1]} pixels"
    is_ok = training[0] <= LIMIT and evaluation[0] <= max(LIMIT, 10 * noise[0])
    verdict = "ok" if is_ok else "WRONG"
    return verdict, f"{covered}: {worst[0]:.0e} of {worst[1]}"


def main():
    library, pattern = sys.argv[1], (*sys.argv[2:], "*")[0]
    verdicts = collections.Counter()
    for name, build in builders(library).items():
        if not fnmatch.fnmatch(name, pattern):
            continue
        try:
            checked = check(name, build)
        except Exception as error:
            checked = "WRONG", f"{type(error).__name__}: {error}".splitlines()[0]
        if checked is not None:
            verdict, said = checked
            verdicts[verdict] += 1
            print(f"{verdict:5} {name}: {said}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
    return int("WRONG" in verdicts)


if __name__ == "__main__":
    sys.exit(main())

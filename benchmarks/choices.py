"""`make choices`: write into csrc/cuda/measured.h what `make tune` has measured on GPUs.

How fast a pass of a tail is in one launch, relative to two: what the `cuda` backend chooses by.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.report import CASE, at, results_of
from benchmarks.runners import DTYPES, ON_CHIP, TWO_LAUNCHES

TAILS = {
    "batch_norm_relu": "kNothing",
    "batch_norm_add_relu": "kTensor",
    "dual_batch_norm_add_relu": "kNorm",
}
HEADER = """\
// What GPUs have measured: {sources}. Written by `make choices`.

#pragma once

#include <array>

#include "choice.h"

namespace fusedskip::cuda {{

// clang-format off
inline constexpr std::array<Measured, {count}> kMeasured = {{{{
{rows}}}}};
// clang-format on

}}  // namespace fusedskip::cuda
"""


def rows(measured: dict) -> Iterator[str]:
    """An initialiser of `Measured` for each pass that was measured both ways."""
    results = results_of(measured)
    architecture = measured["machine_info"]["architecture"]
    for one in at(results, runner=ON_CHIP):
        if one["launched"].startswith("two"):
            continue  # there is no such kernel, or no room for it
        backward = str(one["passes"] == "backward").lower()
        channels_last = str(one["layout"] == "channels_last").lower()
        tail, itemsize = TAILS[one["function"]], DTYPES[one["dtype"]].itemsize
        batch, channels, *plane = map(int, one["shape"].split("x"))
        for two in at(results, runner=TWO_LAUNCHES, **{name: one[name] for name in CASE}):
            speed = one["speed"] / two["speed"]  # each is relative to the eager beside it
            yield (
                f"    {{{{{architecture}, {backward}, Tail::{tail}, {channels_last}, {itemsize}}}, "
                f"{channels}, {batch * math.prod(plane)}, {speed:.2f}}},\n"
            )


def header(files: Iterable[Path]) -> str:
    """The text of csrc/cuda/measured.h."""
    files = sorted(files)
    initialisers = [row for path in files for row in rows(json.loads(path.read_text()))]
    return HEADER.format(
        sources=", ".join(path.name for path in files) or "nothing yet",
        count=len(initialisers),
        rows="".join(initialisers),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choices", description=__doc__)
    parser.add_argument("header", type=Path)
    parser.add_argument("results", type=Path, nargs="*", help="written by `make tune`")
    options = parser.parse_args()
    options.header.write_text(header(options.results))


if __name__ == "__main__":
    main()

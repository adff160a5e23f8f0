"""Without a GPU: kernels compile for sm_80, sm_90, sm_100, do not spill, and access 16 bytes.

Run as a program with a compute capability and a dtype, this file calls the ops on CPU tensors under
a driver that only compiles: signatures, alignment and launch parameters are those that Triton and
the launchers derive themselves. It is a process of its own because TRITON_INTERPRET, which the
other tests set, is read when Triton is imported.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fusedskip import ops

JOBS = list(itertools.product((80, 90, 100), ("float64", "float32", "bfloat16", "float16")))

# With whole vectors and many splits, and with neither; each in both layouts.
SHAPES = [(32, 64, 56, 56), (8, 67, 7, 7)]
STAGES = {f"batch_norm_{stage}_kernel" for stage in ("stats", "apply", "bwd_reduce", "bwd_apply")}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """One dict for each binary."""

    def run(job):
        capability, dtype = job
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(
            tmp_path_factory.getbasetemp() / f"{capability}{dtype}"
        )
        result = subprocess.run(
            [sys.executable, __file__, str(capability), dtype],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-4000:]
        return json.loads(result.stdout)

    with ThreadPoolExecutor(2) as pool:
        return [binary for job in pool.map(run, JOBS) for binary in job]


def test_every_stage_compiles_for_every_architecture(compiled):
    for job in JOBS:
        assert {b["kernel"] for b in compiled if (b["capability"], b["dtype"]) == job} == STAGES


def test_nothing_spills(compiled):
    assert [binary for binary in compiled if binary["stack"] or binary["local"]] == []


def test_contiguous_accesses_are_16_bytes_wide(compiled):
    vectorised = [b for b in compiled if b["whole_vectors"] and b["dtype"] != "float64"]
    assert {binary["kernel"] for binary in vectorised} == STAGES
    for binary in vectorised:
        assert binary["loads_128"] >= binary["loads_expected"] > 0, binary
        assert binary["stores_128"] >= binary["stores_expected"], binary
        # Channels-first, load_origin reads the one first element of its channel. Parameters in 16
        # bits are read and written element by element, once a program.
        if binary["arguments"].get("weight_ptr") in (None, "torch.float32"):
            assert binary["accesses_16"] <= 1, binary


def test_positions_have_64_bits_where_32_do_not_count_them(compiled):
    long = {(b["kernel"], b["channels_last"]) for b in compiled if b["index_bits"] == 64}
    assert long == set(itertools.product(STAGES, (True, False)))


def test_eps_keeps_the_precision_of_python(compiled):
    assert {binary["eps"] for binary in compiled} == {None, "fp64"}


def compile_all(capability, dtype):
    """The properties of all binaries for one architecture and dtype."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    class CompileOnly:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

    driver.set_active(CompileOnly())
    run, binaries = JITFunction.run, {}

    def compile_instead(self, *args, grid, warmup, **kwargs):
        binary = run(self, *args, grid=grid, warmup=True, **kwargs)
        arguments = self.signature.bind(
            *args, **{k: v for k, v in kwargs.items() if k != "num_warps"}
        )
        if binary.hash not in binaries:
            binaries[binary.hash] = {
                "capability": capability,
                "dtype": str(dtype).removeprefix("torch."),
                "eps": binary.src.signature.get("eps"),
                "arguments": describe(arguments.arguments),
                "index_bits": arguments.arguments["INDEX_DTYPE"].primitive_bitwidth,
                "channels_last": arguments.arguments["CHANNELS_LAST"],
                **expected_accesses(self.__name__, arguments.arguments),
                **accesses(binary.asm["ptx"]),
                **resources(binary.asm["cubin"], Path(triton.__file__).parent),
            }
        return binary

    JITFunction.run = compile_instead
    dtype = getattr(torch, dtype)
    for shape, channels_last in itertools.product(SHAPES, (True, False)):
        call_every_variant(shape, channels_last, dtype, ops.statistics_dtype(dtype))
    if dtype.itemsize == 2:
        call_every_variant(SHAPES[0], True, dtype, parameter_dtype=dtype)
        call_with_64_bit_positions(dtype)
    return list(binaries.values())


def call_every_variant(shape, channels_last, dtype, parameter_dtype):
    """Every combination of flags that the functional layer asks for."""
    from fusedskip.triton_kernels import (
        add_relu,
        add_relu_backward,
        batch_norm,
        batch_norm_backward,
    )

    x = torch.empty(shape, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    buffers = [torch.empty(shape[1], dtype=parameter_dtype) for _ in range(4)]
    weight, bias, *_ = buffers
    mean = rstd = torch.empty(shape[1], dtype=ops.statistics_dtype(dtype))

    for save_mask in (True, False):
        out, bits = add_relu(x, x, save_mask)
        if save_mask:
            add_relu_backward(out, bits)
    for training in (True, False):
        for residual, relu, save_mask in [
            (None, True, False),
            (x, False, False),
            (x, True, False),
            (x, True, True),
        ]:
            _, mask, *_ = batch_norm(x, residual, *buffers, training, 0.1, 1e-5, relu, save_mask)
        for bits, relu in [(mask, True), (None, True), (None, False)]:
            needs = True, bits is not None, True
            batch_norm_backward(x, x, bits, weight, bias, mean, rstd, training, relu, *needs)
    for needs in [(False, True, False), (False, False, True)]:
        batch_norm_backward(x, x, mask, weight, bias, mean, rstd, True, True, *needs)
    batch_norm(x, None, None, None, None, None, True, 0.1, 1e-5, True, False)
    batch_norm_backward(x, x, None, None, None, mean, rstd, True, True, True, False, False)


def call_with_64_bit_positions(dtype):
    """All stages in both layouts on 2**31 elements, of which none is ever touched."""
    from fusedskip.triton_kernels import batch_norm, batch_norm_backward

    for shape in ((2**31, 1), (2**25, 1, 8, 8)):
        x = torch.empty(shape, dtype=dtype)
        _, mask, mean, rstd = batch_norm(x, x, None, None, None, None, True, 0.1, 1e-5, True, True)
        batch_norm_backward(x, x, mask, None, None, mean, rstd, True, True, True, True, False)


def describe(arguments):
    """What tells one variant of a kernel from another, for a failing assertion to show."""
    return {
        name: None if value is None else str(getattr(value, "dtype", value))
        for name, value in arguments.items()
    }


def expected_accesses(kernel, arguments):
    """The 16-byte accesses to activations that a thread makes for a tile, by the arguments."""
    a = arguments
    tensor = a["x_ptr"] if "x_ptr" in a and a["x_ptr"] is not None else a["dout_ptr"]
    if kernel == "batch_norm_stats_kernel":
        reads, writes = 2, 0  # the first tile, and the loop
    elif kernel == "batch_norm_apply_kernel":
        reads, writes = 1 + (a["residual_ptr"] is not None), 1
    elif kernel == "batch_norm_bwd_reduce_kernel":
        reads, writes = 2, 0
    else:
        writes = (a["dx_ptr"] is not None) + (a["dresidual_ptr"] is not None)
        reads_x = (a["TRAINING"] and a["dx_ptr"] is not None) or (
            a["RELU"] and a["mask_ptr"] is None
        )
        reads = 1 + reads_x if writes else 0
    vector = 16 // tensor.element_size()
    return {
        "kernel": kernel,
        "whole_vectors": a["VEC"] == vector and (reads or writes),
        "loads_expected": 2 * reads,
        "stores_expected": 2 * writes,
    }


def accesses(ptx):
    def count(pattern):
        return len(re.findall(pattern, ptx))

    return {
        "loads_128": count(r"ld\.global(\.\w+)*\.v4\.b32"),
        "stores_128": count(r"st\.global(\.\w+)*\.v4\.b32"),
        "accesses_16": count(r"(ld|st)\.global(\.\w+)*\.b16"),
    }


def resources(cubin, triton_path):
    """Bytes of stack and of local memory; spills are on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton_path / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    return {
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local": int(re.search(r"LOCAL:(\d+)", usage)[1]),
    }


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]), sys.argv[2])))

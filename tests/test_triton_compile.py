"""Without a GPU: kernels compile for sm_80, sm_90, sm_100, do not spill, and access 16 bytes.

Every job has the variants that need most registers: training, with all that forward saves and
backward returns, channels-last, with whole vectors and with accesses of single elements. On sm_90
bf16 and fp32 have these channels-first as well, and bf16 has all else: every other combination of
flags that the functional layer asks for, parameters in 16 bits, and positions of 64 bits.

Run as a program with a compute capability and dtypes, this file calls the ops on CPU tensors under
a driver that only compiles: signatures, alignment and launch parameters are those that Triton and
the launchers derive themselves. It is a process of its own because TRITON_INTERPRET, which the
other tests set, is read when Triton is imported. One test makes all assertions about a job, so that
whichever worker has it, nothing is compiled twice.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fusedskip import ops

JOBS = [
    (90, "bfloat16"),
    (90, "float32"),
    (90, "float16 float64"),
    # In every kernel fp32 needs at most the registers of bf16, which stands for it here.
    (80, "bfloat16"),
    (100, "bfloat16"),
]
# The widest tiles there are: 64 channels, or 32 with two norms, and MAX_SPLITS partials of each.
WHOLE_VECTORS, SCALARS = (32, 256, 28, 28), (32, 131, 15, 15)
NO_NORM = (None,) * 4
FLOATS = ("fp16", "bf16", "fp32", "fp64")
STAGES = {f"batch_norm_{stage}_kernel" for stage in ("stats", "apply", "bwd_reduce", "bwd_apply")}
# These work on numbers a channel alone.
CHANNEL_KERNELS = {"batch_norm_moments_kernel", "batch_norm_merge_kernel"}


@pytest.mark.parametrize(("capability", "dtypes"), JOBS)
def test_compiled(capability, dtypes, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Line numbers cost a tenth of the time.
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DISABLE_LINE_INFO": "1"}
    result = subprocess.run(
        [sys.executable, __file__, str(capability), dtypes],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    binaries = json.loads(result.stdout)

    vectorised = [binary for binary in binaries if binary["whole_vectors"]]
    assert {binary["kernel"] for binary in vectorised} == STAGES
    for binary in binaries:
        assert (binary["stack"], binary["local"]) == (0, 0), binary  # nothing spills
        assert set(binary["floats"]) <= {"fp64"}, binary  # eps has the precision of Python
    for binary in vectorised:
        if binary["dtype"] != "float64":
            check_accesses(binary)
    if (capability, dtypes) == JOBS[0]:
        long = {(b["kernel"], b["channels_last"]) for b in binaries if b["long"]}
        assert long == set(itertools.product(STAGES, (True, False)))
        assert {binary["kernel"] for binary in binaries} == STAGES | CHANNEL_KERNELS


def check_accesses(binary):
    """Contiguous accesses are 16 bytes wide."""
    assert binary["loads_128"] >= binary["loads_expected"] > 0, binary
    assert binary["stores_128"] >= binary["stores_expected"], binary
    # Channels-first, load_origin reads the one first element of its channel. Parameters in 16 bits
    # are read and written element by element, once a program.
    if binary["arguments"].get("weight_ptr") in (None, "torch.float32"):
        origins = 2 if binary["arguments"].get("DUAL") == "True" else 1
        assert binary["accesses_16"] <= origins, binary


def compile_all(capability, dtypes):
    """The properties of all binaries for one architecture and some dtypes."""
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
            *args, **{k: v for k, v in kwargs.items() if k not in ("num_warps", "maxnreg")}
        )
        if binary.hash not in binaries:
            binaries[binary.hash] = {
                "dtype": str(dtype).removeprefix("torch."),
                "floats": [ty for ty in binary.src.signature.values() if ty in FLOATS],
                "arguments": describe(arguments.arguments),
                "long": arguments.arguments.get("INDEX_DTYPE") == triton.language.int64,
                "channels_last": arguments.arguments.get("CHANNELS_LAST"),
                **expected_accesses(self.__name__, arguments.arguments),
                **accesses(binary.asm["ptx"]),
                **resources(binary.asm["cubin"], Path(triton.__file__).parent),
            }
        return binary

    JITFunction.run = compile_instead
    for dtype in (getattr(torch, name) for name in dtypes.split()):
        call_widest(*make_problem(WHOLE_VECTORS, True, dtype))
        call_widest(*make_problem(SCALARS, True, dtype))
        if (capability, dtypes) in JOBS[:2]:
            call_widest(*make_problem(WHOLE_VECTORS, False, dtype))
        if (capability, dtypes) == JOBS[0]:
            for channels_last in (True, False):
                call_the_rest(*make_problem(WHOLE_VECTORS, channels_last, dtype))
                call_synchronised(*make_problem(WHOLE_VECTORS, channels_last, dtype))
            call_widest(*make_problem(WHOLE_VECTORS, True, dtype, dtype))
            call_with_64_bit_positions(dtype)
    return list(binaries.values())


def make_problem(shape, channels_last, dtype, parameter_dtype=None):
    """An activation, (weight, bias, running mean and variance), and the statistics of two norms."""
    x = torch.empty(shape, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    statistics = torch.empty(2, 2, shape[1], dtype=ops.statistics_dtype(dtype))
    norm = [torch.empty(shape[1], dtype=parameter_dtype or statistics.dtype) for _ in range(4)]
    return x, norm, statistics


def call_widest(x, norm, statistics, training=True):
    """BN+ReLU, BN+add+ReLU, and the ReLU of two norms: all that they can save and return."""
    from fusedskip.triton_kernels import ops as kernels

    weight, bias, *_ = norm
    numbers = training, 0.1, 1e-5
    kernels.batch_norm(x, None, *norm, *numbers, True, False)
    kernels.batch_norm_backward(
        x, x, None, weight, bias, statistics, training, True, True, False, True
    )
    _, mask, *_ = kernels.batch_norm(x, x, *norm, *numbers, True, True)
    kernels.batch_norm_backward(
        x, x, mask, weight, bias, statistics, training, True, True, True, True
    )
    kernels.dual_batch_norm(x, x, *norm, *norm, *numbers, 0.1, 1e-5, True)
    kernels.dual_batch_norm_backward(
        x, x, x, mask, weight, bias, weight, bias, statistics, training, True, True, True
    )


def call_the_rest(x, norm, statistics):
    """Every other combination of flags that the functional layer asks for."""
    from fusedskip.triton_kernels import ops as kernels

    weight, bias, *_ = norm
    call_widest(x, norm, statistics, training=False)
    wider = torch.cat([x, x], 1)[:, : x.shape[1]]
    for training in (True, False):
        numbers = training, 0.1, 1e-5
        for relu in (True, False):
            kernels.batch_norm(x, x, *norm, *numbers, relu, False)
        kernels.batch_norm_backward(
            x, x, None, weight, bias, statistics, training, False, True, False, True
        )
        kernels.batch_norm_relu_into(x, *norm, wider, *numbers)
        kernels.dual_batch_norm(x, x, *norm, *norm, *numbers, 0.1, 1e-5, False)

    _, mask, *_ = kernels.batch_norm(x, x, *norm, True, 0.1, 1e-5, True, True)
    for needs in [(False, True, False), (False, False, True)]:
        kernels.batch_norm_backward(x, x, mask, weight, bias, statistics, True, True, *needs)
    for needs in [(True, False, False), (False, True, False), (False, False, True)]:
        kernels.dual_batch_norm_backward(
            x, x, x, mask, weight, bias, weight, bias, statistics, True, *needs
        )
    kernels.batch_norm(x, None, *NO_NORM, True, 0.1, 1e-5, True, False)
    kernels.batch_norm_backward(x, x, None, None, None, statistics, True, True, True, False, False)

    for relu_first, save_mask in itertools.product((True, False), repeat=2):
        out, mask = kernels.add_relu(x, x, relu_first, save_mask)
        if save_mask:
            kernels.add_relu_backward(out, mask)


def call_synchronised(x, norm, statistics):
    """The stages that a norm over several ranks has of its own."""
    from fusedskip.triton_kernels import ops as kernels

    weight, bias, *running = norm
    moments = kernels.batch_norm_stats(x).expand(3, -1).contiguous()
    mean, var, _ = kernels.batch_norm_merge(moments, *running, 0.1)
    _, mask, *_ = kernels.batch_norm(x, x, weight, bias, mean, var, False, 0.1, 1e-5, True, True)
    kernels.batch_norm_backward_apply(
        x, x, mask, weight, bias, statistics, statistics[0].flatten(), True, True, True
    )


def call_with_64_bit_positions(dtype):
    """All stages in both layouts on 2**31 elements, of which none is ever touched."""
    from fusedskip.triton_kernels import ops as kernels

    for shape in ((2**31, 1), (2**25, 1, 8, 8)):
        x = torch.empty(shape, dtype=dtype)
        _, mask, statistics = kernels.dual_batch_norm(
            x, x, *NO_NORM, *NO_NORM, True, 0.1, 1e-5, 0.1, 1e-5, True
        )
        kernels.dual_batch_norm_backward(
            x, x, x, mask, *NO_NORM, statistics, True, True, True, False
        )


def describe(arguments):
    """What tells one variant of a kernel from another, for a failing assertion to show."""
    return {
        name: None if value is None else str(getattr(value, "dtype", value))
        for name, value in arguments.items()
    }


def expected_accesses(kernel, arguments):
    """The 16-byte accesses to activations that a thread makes for a tile, by the arguments."""
    a = arguments
    if kernel in CHANNEL_KERNELS:
        return {"kernel": kernel, "whole_vectors": False}
    tensor = a["x_ptr"] if "x_ptr" in a and a["x_ptr"] is not None else a["dout_ptr"]
    if kernel == "batch_norm_stats_kernel":
        reads, writes = 2, 0  # the first tile, and the loop
    elif kernel == "batch_norm_apply_kernel":
        reads, writes = 1 + (a["residual_ptr"] is not None), 1
    elif kernel == "batch_norm_bwd_reduce_kernel":
        reads, writes = 2 + (a["residual_ptr"] is not None), 0
    else:
        writes = (a["dx_ptr"] is not None) + (a["dresidual_ptr"] is not None)
        reads_x = (a["TRAINING"] and a["dx_ptr"] is not None) or (
            a["RELU"] and a["mask_ptr"] is None
        )
        reads_residual = (
            a["TRAINING"] and a["residual_ptr"] is not None and a["dresidual_ptr"] is not None
        )
        reads = 1 + reads_x + reads_residual if writes else 0
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
        "loads_128": count(r"ld\.global(\.[\w:]+)*\.v4\.b32"),
        "stores_128": count(r"st\.global(\.[\w:]+)*\.v4\.b32"),
        "accesses_16": count(r"(ld|st)\.global(\.[\w:]+)*\.b16"),
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

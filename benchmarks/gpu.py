"""`make gpu`: build, test, sanitize and measure on this machine's GPU, and sum it up in Markdown.

It takes the Python that holds torch, and no network. A part that fails does not stop the next, and
`summary.md` is written anew after each: what was done is there however the run ends. `--parts`
leaves out all others but for the build, and gives their time to these.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.cpp_extension import CUDA_HOME

from benchmarks import report

ROOT = Path(__file__).parent.parent
BACKENDS = "import fusedskip; print(*fusedskip.available_backends())"
LEVELS = "ops", "overhead", "blocks", "models"
BUILD = "install", "build", "backends"
TUNED_BATCHES = 64, 256
TUNE = tuple(f"tune-{batch}" for batch in TUNED_BATCHES)
# Those that may end a process each measure by themselves.
MEASURING = "benchmarks", "triton", "one-launch"
PARTS = "tests", "memcheck", *MEASURING, "racecheck", *TUNE
# Seconds from here to the end, whatever the parts: nine minutes, less those that torch takes to
# be imported on a machine that has just started.
TOTAL = 530
# Of the last part that measured, and of all: what pytest-benchmark writes at its end, and each
# figure as it came.
LAST, SO_FAR = "last.json", "so-far.jsonl"
# Seconds of its limit in which a part that is out of time may say how far it came: xdist waits ten
# for its workers first.
GRACE = 25
# What has nothing on a GPU: `make test` runs it anywhere.
WITHOUT_GPU = (
    "architecture", "benchmarks", "cuda_*", "distributed", "export", "report", "surgery*",
    "triton_*", "wheel",
)  # fmt: skip
# A test's name may have spaces. Those of a summary are followed by a reason.
FAILURE = re.compile(
    r"(?:\[gw\d+\] \[ *\d+%\] )?((?:FAILED|ERROR) ([^\s:]+(?:::.+?)?)(?: - .*)?)\s*$"
)


@dataclass
class Part:
    """A command, and what became of it."""

    name: str
    log: Path
    limit: int  # seconds; what earlier parts have left over comes on top
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    obstacle: str | None = None  # why it cannot run here
    result: str = "not run"
    seconds: float = 0.0
    last_line: str = ""

    def run(self, deadline: float) -> None:
        """Run the command until the deadline of `time.monotonic`."""
        if self.obstacle:
            self.result = f"not run: {self.obstacle}"
            return
        start = time.monotonic()
        with self.log.open("ab") as log:
            offset = log.tell()
            process = subprocess.Popen(
                self.command, cwd=ROOT, env=os.environ | self.environment,
                stdout=log, stderr=subprocess.STDOUT, process_group=0,
            )  # fmt: skip
        try:
            self.result = "failed" if process.wait(deadline - GRACE - start) else "ok"
        except subprocess.TimeoutExpired:
            self.result = "failed: out of time"
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.seconds = time.monotonic() - start
        lines = self.log.read_bytes()[offset:].decode(errors="replace").splitlines()
        said = next((line for line in reversed(lines) if line.strip()), "").strip("= ")
        self.last_line = said if len(said) < 100 else f"{said[:97]}..."


def plan(out: Path) -> list[Part]:
    """The parts in their order. There is time for all but tuning, and for that alone."""
    no_gpu = None if torch.cuda.is_available() else "no CUDA device"
    cores = workers = len(os.sched_getaffinity(0))
    build = {"FUSEDSKIP_BUILD": "auto" if no_gpu else "cuda", "MAX_JOBS": str(cores)}
    if not no_gpu:
        build["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
        memory = torch.cuda.get_device_properties(0).total_memory
        workers = max(1, min(cores, memory // 2**32))
    folders = os.environ["PATH"], f"{CUDA_HOME}/bin", f"{CUDA_HOME}/compute-sanitizer"
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    no_sanitizer = None if sanitizer else "compute-sanitizer is not installed"
    # Warnings here are of other versions than those that the project is developed with.
    pytest_options = {"PYTEST_ADDOPTS": "-W default"}

    def part(name, log, limit, command, obstacle=None, **environment):
        argv = [sys.executable, *shlex.split(command)]
        return Part(name, out / log, limit, argv, environment, obstacle)

    def benchmark(name, log, limit, results, options) -> Part:
        # With names: the log says which one hangs.
        return part(
            name, log, limit,
            "-m pytest -v --benchmark-enable --benchmark-only "
            f"--benchmark-json={folder}/{results} {options}",
            no_gpu, **pytest_options,
        )  # fmt: skip

    def measure(name: str, limit: int, runners: str) -> Part:
        return benchmark(
            name, "bench.txt", limit, LAST,
            f"{levels} -k '{runners}' --benchmark-max-time=0.2 --so-far={folder}/{SO_FAR}",
        )  # fmt: skip

    def sanitize(tool: str) -> Part:
        # No caching: each tensor is an allocation of its own, and a read beyond it is seen.
        sanitized = part(
            tool, "sanitize.txt", 40, "-m tests.sanitize", no_gpu or no_sanitizer,
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
        options = f"--tool={tool} --error-exitcode=1 --target-processes=application-only"
        sanitized.command[:0] = [str(sanitizer), *options.split()]
        return sanitized

    # Of a kernel that hangs, and all that its process has yet to run.
    has_timeout = importlib.util.find_spec("pytest_timeout")
    timeout = "--timeout=120 --timeout-method=thread" if has_timeout else ""
    folder = shlex.quote(str(out))
    levels = " ".join(f"benchmarks/bench_{level}.py" for level in LEVELS)
    ignored = " ".join(f"--ignore-glob=*/test_{name}.py" for name in WITHOUT_GPU)
    return [
        part(
            "install", "build.txt", 40,
            "-m pip install --quiet --no-index --no-deps --no-build-isolation --editable .",
            FUSEDSKIP_BUILD="none", PIP_DISABLE_PIP_VERSION_CHECK="1",
        ),
        part("build", "build.txt", 65, "setup.py --quiet build_ext --inplace --force", **build),
        part("backends", "build.txt", 40, f"-c {shlex.quote(BACKENDS)}"),
        # Line by line, so that the log has it even if time is up. Dealt in a way that survives the
        # end of a worker, as which a fault on the GPU ends: by loadgroup xdist 3.8 waits for ever.
        part(
            "tests", "tests.txt", 140,
            f"-m pytest tests -n {workers} --dist=load --max-worker-restart=1000 "
            f"-v --tb=short {timeout} {ignored}",
            no_gpu, OMP_NUM_THREADS="1", FUSEDSKIP_TEST_BACKENDS="cuda triton", **pytest_options,
        ),
        sanitize("memcheck"),
        measure("benchmarks", 80, "not cuda_on_chip and not triton"),
        measure("triton", 40, "triton"),
        # Blocks that wait for each other in vain would take all figures with them.
        measure("one-launch", 45, "cuda_on_chip"),
        sanitize("racecheck"),
        *(
            benchmark(
                f"tune-{batch}", "tune.txt", 185, f"launches-{batch}.json",
                f"benchmarks/bench_ops.py --launches --batch={batch} --benchmark-max-time=0.1",
            )
            for batch in TUNED_BATCHES
        ),
    ]  # fmt: skip


def collect(out: Path) -> None:
    """Move what the last part has measured, if it came to its end, into bench.json."""
    last, whole = out / LAST, out / "bench.json"
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        measured = json.loads(last.read_text())
        if whole.exists():
            measured["benchmarks"][:0] = json.loads(whole.read_text())["benchmarks"]
        whole.write_text(json.dumps(measured))
    last.unlink(missing_ok=True)


def measured_so_far(out: Path) -> dict:
    """What all parts have measured, those that came to no end, too."""
    measured = {"benchmarks": []}
    with contextlib.suppress(FileNotFoundError):
        measured = json.loads((out / "bench.json").read_text())
    with contextlib.suppress(FileNotFoundError):
        lines = (out / SO_FAR).read_text().splitlines()
        measured["benchmarks"] = [json.loads(line) for line in lines]
    return measured


def output_of(*command: str) -> str:
    """The first line that a command prints, or "unknown"."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
        output = subprocess.check_output(command, cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
        return output.splitlines()[0]
    return "unknown"


def machine() -> dict[str, str]:
    """What it ran on. A copy without .git learns its commit from the variable COMMIT."""
    query = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": output_of(*query),
        "torch": torch.__version__,
        "triton": output_of(sys.executable, "-c", "import triton; print(triton.__version__)"),
        "commit": os.environ.get("COMMIT") or output_of("git", "describe", "--always", "--dirty"),
    }


def summary(machine: dict[str, str], parts: list[Part], measured: dict) -> str:
    """The Markdown: on what, what became of each part, which tests failed, and how fast it was."""
    rows = [
        (part.name, part.result, f"{part.seconds:.0f}", part.last_line.replace("|", "\\|"))
        for part in parts
    ]
    failures = {}  # by test: as it ended, or with the reason, which pytest's summary has
    for log in dict.fromkeys(part.log for part in parts if part.log.exists()):
        for line in log.read_text(errors="replace").splitlines():
            if said := FAILURE.match(line):
                failures[said[2]] = f"- `{said[1].strip()}`\n"
    text = report.markdown(list(machine), [list(machine.values())])
    text += "\n" + report.markdown(["part", "result", "seconds", "its last line"], rows)
    text += "\n" * bool(failures) + "".join(failures.values())
    if results := report.results_of(measured):
        bandwidth = max(result.get("copy_gb_s", 0) for result in results)
        text += (
            f"\nMedians. A copy reached up to {bandwidth:.0f} GB/s. GB/s: "
            "bytes by `benchmarks/traffic.py` over time; of copy: as a share of what a copy of one "
            "tensor of the case reached in the same rounds.\n\n"
        )
        text += report.details(results, report.GPU_COLUMNS)
    return text + report.missing(measured)


def main() -> int:
    """Run all parts; 1 if one failed, or could not run for want of a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the results, replacing earlier ones")
    everything = [name for name in PARTS if name not in TUNE]
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=everything)
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = [part for part in plan(out) if part.name in (*BUILD, *options.parts)]
    facts = machine()
    files = {out / LAST, *(part.log for part in parts)}
    if not set(MEASURING).isdisjoint(options.parts):
        files |= {out / "bench.json", out / SO_FAR}
    for path in files:
        path.unlink(missing_ok=True)
    for name in ("TRITON_INTERPRET", "FUSEDSKIP_BACKEND"):  # each test names its own backend
        os.environ.pop(name, None)
    # ninja stands beside the interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    # Whatever ends this process ends the part under way; and no part starts with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    deadline = time.monotonic() + TOTAL - sum(part.limit for part in parts)
    for part in parts:
        print(f"{part.name} ...", flush=True)
        deadline += part.limit
        part.run(deadline)
        collect(out)
        text = summary(facts, parts, measured_so_far(out))
        (out / "summary.md").write_text(text)
    print(f"\n{text}\nAll of it is in {out}.")
    if not torch.cuda.is_available():
        print("There is no CUDA device: tests, sanitizers and benchmarks were not run.")
        return 1
    return int(any(part.result.startswith("failed") for part in parts))


if __name__ == "__main__":
    sys.exit(main())

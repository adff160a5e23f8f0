"""What the benchmarks share: the environment, interleaved rounds, and the summary at the end."""

import contextlib
import json
import operator
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import report, runners
from benchmarks.runners import DEVICE

RESULTS = pytest.StashKey[list[dict]]()
Call = Callable[[], object]


def pytest_addoption(parser):
    parser.addoption("--batch", type=int, help="batch size, instead of each shape's own")
    parser.addoption("--full", action="store_true", help="all cases: hours, not minutes")
    parser.addoption("--launches", action="store_true", help="one launch beside two, on a GPU")
    parser.addoption("--so-far", help="append each figure to this file as it comes, JSON lines")


def pytest_configure(config):
    config.stash[RESULTS] = []


def pytest_generate_tests(metafunc):
    """A module lists the NAMES and values of its CASES, and may say which are the usual ones."""
    module, option = metafunc.module, metafunc.config.getoption
    cases = module.CASES
    if option("--launches"):
        if runners.ON_CHIP not in runners.RUNNERS:
            raise pytest.UsageError(f"--launches: cuda: {runners.UNAVAILABLE['cuda']}")
        cases = [case for case in cases if module.compares_launches(*case)]
    elif hasattr(module, "usual") and not option("--full"):
        cases = [case for case in cases if module.usual(*case)]
    metafunc.parametrize(module.NAMES, cases)


def gpu() -> dict[str, object]:
    major, minor = torch.cuda.get_device_capability()
    return {"architecture": 10 * major + minor, "device": torch.cuda.get_device_name()}


# Asked ahead of any kernel, for one of them may be the last thing that works.
GPU = gpu() if DEVICE == "cuda" else {}


def pytest_benchmark_update_machine_info(machine_info):
    cpu = f"{machine_info['cpu'].get('brand_raw', 'CPU')}, {torch.get_num_threads()} threads"
    machine_info |= {"torch": torch.__version__, "device": cpu} | GPU


def pytest_benchmark_update_commit_info(commit_info):
    """A copy without .git learns its commit from the variable COMMIT."""
    if commit := os.environ.get("COMMIT"):
        commit_info["id"] = commit


def pytest_benchmark_update_json(config, output_json):
    output_json["unavailable"] = runners.UNAVAILABLE
    if not config.getoption("benchmark_save_data"):  # every round: megabytes
        for benchmark in output_json["benchmarks"]:
            benchmark["stats"].pop("data", None)


@pytest.fixture(scope="session", autouse=True)
def environment() -> None:
    """On a CPU, one thread a core, which it keeps, and a glibc that keeps freed memory."""
    if DEVICE == "cuda":
        return
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ or "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        pytest.fail("page faults would drown the kernels: set MALLOC_* as `make bench` does")
    cores = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(len(cores))
    others = set(os.listdir("/proc/self/task"))
    torch.zeros(len(cores), 1 << 16).add_(1)  # starts the threads
    workers = sorted(set(os.listdir("/proc/self/task")) - others, key=int)
    for thread, core in zip(workers, cores[1:], strict=True):
        os.sched_setaffinity(int(thread), {core})


class Instant:
    """A moment in the work of a GPU; the difference of two is the seconds between them."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Instant") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Keep the calling thread to the first core, where the others have theirs.

    Only while it measures: what it starts, Inductor's compilers among them, would share that core.
    """
    if DEVICE == "cuda":
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


CLOCK = {"cpu": time.perf_counter, "cuda": Instant}[DEVICE]


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
    # Inductor takes longer for a graph than the rest for all of their cases.
    items.sort(key=lambda item: "compile" in item.callspec.params["runner"])


@pytest.fixture
def measure(benchmark, request):
    """Time a runner among its rivals: `measure(run, eager, describe, copy)`.

    A round is copy, eager, copy, run: the machine's mood meets all of them, and both runners find
    the caches as a copy left them; `before` is called ahead of each. pytest-benchmark times `run`,
    as many rounds as its `--benchmark-max-time` allows. `describe(seconds, eager_seconds,
    copy_seconds)` makes the `extra_info`: from the median of `run`, and for its rivals from that
    times the median of their ratios to `run` round by round, since from one round to the next a
    machine may change its clock.
    """

    def measure(
        run: Call,
        eager: Call,
        describe: Callable[..., dict],
        copy: Call = lambda: None,
        before: Call = lambda: None,
        least_rounds: int = 5,
    ) -> None:
        rivals: dict[Call, list[float]] = {eager: [], copy: []}

        def seconds(call: Call) -> float:
            before()
            start = CLOCK()
            call()
            return CLOCK() - start

        def time_rivals() -> None:
            first_copy = seconds(copy)
            rivals[eager].append(seconds(eager))
            rivals[copy].append((first_copy + seconds(copy)) / 2)
            before()

        seconds(run)  # compiles
        time_rivals()
        with pinned():
            # Until the heap has grown to what they take: a page that is new to this process can
            # cost 6 us, and an output has thousands.
            calm = 0
            for _ in range(10):
                start, faults = time.perf_counter(), page_faults()
                time_rivals()
                seconds(run)
                calm = calm + 1 if page_faults() - faults < 100 else 0
                if calm == 2:
                    break
            budget = float(request.config.getoption("benchmark_max_time"))
            rounds = max(least_rounds, min(1000, int(budget / (time.perf_counter() - start))))
            benchmark.pedantic(run, setup=time_rivals, rounds=rounds)
        if benchmark.enabled:
            times, median = benchmark.stats.stats.data, benchmark.stats.stats.median
            ratios = (
                statistics.median(map(operator.truediv, rivals[rival][-rounds:], times))
                for rival in (eager, copy)
            )
            benchmark.extra_info |= describe(median, *(median * ratio for ratio in ratios))
            request.config.stash[RESULTS].append(benchmark.extra_info)
            if so_far := request.config.getoption("--so-far"):
                line = {"fullname": benchmark.fullname, "extra_info": benchmark.extra_info}
                with open(so_far, "a") as file:
                    file.write(json.dumps(line) + "\n")

    return measure


def pytest_terminal_summary(terminalreporter, config):
    if results := config.stash[RESULTS]:
        terminalreporter.section("speed relative to best eager, geometric mean over the shapes")
        terminalreporter.write(report.summary(results))

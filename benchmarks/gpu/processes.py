"""What `make gpu` runs outside of its own process: tests, sanitizers, and every measurement.

A kernel that reads wild memory breaks its process's CUDA context, and one that never ends blocks it: here both cost one
measurement and no other.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.measure import Record, left_out

ROOT = Path(__file__).parents[2]
SANITIZERS = ("memcheck", "racecheck", "initcheck")  # tools of compute-sanitizer, where it is installed
SANITIZED = "plan_ or any_strides"  # the tests that run under them
TEST_PROCESSES = 8  # Triton compiles on one core each
WARM_PROCESSES = 6
MEMORY = 96 * 2**30  # of the device, for one measurement


class Job(NamedTuple):
    """A measurement: function(*arguments, device, seconds) -> records. Both are pickled."""

    part: str
    label: str
    function: Callable[..., list[Record]]
    arguments: tuple[Any, ...]


class Failed(Exception):
    """A job raised, its process ended, or its time ran out."""


def _serve(connection: Connection) -> None:
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(*arguments)))
        except Exception as failure:
            connection.send((False, f"{type(failure).__name__}: {failure}"))


class Worker:
    """A process that runs one call after another; started when needed, and anew after a failure."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Any = None

    def run(self, function: Callable[..., Any], *arguments: Any, limit: float) -> Any:
        """What the function returns; Failed where it does not within `limit` seconds."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._connection.send((function, arguments))
            if not self._connection.poll(limit):
                raise Failed(f"stopped after {limit:.0f} s")
            done, result = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            self.close()
            raise Failed(f"the process ended with code {code}") from None
        except Failed:
            self.close()
            raise
        if not done:
            self.close()
            raise Failed(result)
        return result

    def close(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join(5)
            self._process = None


def run_job(job: Job, device: torch.device, seconds: float) -> list[Record]:
    """The job in the process that a worker is, its memory given back to the device."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY / total))
    else:
        torch.set_num_threads(1)  # tiny sizes
    try:
        return job.function(*job.arguments, device, seconds)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def warm_up(jobs: Sequence[Job], device: torch.device, deadline: float) -> None:
    """Every job's checks, several at once, so that what they compile lies in the caches on disk when timing starts."""
    waiting = collections.deque(jobs)

    def work() -> None:
        with contextlib.closing(Worker()) as worker:
            while waiting and time.monotonic() < deadline:
                try:
                    job = waiting.popleft()
                    worker.run(run_job, job, device, 0.0, limit=deadline - time.monotonic())
                except (Failed, IndexError):  # a job that fails will say so when it is to be timed
                    continue

    count = min(WARM_PROCESSES, (os.cpu_count() or 2) // 2, len(jobs))
    with ThreadPoolExecutor(max(count, 1)) as pool:
        for _ in range(count):
            pool.submit(work)


def run_command(command: Sequence[str], log: Path, limit: float) -> int | None:
    """The exit code of a command, None if it and what it started were killed after `limit` seconds. Output: the log."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            return process.wait(max(limit, 0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def _last_line(log: Path, containing: str = "") -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip() and containing in line]
    return lines[-1].strip("= ") if lines else "no output"


def run_tests(out: Path, limit: float) -> Record:
    """The tests marked gpu."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "--durations=10"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1)), "--dist", "worksteal"]
    start, log = time.monotonic(), out / "tests.log"
    code = run_command([*command, "-p", "no:cacheprovider"], log, limit)
    took = time.monotonic() - start
    if code is None:
        return left_out("tests", "pytest -m gpu", "dyncore", f"stopped after {took:.0f} s")
    return {
        "part": "tests",
        "label": "pytest -m gpu",
        "way": "dyncore",
        "code": code,
        "summary": _last_line(log),
        "s": took,
    }


def run_tune(out: Path, limit: float) -> Record:
    """`dyncore tune`, its table in `out`; whatever it has measured when the time is over stands there."""
    start, log = time.monotonic(), out / "tune.log"
    command = ["env", f"DYNCORE_CACHE={out.resolve()}", sys.executable, "-m", "dyncore", "tune", "--device", "cuda"]
    code = run_command(command, log, limit)
    took = time.monotonic() - start
    if code is None:
        return left_out("tune", "dyncore tune", "dyncore", f"stopped after {took:.0f} s; see the table and tune.log")
    return {
        "part": "tune",
        "label": "dyncore tune",
        "way": "dyncore",
        "code": code,
        "summary": _last_line(log),
        "s": took,
    }


def run_sanitizer(out: Path, tool: str, limit: float) -> Record:
    """The tests of the CUDA C++ kernels under a tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return left_out("tests", tool, tool, "compute-sanitizer is not installed")
    tests = [sys.executable, "-m", "pytest", "tests/gpu/test_plans_gpu.py", "-m", "gpu", "-k", SANITIZED, "-q", "-x"]
    command = [program, "--tool", tool, "--error-exitcode", "9", *tests, "-p", "no:cacheprovider"]
    log = out / f"{tool}.log"
    code = run_command(command, log, limit)
    if code is None:
        return left_out("tests", tool, tool, f"stopped after {limit:.0f} s")
    return {"part": "tests", "label": tool, "way": tool, "code": code, "summary": _last_line(log, "ERROR SUMMARY")}

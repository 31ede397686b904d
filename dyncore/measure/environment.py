"""environment: the machine, the versions and the backends that a measurement was made with."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import dyncore
from dyncore import break_even, tilings
from dyncore.backends import cpu, cuda, triton

_CACHE_ROOT = Path("/sys/devices/system/cpu/cpu0/cache")
_STAT = Path("/proc/stat")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def _cache_sizes() -> list[int]:
    sizes: list[int] = []
    for file in sorted(_CACHE_ROOT.glob("index*/size")):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * _UNITS[text[-1]] if text[-1:] in _UNITS else int(text))
    return sizes


@functools.cache
def last_level_cache() -> int:
    """Bytes of the largest cache that this machine's first core sees; 32 MiB where the system does not tell."""
    try:
        return max(_cache_sizes(), default=2**25)
    except (OSError, ValueError):
        return 2**25


def usable_cores() -> int:
    """Cores that this process may use: those of its affinity, or fewer where a container's quota allows less."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        quota, period = _CPU_QUOTA.read_text().split()
        return cores if quota == "max" else min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


class OtherWork:
    """What other programs of this machine do from now on, as /proc/stat tells."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds of all cores' work, of this process's, and of the clock."""
        try:
            user, nice, system, _, _, *more = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:9])
            busy = (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, AttributeError):  # not every system tells
            return None
        return busy, time.process_time(), time.perf_counter()

    def cores(self) -> float | None:
        """How many cores others kept busy, what the host of a virtual machine took included; None where it is not
        known, or after less than 0.2 s."""
        now = self._now()
        if now is None or self._start is None:
            return None
        busy, own, passed = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, busy - own) / passed if passed >= 0.2 else None

    def warning(self) -> str | None:
        """A sentence where others kept more than a tenth of the machine busy."""
        cores, all_cores = self.cores(), os.cpu_count() or 1
        if cores is None or cores <= all_cores / 10:
            return None
        return f"other programs kept {cores:.1f} of {all_cores} cores busy during the timing: ratios may be off"


def timing_warnings(*, load: bool = True) -> list[str]:
    """Why times taken now may mislead: more threads than cores, or, with `load`, other programs at work in the last
    minute. To be asked before ours."""
    found: list[str] = []
    threads, cores = torch.get_num_threads(), usable_cores()
    if threads > cores:
        found.append(f"{threads} threads share {cores} usable cores and wait for each other: ratios may be off")
    if not load:
        return found
    try:
        average = os.getloadavg()[0]
    except (AttributeError, OSError):  # not every system tells
        average = 0.0
    if average > (os.cpu_count() or 1) / 2:  # both are of the whole machine
        found.append(f"other programs keep this machine busy (load {average:.1f}): ratios may be off")
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any] | None:
    """Commit of the checkout that dyncore is imported from; None if it is not one (an installed wheel)."""
    root = Path(dyncore.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head, status = (
            subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=10)
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"id": head.stdout.strip(), "modified": bool(status.stdout.strip())}


def _backends() -> dict[str, dict[str, Any]]:
    built = "plain PyTorch, any device and dtype"
    return {
        "reference": {"available": True, "reason": built},
        "cpu": {"available": bool(cpu.available), "reason": str(cpu.reason)},
        "cuda": {"available": bool(cuda.available), "reason": str(cuda.reason)},
        "triton": {"available": bool(triton.available), "reason": str(triton.reason)},
    }


def _tilings() -> str | None:
    """Which tilings of the Triton kernels are in force on the current CUDA device."""
    if not (torch.cuda.is_available() and triton.available):
        return None
    return tilings.in_use(torch.cuda.current_device())


def environment() -> dict[str, Any]:
    """Versions, machine, instruction set, threads and backends, as a plain dict. No host name, no paths."""
    return {
        "versions": {
            "dyncore": dyncore.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
        },
        "commit": _commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "isa": cpu.isa() if cpu.available else None,
        "tuned": break_even.tuned(),
        "tuned_threads": list(break_even.thread_counts()),
        "tilings": _tilings(),
        "last_level_cache_bytes": last_level_cache(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": _backends(),
    }

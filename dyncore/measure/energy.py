"""Joules of a call, where the machine tells: a CPU's package by RAPL (Linux), an NVIDIA GPU by NVML.

The counters are of the whole package or board: what else it does is in the figure, and what it takes at rest.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_POWERCAP = Path("/sys/class/powercap")
Meter = Callable[[], float]  # joules since some moment


class NoMeter(Exception):
    """Why joules cannot be told."""


class _Package:
    """A RAPL counter in microjoules, which starts again at 0 past its range."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last, self._total = int(self._file.read_text()), 0

    def __call__(self) -> float:
        now = int(self._file.read_text())
        self._total += (now - self._last) % (self._range + 1)
        self._last = now
        return self._total / 1e6


def _of_cpu() -> Meter:
    folders = sorted(_POWERCAP.glob("intel-rapl:*")) if _POWERCAP.is_dir() else []
    folders = [f for f in folders if f.name.count(":") == 1]  # packages, not their parts
    if not folders:
        raise NoMeter("this machine shows no RAPL counters in /sys/class/powercap")
    try:
        packages = [_Package(folder) for folder in folders]
    except (OSError, ValueError) as error:
        reason = "reading them is for root alone" if isinstance(error, PermissionError) else str(error)
        raise NoMeter(f"the RAPL counters cannot be read: {reason}") from error
    return lambda: sum(package() for package in packages)


def _of_gpu(device: torch.device) -> Meter:
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError as error:
        raise NoMeter("NVML wants the package nvidia-ml-py, which is not installed") from error
    try:
        nvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid  # numbers of CUDA and NVML may differ
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # NVML's errors are classes of its own
        raise NoMeter(f"NVML does not tell the energy of this GPU: {error}") from error
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3  # from millijoules


def meter(device: torch.device) -> Meter:
    """The counter of a device. Raises NoMeter, with the reason in words."""
    return _of_gpu(device) if device.type == "cuda" else _of_cpu()


def joules(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Joules of one run, a mean over `seconds` of them, 3 at least. Raises NoMeter."""
    read = meter(device)
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    count, before, end = 0, read(), time.perf_counter() + seconds
    while count < 3 or time.perf_counter() < end:
        run()
        count += 1
        wait()
    return (read() - before) / count

"""What this machine can do at most, measured on the spot: the rate of a large matrix product, and of a copy."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from dyncore.measure.environment import last_level_cache

_SECONDS = 0.3  # for each of the two


class Ceilings(NamedTuple):
    """Rates that nothing exceeds by much.

    Attributes:
        gflops: GFLOP/s of a square matrix product.
        gbs: GB/s of a copy between tensors larger than the caches, bytes read and written.
    """

    gflops: float
    gbs: float


def _shortest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of many runs."""
    cuda = device.type == "cuda"
    wait: Callable[[], object] = torch.cuda.synchronize if cuda else lambda: None
    run()
    wait()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while True:
        start = time.perf_counter()
        run()
        wait()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best


@functools.lru_cache(maxsize=32)
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> Ceilings:
    size, cuda = (8192, True) if device.type == "cuda" else (768, False)
    # random numbers: a GPU clocks higher on equal ones
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    gemm = _shortest(lambda: torch.mm(a, b), device)
    count = 2**29 if cuda else max(2 * last_level_cache(), 2**26)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _shortest(lambda: target.copy_(source), device)
    return Ceilings(2 * size**3 / gemm / 1e9, 2 * count / copy / 1e9)


@torch.no_grad()
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Those of a device for products in a floating dtype, at the present number of threads: measured once a process, in
    about 0.6 s."""
    return _measured(device, dtype, torch.get_num_threads())

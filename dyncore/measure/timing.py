"""Timing that can be believed: variants interleaved, medians with their spread, cold weights.

Rivals are timed in the same rounds, so that a machine that slows down slows them all; the order turns from round to
round, so that nobody always runs in the caches another left behind. (torch.utils.benchmark and triton.testing time one
variant after the other: what changes in between is taken for their difference.)
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree

from dyncore.measure.environment import last_level_cache

_Tree = TypeVar("_Tree")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Samples of one variant, in nanoseconds, in the order they were taken."""

    samples_ns: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.samples_ns:
            raise ValueError("samples_ns: expected at least one sample, got none")

    @property
    def median(self) -> float:
        """Median in seconds."""
        return statistics.median(self.samples_ns) / 1e9

    @property
    def spread(self) -> float:
        """Interquartile range over the median: 0 for a single sample."""
        if len(self.samples_ns) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples_ns, n=4, method="inclusive")
        return (high - low) / (self.median * 1e9)

    def record(self) -> dict[str, Any]:
        """The record of the results schema: median_ms, spread, samples_ns."""
        return {"median_ms": self.median * 1e3, "spread": self.spread, "samples_ns": list(self.samples_ns)}


_RESAMPLES, _FEWEST = 1000, 5  # fewer samples than these say nothing of their spread


def ratio_interval(time: Timing, other: Timing, share: float = 0.95) -> tuple[float, float] | None:
    """Where the ratio of two medians lies, by a bootstrap over the rounds (Efron 1979); None below 5 samples each.

    Rounds of as many samples are drawn in pairs, as they were taken: what slows a round down slows both.
    """
    counts = len(time.samples_ns), len(other.samples_ns)
    if min(counts) < _FEWEST:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    first = torch.randint(counts[0], (_RESAMPLES, counts[0]), generator=generator, device="cpu")
    second = first
    if counts[0] != counts[1]:
        second = torch.randint(counts[1], (_RESAMPLES, counts[1]), generator=generator, device="cpu")
    above, below = (
        torch.tensor(t.samples_ns, dtype=torch.float64, device="cpu")[index].quantile(0.5, dim=1)
        for t, index in ((time, first), (other, second))
    )
    edges = torch.tensor([(1 - share) / 2, (1 + share) / 2], dtype=torch.float64, device="cpu")
    low, high = (above / below.clamp(min=1)).quantile(edges).tolist()
    return low, high


def _no_arguments(name: str, round: int) -> tuple[Any, ...]:
    return ()


class Interleaved:
    """Times variants in rounds: each runs once a round, from a start that moves by one with every round.

    Args:
        variants: name -> callable. What it returns is kept until its clock has stopped, so freeing it is not timed.
        arguments: (name, round) -> the arguments of that call, made outside the timed region; here fresh data and
            cold weights come in. Warm-up rounds have negative numbers.
        synchronize: called before each reading of the clock (torch.cuda.synchronize for a GPU).
        clock: nanoseconds.
    """

    def __init__(
        self,
        variants: Mapping[str, Callable[..., Any]],
        *,
        arguments: Callable[[str, int], tuple[Any, ...]] = _no_arguments,
        synchronize: Callable[[], object] | None = None,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        if not variants:
            raise ValueError("variants: expected at least one, got none")
        self.variants: dict[str, Callable[..., Any]] = dict(variants)
        self.samples: dict[str, list[int]] = {name: [] for name in self.variants}
        self.rounds: int = 0
        self._arguments = arguments
        self._synchronize = synchronize or (lambda: None)
        self._clock = clock

    def _time(self, name: str, round: int) -> int:
        args = self._arguments(name, round)
        fn = self.variants[name]
        self._synchronize()
        start = self._clock()
        kept = fn(*args)
        self._synchronize()
        elapsed = self._clock() - start
        del kept
        return elapsed

    def warm_up(self, rounds: int = 1) -> None:
        """Run every variant `rounds` times without keeping the samples."""
        for r in range(-rounds, 0):
            for name in self.variants:
                self._time(name, r)

    def round(self) -> None:
        """Time every variant once."""
        names = list(self.variants)
        first = self.rounds % len(names)
        for name in names[first:] + names[:first]:
            self.samples[name].append(self._time(name, self.rounds))
        self.rounds += 1

    def run(
        self,
        *,
        seconds: float = 2.0,
        min_rounds: int = 5,
        max_rounds: int = 100,
        warm_up: int = 1,
        limit: float = math.inf,
    ) -> dict[str, Timing]:
        """Warm up, then rounds until `seconds` have passed or max_rounds are done, but min_rounds at least; past
        `limit` seconds three rounds are enough."""
        if not 1 <= min_rounds <= max_rounds:
            raise ValueError(f"min_rounds: expected 1..max_rounds={max_rounds}, got {min_rounds}")
        if warm_up < 0:
            raise ValueError(f"warm_up: expected a number >= 0, got {warm_up}")
        self.warm_up(warm_up)
        start = self._clock()
        while self.rounds < max_rounds:
            passed = (self._clock() - start) / 1e9
            needed = min_rounds if passed < limit else min(3, min_rounds)
            if self.rounds >= needed and passed >= seconds:
                break
            self.round()
        return self.timings()

    def timings(self) -> dict[str, Timing]:
        """What was measured so far."""
        return {name: Timing(tuple(samples)) for name, samples in self.samples.items() if samples}


# Cycles that a device sleeps before a sample, about a millisecond, in which the host queues the whole call
_AHEAD = 2_000_000


def _between_events(fn: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """Nanoseconds of the current CUDA device between two events around fn(*args)."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    kept = fn(*args)
    end.record()
    end.synchronize()
    del kept
    return max(1, int(start.elapsed_time(end) * 1e6))  # from milliseconds


class InterleavedOnDevice(Interleaved):
    """Interleaved, but a sample lies between two events of the current CUDA device: the host's part of a call is not in
    it."""

    def _time(self, name: str, round: int) -> int:
        args = self._arguments(name, round)
        torch.cuda._sleep(_AHEAD)
        return _between_events(self.variants[name], args)


class InterleavedCold(Interleaved):
    """Interleaved on the current CUDA device, each sample with a cold L2 cache: what lies between two events behind a
    sweep over twice the cache. The device's waiting for the host is in it."""

    _swept: torch.Tensor | None = None

    def _time(self, name: str, round: int) -> int:
        args = self._arguments(name, round)
        if self._swept is None:
            size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
            self._swept = torch.empty(2 * max(size, 2**25), dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        self._swept.zero_()
        return _between_events(self.variants[name], args)


def timer(
    variants: Mapping[str, Callable[..., Any]],
    device: torch.device,
    arguments: Callable[[str, int], tuple[Any, ...]] = _no_arguments,
    cold: bool = False,
) -> Interleaved:
    """What times modules on a device, with `cold` caches behind a sweep over twice their size: by the wall clock, and
    by events where the cache is that of a CUDA device."""
    if device.type == "cuda":
        if cold:
            return InterleavedCold(variants, arguments=arguments)
        return Interleaved(variants, arguments=arguments, synchronize=torch.cuda.synchronize)
    if not cold:
        return Interleaved(variants, arguments=arguments)
    swept = torch.zeros(2 * last_level_cache(), dtype=torch.uint8, device="cpu")

    def behind_a_sweep(name: str, round: int) -> tuple[Any, ...]:
        found = arguments(name, round)
        swept.add_(1)
        return found

    return Interleaved(variants, arguments=behind_a_sweep)


def storage_bytes(tree: Any) -> int:
    """Bytes of the tensors in a pytree."""
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor))


def cold_copies(tree: _Tree, *, cache_bytes: int | None = None) -> list[_Tree]:
    """Enough copies of a pytree of weights that, used in turn, each is out of the last-level cache when it comes round.

    In a model, the other layers' weights have passed through the cache between two uses of a layer's. Together the
    copies take at least twice `cache_bytes` (default: this machine's); the first one is `tree` itself.
    """
    cache = last_level_cache() if cache_bytes is None else cache_bytes
    size = storage_bytes(tree)
    count = max(1, -(-2 * cache // size)) if size else 1

    def copy(t: torch.Tensor) -> torch.Tensor:
        return t.detach().clone().requires_grad_(t.requires_grad)

    return [tree] + [pytree.tree_map_only(torch.Tensor, copy, tree) for _ in range(count - 1)]

"""What savings found: the ratios, what stands against them, and how it is printed and written."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

from dyncore.measure.ceilings import Ceilings
from dyncore.measure.flops import Flops
from dyncore.measure.records import new_results, write_results
from dyncore.measure.timing import Timing, ratio_interval

SCHEMA = "dyncore.savings/1"
_NOISY = 0.05  # half the width of the interval of SE, over SE, from which on a record calls itself noisy


def scaling_efficiency(wall_clock_speedup: float, flop_speedup: float) -> float:
    """SE: wall-clock speed-up over FLOP speed-up. 1 where time falls exactly as FLOPs do."""
    return wall_clock_speedup / flop_speedup


def realised_saving(time: float, dense_time: float, flop: float, dense_flop: float) -> float | None:
    """RSR: share of time saved over share of FLOPs saved, (1 - t/t_dense) / (1 - F/F_dense); None if no FLOP was."""
    if flop == dense_flop:
        return None
    return (1 - time / dense_time) / (1 - flop / dense_flop)


def break_even(keep: Sequence[float], times: Sequence[float], dense_time: float) -> float | None:
    """The largest keep ratio up to which `times` stay at or under `dense_time`, linear between measured points.

    Returns the last ratio measured if all points are faster than dense, None if the first one is slower already.
    Raises ValueError if the lengths differ or are 0.
    """
    if not keep or len(keep) != len(times):
        raise ValueError(f"times: expected one for each of the {len(keep)} keep ratios (at least 1), got {len(times)}")
    points = sorted(zip(keep, times, strict=True))
    if points[0][1] > dense_time:
        return None
    for (k0, t0), (k1, t1) in itertools.pairwise(points):
        if t1 > dense_time:
            return k0 + (k1 - k0) * (dense_time - t0) / (t1 - t0)
    return points[-1][0]


class SavingsError(ValueError):
    """No saving is reported: the module failed, or its modes give other numbers.

    Attributes:
        partial: a dict of what was found until then: "flops", "notes", "warnings", "unavailable" and "errors", as in
            `Savings.record()`.
    """

    def __init__(self, message: str, partial: dict[str, Any]) -> None:
        super().__init__(message)
        self.partial: dict[str, Any] = partial


@dataclasses.dataclass(frozen=True)
class GateSweep:
    """A module whose gates are forced open at random, timed over the share that they let through.

    Attributes:
        keep: shares, from the least to 1 (as near as the layers can). timings: of each.
        baseline: of the baseline, timed in the same rounds.
    """

    keep: tuple[float, ...]
    timings: tuple[Timing, ...]
    baseline: Timing

    @property
    def overhead(self) -> float:
        """What skipping costs where nothing is skipped: time at the largest share over the baseline's, less 1."""
        return self.timings[-1].median / self.baseline.median - 1

    @property
    def break_even(self) -> float | None:
        """The largest share up to which skipping is no slower than the baseline; None if it is slower at the least."""
        return break_even(self.keep, [t.median for t in self.timings], self.baseline.median)

    def record(self) -> dict[str, Any]:
        """As a plain dict."""
        return {
            "keep": list(self.keep),
            "timings": [t.record() for t in self.timings],
            "baseline": self.baseline.record(),
        }


@dataclasses.dataclass(frozen=True)
class Savings:
    """What skipping saved: executed FLOPs and timings of each execution, their ratios, and where the rest went.

    Attributes:
        flops, timings: by name: "sparse", and of the baselines "masked", "dense", "naive", "smaller" those that could
            be made. FLOPs are ints, of `savings` such as `flops` gives: with `by_module`.
        baseline: what the ratios are against: "dense" where there is one, else "masked".
        about: the module's class, its dtype, device, phase ("forward" or "forward+backward"), threads, and
            whether caches were cold.
        made: baseline -> how it was made. unavailable: what was not measured -> why.
        sweep: over the share that gates let through; None where they cannot be forced.
        stages: name -> share of the time of a call: deciding, compacting, gathering, computing, scattering, and
            calling, the time between the ops.
        bytes: that the ops of a sparse call read and write. ceilings: what this machine does at most.
        peak_bytes: by name, the memory that a call takes beside parameters and inputs.
        batch_1: by name, the latency of one sample alone, a different one each time.
        joules: by name, of one sample.
        host_syncs: how often a call waits for the GPU; None on a CPU.
        uncounted: ops with an unknown number of FLOPs -> how often they were called.
        notes, warnings: sentences. errors: {"point", "variant", "message"} of what failed while all else stands.
    """

    flops: dict[str, int]
    timings: dict[str, Timing]
    baseline: str
    about: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    made: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    unavailable: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    sweep: GateSweep | None = None
    stages: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    bytes: int | None = None
    ceilings: Ceilings | None = None
    peak_bytes: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    batch_1: dict[str, Timing] = dataclasses.field(default_factory=dict[str, Timing])
    joules: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    host_syncs: int | None = None
    uncounted: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    notes: list[str] = dataclasses.field(default_factory=list[str])
    warnings: list[str] = dataclasses.field(default_factory=list[str])
    errors: list[dict[str, str]] = dataclasses.field(default_factory=list[dict[str, str]])

    @property
    def flop_speedup(self) -> float:
        """FLOPs of the baseline over those executed; infinite if none was, 1 if the baseline has none, too."""
        executed, all_of_it = self.flops["sparse"], self.flops[self.baseline]
        if executed:
            return all_of_it / executed
        return float("inf") if all_of_it else 1.0

    @property
    def wall_clock_speedup(self) -> float:
        """Median time of the baseline over that of skipping."""
        return self.timings[self.baseline].median / self.timings["sparse"].median

    @property
    def against(self) -> dict[str, float]:
        """By name, the median time of each baseline over that of skipping."""
        ours = self.timings["sparse"].median
        return {name: timing.median / ours for name, timing in self.timings.items() if name != "sparse"}

    @property
    def se(self) -> float | None:
        """Scaling efficiency: wall-clock speed-up over FLOP speed-up; None if one of them has no FLOPs."""
        flop_speedup = self.flop_speedup
        return None if flop_speedup in (0, math.inf) else scaling_efficiency(self.wall_clock_speedup, flop_speedup)

    @property
    def rsr(self) -> float | None:
        """Realised saving: share of time saved over share of FLOPs saved; None if no FLOP was."""
        if not self.flops[self.baseline]:
            return None
        times = self.timings["sparse"].median, self.timings[self.baseline].median
        return realised_saving(*times, self.flops["sparse"], self.flops[self.baseline])

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the wall-clock speed-up lies, with 95%, by a bootstrap over the rounds; None below five of them."""
        return ratio_interval(self.timings[self.baseline], self.timings["sparse"])

    @property
    def noise(self) -> str | None:
        """What the spread of the samples leaves open, in a sentence; None where it leaves little."""
        if self.interval is None:
            rounds = min(len(self.timings[name].samples_ns) for name in ("sparse", self.baseline))
            counted = f"{rounds} round{'s' if rounds > 1 else ''}"
            return f"noise is not known: {counted} alone; SE may be far off, more seconds would say"
        low, high = self.interval
        half = (high - low) / (low + high)
        if low <= 1 <= high and self.flop_speedup > 1.005:
            return f"within noise: the wall-clock speed-up lies in {low:.2f}..{high:.2f}, no difference to rely on"
        if half > _NOISY:
            return f"noisy: SE is known to ±{half:.0%} alone; more seconds or a quieter machine would say more"
        return None

    @property
    def overhead(self) -> float | None:
        """Time with every gate forced open over the baseline's, less 1; None where gates cannot be forced."""
        return None if self.sweep is None else self.sweep.overhead

    @property
    def gflops(self) -> float:
        """GFLOP/s of skipping."""
        return self.flops["sparse"] / self.timings["sparse"].median / 1e9

    @property
    def gbs(self) -> float | None:
        """GB/s of skipping: the bytes that its ops read and write over its time."""
        return None if self.bytes is None else self.bytes / self.timings["sparse"].median / 1e9

    def record(self) -> dict[str, Any]:
        """A document of schema dyncore.savings/1, raw samples included: fields as in docs/results.md."""
        results = new_results("measure.savings")
        interval = self.interval
        layered = {name: count for name, count in self.flops.items() if isinstance(count, Flops)}
        return {
            "schema": SCHEMA,
            **{name: results[name] for name in ("created", "command", "environment")},
            **self.about,
            "baseline": self.baseline,
            "flops": {name: int(count) for name, count in self.flops.items()},
            "by_module": {name: {n: k for n, k in c.by_module.items() if n and k} for name, c in layered.items()},
            "timings": {name: timing.record() for name, timing in self.timings.items()},
            "flop_speedup": None if math.isinf(self.flop_speedup) else self.flop_speedup,
            "wall_clock_speedup": self.wall_clock_speedup,
            "interval": None if interval is None else list(interval),
            "against": self.against,
            "se": self.se,
            "rsr": self.rsr,
            "noise": self.noise,
            "made": dict(self.made),
            "sweep": None if self.sweep is None else self.sweep.record(),
            "overhead": self.overhead,
            "break_even": None if self.sweep is None else self.sweep.break_even,
            "stages": dict(self.stages),
            "bytes": self.bytes,
            "gflops": self.gflops,
            "gbs": self.gbs,
            "ceilings": None if self.ceilings is None else self.ceilings._asdict(),
            "peak_bytes": dict(self.peak_bytes),
            "batch_1": {name: timing.record() for name, timing in self.batch_1.items()},
            "joules": dict(self.joules),
            "host_syncs": self.host_syncs,
            "uncounted": dict(self.uncounted),
            "unavailable": dict(self.unavailable),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "errors": [dict(error) for error in self.errors],
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `record()` as JSON, for `dyncore report` to draw."""
        write_results(path, self.record())

    def __str__(self) -> str:
        lines = [
            f"{name:7} {_shown(self.flops[name])} {_timed(timing, 10)}"
            + (f"  {self.made[name]}" if name in self.made else "")
            for name, timing in self.timings.items()
        ]
        lines += [f"{name:7} not measured: {self.unavailable[name]}" for name in _BASELINES if name in self.unavailable]
        # where next to nothing was skipped, both ratios are of noise; where FLOPs were added, of no meaning
        speedup, se, rsr = self.flop_speedup, self.se, self.rsr
        why = (
            "no matrix products are counted"
            if not self.flops[self.baseline]
            else "nothing was executed"
            if se is None
            else "nothing was skipped"
            if f"{speedup:.2f}" == "1.00"
            else "more FLOPs than the baseline's"
            if speedup < 1
            else None
        )
        flops = "all skipped" if math.isinf(speedup) else f"{speedup:.2f}x"
        lines.append(
            f"against {self.baseline}: FLOPs {flops}, wall clock {self.wall_clock_speedup:.2f}x, "
            f"SE {f'{se:.2f}' if why is None else f'- ({why})'}, RSR {f'{rsr:.2f}' if why is None else '-'}"
        )
        return "\n".join([*lines, *self._details()])

    def _details(self) -> list[str]:
        lines: list[str] = []
        if self.interval is not None:
            low, high = self.interval
            lines.append(f"wall clock with 95%: {low:.2f}..{high:.2f}x")
        if self.sweep is not None:
            even = self.sweep.break_even
            at = "slower at every share" if even is None else f"pays up to a share of {even:.0%}"
            spread = max(t.spread for t in (*self.sweep.timings, self.sweep.baseline))
            lines.append(
                f"break-even: {at}; {self.sweep.overhead:+.0%} time where nothing is skipped (samples ±{spread:.0%})"
            )
        if self.stages:
            lines.append("time: " + ", ".join(f"{name} {share:.0%}" for name, share in self.stages.items() if share))
        if self.ceilings is not None:
            rate = "" if self.gbs is None else f", {self.gbs:.3g} of {self.ceilings.gbs:.3g} GB/s"
            lines.append(f"rate: {self.gflops:.3g} of {self.ceilings.gflops:.3g} GFLOP/s{rate}")
        if self.peak_bytes:
            lines.append("memory: " + ", ".join(f"{n} {size / 1e6:.3g} MB" for n, size in self.peak_bytes.items()))
        if self.batch_1:
            lines.append("one sample: " + ", ".join(f"{n} {_timed(t)}" for n, t in self.batch_1.items()))
        if self.joules:
            lines.append("energy: " + ", ".join(f"{n} {j:.3g} J a sample" for n, j in self.joules.items()))
        if self.host_syncs:
            lines.append(f"waits for the GPU: {self.host_syncs} a call")
        if self.uncounted:
            lines.append(f"uncounted: {', '.join(f'{n} ({k}x)' for n, k in self.uncounted.items())}: FLOPs not known")
        lines += [f"{name}: not measured: {why}" for name, why in self.unavailable.items() if name not in _BASELINES]
        lines += [sentence for sentence in (self.noise, *self.warnings, *self.notes) if sentence]
        return lines + [f"failed: {e['point']}: {e['message']}" for e in self.errors]


def _timed(timing: Timing, width: int = 0) -> str:
    spread = f" ±{timing.spread:.0%}" if len(timing.samples_ns) > 1 else ""
    return f"{timing.median * 1e3:{width}.3f} ms{spread}"


def _shown(flops: int) -> str:
    return f"{flops / 1e9:10.4f} GFLOP" if flops >= 1e8 or not flops else f"{flops / 1e6:10.4f} MFLOP"


_BASELINES = ("masked", "dense", "naive", "smaller")

"""savings: FLOPs and wall clock of a dynamic module, skipping for real, against computing everything.

The wall clock of a network is what its user pays; FLOPs are what the papers report. The ratio of the two speed-ups
says what a saved FLOP was worth.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from dyncore.execution import execution
from dyncore.measure.agreement import disagreement
from dyncore.measure.flops import flops
from dyncore.measure.timing import Interleaved, Timing


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


@dataclasses.dataclass(frozen=True)
class Savings:
    """What skipping saved: executed FLOPs and timings of each execution, and their ratios.

    Attributes:
        flops, timings: by name: "sparse", "masked" and, where one was given, "dense".
        baseline: what the ratios are against: "dense" where one was given, else "masked".
    """

    flops: dict[str, int]
    timings: dict[str, Timing]
    baseline: str

    @property
    def flop_speedup(self) -> float:
        """FLOPs of the baseline over those executed; infinite if none was."""
        executed = self.flops["sparse"]
        return self.flops[self.baseline] / executed if executed else float("inf")

    @property
    def wall_clock_speedup(self) -> float:
        """Median time of the baseline over that of skipping."""
        return self.timings[self.baseline].median / self.timings["sparse"].median

    @property
    def se(self) -> float:
        """Scaling efficiency: wall-clock speed-up over FLOP speed-up."""
        return scaling_efficiency(self.wall_clock_speedup, self.flop_speedup)

    @property
    def rsr(self) -> float | None:
        """Realised saving: share of time saved over share of FLOPs saved; None if no FLOP was."""
        times = self.timings["sparse"].median, self.timings[self.baseline].median
        return realised_saving(*times, self.flops["sparse"], self.flops[self.baseline])

    def record(self) -> dict[str, Any]:
        """As a plain dict, raw samples included."""
        return {
            "baseline": self.baseline,
            "flops": dict(self.flops),
            "timings": {name: timing.record() for name, timing in self.timings.items()},
            "flop_speedup": self.flop_speedup if self.flops["sparse"] else None,
            "wall_clock_speedup": self.wall_clock_speedup,
            "se": self.se,
            "rsr": self.rsr,
        }

    def __str__(self) -> str:
        lines = [
            f"{name:7} {self.flops[name] / 1e9:10.4f} GFLOP {timing.median * 1e3:10.3f} ms ±{timing.spread:.0%}"
            for name, timing in self.timings.items()
        ]
        # where next to nothing was skipped, both ratios are of noise; where FLOPs were added, of no meaning
        shown = f"{self.flop_speedup:.2f}"
        skipped = shown != "1.00" and self.flop_speedup > 1
        why = "nothing was skipped" if shown == "1.00" else "more FLOPs than the baseline's"
        se = f"{self.se:.2f}" if skipped else f"- ({why})"
        rsr = f"{self.rsr:.2f}" if skipped and self.rsr is not None else "-"
        lines.append(
            f"against {self.baseline}: FLOPs {self.flop_speedup:.2f}x, wall clock {self.wall_clock_speedup:.2f}x, "
            f"SE {se}, RSR {rsr}"
        )
        return "\n".join(lines)


def _gradients(roots: list[Tensor], grads: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of the leaves, whose .grad is left as it was. (The FLOP counter of modules refuses autograd.grad.)"""
    kept = [t.grad for t in leaves]
    for t in leaves:
        t.grad = None
    try:
        torch.autograd.backward(roots, grads)
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
    finally:
        for t, grad in zip(leaves, kept, strict=True):
            t.grad = grad


_Run = Callable[[], tuple[list[Tensor], list[Tensor]]]


def _runner(module: Callable[..., Any], inputs: tuple[Any, ...], mode: str, backward: bool) -> _Run:
    """A call of `module` in one execution mode that returns (output tensors, gradients)."""
    parameters = list(module.parameters()) if isinstance(module, torch.nn.Module) else []
    leaves = [t for t in (*parameters, *pytree.tree_leaves(inputs)) if isinstance(t, Tensor) and t.requires_grad]

    def run() -> tuple[list[Tensor], list[Tensor]]:
        with execution(mode), torch.set_grad_enabled(backward):
            outputs = [t for t in pytree.tree_leaves(module(*inputs)) if isinstance(t, Tensor)]
            if not backward:
                return outputs, []
            roots = [t for t in outputs if t.requires_grad]
            ones = [torch.ones_like(t) for t in roots]
            return outputs, _gradients(roots, ones, leaves)

    return run


def _seeded(fn: Callable[..., Any], *args: Any) -> Any:
    """fn(*args) with the random state left as it was: noise is the same in each mode."""
    with torch.random.fork_rng():
        return fn(*args)


def _expect_agreement(sparse: _Run, masked: _Run, tolerance: float | None) -> None:
    results = zip(("output", "gradient"), _seeded(sparse), _seeded(masked), strict=True)
    for kind, values, references in results:
        for i, (value, reference) in enumerate(zip(values, references, strict=True)):
            why = disagreement(value, reference, gradient=kind == "gradient", tolerance=tolerance)
            if why:
                raise ValueError(
                    f"module: {kind} {i} differs between sparse and masked execution: {why}; no saving is reported "
                    "on wrong numbers. The usual causes: dropout in training mode; a module that mixes rows, such as "
                    "BatchNorm or a block without positions=/live="
                )


def savings(
    module: Callable[..., Any],
    *inputs: Any,
    dense: Callable[..., Any] | None = None,
    backward: bool = False,
    seconds: float = 2.0,
    min_rounds: int = 5,
    tolerance: float | None = None,
) -> Savings:
    """FLOPs and wall clock of `module` on `inputs`: skipping for real, against computing everything and masking.

    Args:
        module: a module or another callable made of dyncore's layers and ops, compiled or not; its FLOPs are then those
            of eager code, as `flops` says, its times those of the compiled.
        inputs: what it is called with.
        dense: its dense twin, called with the same inputs; then the ratios are against it, else against "masked".
        backward: time forward and backward (gradients of parameters and of inputs that require them) instead of
            forward without gradients.
        seconds, min_rounds: of the timing, as in Interleaved.run; `seconds` is above 0.
        tolerance: largest error over max(rms, |value|) at which the modes agree; by default that of one op in the
            module's dtype, which a deep network in 16 bits may exceed.

    Raises ValueError if sparse and masked execution disagree (no saving is reported on wrong numbers) or
    `seconds` is not above 0, TypeError if `module` or `dense` cannot be called.
    """
    for name, fn in (("module", module), ("dense", dense)):
        if not callable(fn) and not (name == "dense" and fn is None):
            raise TypeError(f"{name}: expected a module or another callable, got {type(fn).__name__}")
    if not seconds > 0:
        raise ValueError(f"seconds: expected a number above 0, got {seconds}")
    runs = {mode: _runner(module, inputs, mode, backward) for mode in ("sparse", "masked")}
    if dense is not None:
        runs["dense"] = _runner(dense, inputs, "auto", backward)
    _expect_agreement(runs["sparse"], runs["masked"], tolerance)
    device = next((t.device for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)), torch.device("cpu"))
    counted = {name: _seeded(flops, run) for name, run in runs.items()}
    synchronize = torch.cuda.synchronize if device.type == "cuda" else None
    timings = Interleaved(runs, synchronize=synchronize).run(seconds=seconds, min_rounds=min_rounds)
    return Savings(counted, timings, "masked" if dense is None else "dense")

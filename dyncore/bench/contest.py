"""A contest: dyncore and its rivals on the same inputs, checked first, then timed in the same rounds, in one record."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dyncore.execution import mode
from dyncore.measure.agreement import disagreement
from dyncore.measure.flops import flops
from dyncore.measure.savings import realised_saving, scaling_efficiency
from dyncore.measure.timing import Interleaved, InterleavedOnDevice, cold_copies

OURS, DENSE = "dyncore", "dense"
_PATIENCE = 10  # a point that takes this many times its seconds is on a slow machine: three rounds are enough


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute the layer.

    Attributes:
        run: run(*inputs, *weights) -> output, as a user would write it; building the plan or index list included.
        truth: the same function in plain PyTorch; called with float64 tensors it says what is right.
        weights: its parameters.
    """

    run: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    weights: tuple[Tensor, ...] = ()


@dataclasses.dataclass(frozen=True)
class Contest:
    """Variants on common inputs.

    Attributes:
        variants: by name; "dyncore" is among them, and "dense" where computing everything is a rival worth its time.
        inputs: argument tuples, one a round, in turn.
        backward: forward and backward (gradients of all floating inputs and weights) instead of forward alone.
        cold: rotate over copies of the weights, so that they come from memory as in a deep model.
        cache_bytes: what those copies must exceed twice; None: the last-level cache.
    """

    variants: dict[str, Variant]
    inputs: Sequence[tuple[Tensor, ...]]
    backward: bool = False
    cold: bool = True
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        for t in itertools.chain(*self.inputs, *(v.weights for v in self.variants.values())):
            if t.is_floating_point():
                t.requires_grad_(self.backward)

    def execute(self, fn: Callable[..., Tensor], *args: Tensor) -> list[Tensor]:
        """[output], followed by the gradients if the contest has them."""
        with torch.set_grad_enabled(self.backward):
            out = fn(*args)
            if not self.backward:
                return [out]
            leaves = [t for t in args if t.requires_grad]
            return [out, *torch.autograd.grad(out, leaves, _cotangent(out))]

    def truth(self, name: str) -> list[Tensor]:
        """What this variant should give on the first inputs, computed in float64."""
        variant = self.variants[name]
        args = (*self.inputs[0], *variant.weights)
        wide = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in args]
        return self.execute(variant.truth, *wide)

    def problem(self, name: str, expected: Sequence[Tensor]) -> str | None:
        """Why this variant's numbers are wrong, or None if they are right."""
        variant = self.variants[name]
        values = self.execute(variant.run, *self.inputs[0], *variant.weights)
        for i, (value, reference) in enumerate(zip(values, expected, strict=True)):
            # rivals round between their steps in 16 bits: like a gradient, they are held to the RMS error alone there
            why = disagreement(value, reference, gradient=i > 0 or name != OURS)
            if why:
                return f"{'output' if i == 0 else f'gradient {i - 1}'}: {why}"
        return None

    def flops(self, name: str) -> int:
        """FLOPs that one call of this variant executes."""
        variant = self.variants[name]
        return flops(self.execute, variant.run, *self.inputs[0], *variant.weights)

    def callables(self) -> dict[str, Callable[..., list[Tensor]]]:
        """name -> what is timed; call with `arguments()(name, round)`."""

        def timed(variant: Variant) -> Callable[..., list[Tensor]]:
            return lambda *args: self.execute(variant.run, *args)

        return {name: timed(variant) for name, variant in self.variants.items()}

    def arguments(self) -> Callable[[str, int], tuple[Tensor, ...]]:
        """(name, round) -> inputs of the round and the next copy of that variant's weights."""
        rotations: dict[int, Any] = {}  # variants that share weights share their copies
        for variant in self.variants.values():
            copies = [variant.weights]
            if self.cold:
                copies = cold_copies(variant.weights, cache_bytes=self.cache_bytes)
            rotations.setdefault(id(variant.weights), itertools.cycle(copies))
        return lambda name, round: (
            *self.inputs[round % len(self.inputs)],
            *next(rotations[id(self.variants[name].weights)]),
        )

    def timer(self, names: Sequence[str]) -> Interleaved:
        """A timer of some of the variants: by events of the device where that is a GPU."""
        callables = self.callables()
        kind = InterleavedOnDevice if self.device.type == "cuda" else Interleaved
        return kind({name: callables[name] for name in names}, arguments=self.arguments())

    @property
    def device(self) -> torch.device:
        """Of the inputs."""
        return self.inputs[0][0].device

    def to(self, device: torch.device) -> Contest:
        """The contest on another device; variants that share weights still do. On a GPU weights turn through more than
        its L2 cache holds."""
        if device == self.device:
            return self
        moved: dict[int, Tensor] = {}
        groups: dict[int, tuple[Tensor, ...]] = {}

        def move(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            for t in tensors:
                moved.setdefault(id(t), t.detach().to(device))
            return groups.setdefault(id(tensors), tuple(moved[id(t)] for t in tensors))

        cache = self.cache_bytes
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
        variants = {n: dataclasses.replace(v, weights=move(v.weights)) for n, v in self.variants.items()}
        inputs = [move(args) for args in self.inputs]
        return dataclasses.replace(self, variants=variants, inputs=inputs, cache_bytes=cache)


def _cotangent(out: Tensor) -> Tensor:
    """The gradient that flows back into an output: of unit scale, the same for every variant and dtype."""
    generator = torch.Generator().manual_seed(out.numel())
    return torch.randn(out.shape, generator=generator).to(out)


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of a sweep: what it is, and how its contest is made.

    Attributes:
        mechanism, input, shape, dtype, keep_ratio, backward: as in the record.
        build: makes the contest; tensors are allocated there and freed after the point.
        work: rough GFLOP of one round of all variants, for the progress bar.
        granularity: what is kept or skipped as one: "row", "tile of 16", "sample".
        share: of the seconds that a point is timed for; below 1 where a curve has many points of little noise.
    """

    mechanism: str
    input: str
    shape: dict[str, int]
    dtype: torch.dtype
    keep_ratio: float
    build: Callable[[], Contest]
    backward: bool = False
    work: float = 0.0
    share: float = 1.0
    granularity: str = "row"

    def __str__(self) -> str:
        shape = " ".join(f"{letter}={size}" for letter, size in self.shape.items())
        shape += "" if self.granularity == "row" else f" by {self.granularity}"
        phase = "forward+backward" if self.backward else "forward"
        return f"{self.mechanism} {self.input} {shape} {dtype_name(self.dtype)} keep={self.keep_ratio:g} {phase}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _same_function(a: Variant, b: Variant) -> bool:
    """Whether one truth serves both: their weights may be stored differently."""
    if a.truth is not b.truth or len(a.weights) != len(b.weights):
        return False
    return all(x is y or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in zip(a.weights, b.weights, strict=True))


def check(contest: Contest) -> tuple[Contest, dict[str, str], dict[str, str]]:
    """The contest without the rivals that cannot run or are wrong, and (wrong {name: why}, unavailable {name: why}).

    An exception in dyncore or dense is an error; in another rival it means that PyTorch does not offer it here.
    """
    wrong, unavailable = {}, {}
    truths: list[tuple[Variant, list[Tensor]]] = []
    for name, variant in contest.variants.items():
        truth = next((truth for known, truth in truths if _same_function(known, variant)), None)
        if truth is None:  # most variants share it
            truth = contest.truth(name)
            truths.append((variant, truth))
        try:
            problem = contest.problem(name, truth)
        except Exception as error:  # whatever a rival raises, the others still run
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            (wrong if name in (OURS, DENSE) else unavailable)[name] = reason
        else:
            if problem:
                wrong[name] = problem
    remaining = {n: v for n, v in contest.variants.items() if n not in wrong and n not in unavailable}
    return dataclasses.replace(contest, variants=remaining), wrong, unavailable


def measure(
    point: Point, *, seconds: float, min_rounds: int = 5, device: torch.device | None = None
) -> tuple[dict[str, Any] | None, list[dict[str, str]]]:
    """(record or None, errors) of a point on a device (None: the CPU): check, count, time. There is no record without
    right numbers of dyncore's and, where it takes part, of dense PyTorch's."""
    contest, wrong, unavailable = check(point.build().to(device or torch.device("cpu")))
    errors = [{"point": str(point), "variant": name, "message": why} for name, why in wrong.items()]
    if OURS in wrong or DENSE in wrong:
        return None, errors
    timer = contest.timer(list(contest.variants))
    seconds *= point.share
    timings = timer.run(seconds=seconds, min_rounds=min_rounds, limit=_PATIENCE * seconds)
    return make_record(point, contest, {n: t.record() for n, t in timings.items()}, unavailable), errors


def make_record(
    point: Point, contest: Contest, variants: dict[str, dict[str, Any]], unavailable: dict[str, str]
) -> dict[str, Any]:
    """The record of a point (schema: dyncore.measure.records) from the timing records of its variants."""
    executed, dense = contest.flops(OURS), contest.flops(DENSE) if DENSE in variants else None
    medians = {name: variant["median_ms"] for name, variant in variants.items()}
    speedups = {name: median / medians[OURS] for name, median in medians.items() if name != OURS}
    wall_clock_speedup = speedups.get(DENSE)
    flop_speedup = dense / executed if dense is not None and executed else None
    se = rsr = None
    if dense is not None and wall_clock_speedup is not None:
        se = scaling_efficiency(wall_clock_speedup, flop_speedup) if flop_speedup else None
        rsr = realised_saving(medians[OURS], medians[DENSE], executed, dense)
    return {
        "mechanism": point.mechanism,
        "input": point.input,
        "shape": point.shape,
        "dtype": dtype_name(point.dtype),
        "phase": "forward+backward" if point.backward else "forward",
        "keep_ratio": point.keep_ratio,
        "granularity": point.granularity,
        "execution": mode(),
        "cold_weights": contest.cold,
        "device": contest.device.type,
        "flops": {"executed": executed, "dense": dense},
        "variants": variants,
        "flop_speedup": flop_speedup,
        "wall_clock_speedup": wall_clock_speedup,
        "se": se,
        "rsr": rsr,
        "against": speedups,
        "unavailable": unavailable,
    }

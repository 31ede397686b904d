"""sweep: what a dynamic layer gains over keep ratio, batch, granularity and pattern, with several masks a point."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dyncore.execution import execution
from dyncore.masks import ROW_PATTERNS, replay, row_mask
from dyncore.measure import baselines
from dyncore.measure.agreement import disagreement
from dyncore.measure.calls import Call
from dyncore.measure.environment import timing_warnings
from dyncore.measure.flops import flops
from dyncore.measure.records import new_results
from dyncore.measure.savings import realised_saving, scaling_efficiency
from dyncore.measure.timing import Interleaved

_OURS, _DENSE = "dyncore", "dense"
_LETTERS = {2: "TH", 3: "BSH", 4: "BCHW"}  # of a shape in the record


class ForcedGate(nn.Module):
    """A gate that keeps what a sweep says: maps x to the mask of the present round, whatever x holds.

    Attributes:
        mask: bool, [B, S] for x [B, S, H], else [B]; None outside of a sweep.
        asked: whether anybody has asked for the mask or its share since this was set to False.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None
        self.asked: bool = False

    @property
    def keep(self) -> float:
        """Share of the mask that is kept, for modules that are told how much to execute by other means."""
        self.asked = True
        return 1.0 if self.mask is None else float(self.mask.double().mean())

    def forward(self, x: Tensor) -> Tensor:
        """The mask, bool."""
        if self.mask is None:
            raise RuntimeError("gate: expected to be called within dyncore.measure.sweep")
        self.asked = True
        return self.mask


@dataclasses.dataclass(frozen=True)
class _Point:
    """One point of a sweep, and its masks."""

    pattern: str
    batch: int
    granularity: str
    masks: list[Tensor]

    @property
    def keep(self) -> float:
        """The share that the masks keep."""
        return sum(float(mask.double().mean()) for mask in self.masks) / len(self.masks)

    def __str__(self) -> str:
        return f"{self.pattern} by {self.granularity}, batch {self.batch}, keep {self.keep:.3g}"


def _tile(granularity: str | int, rows: int) -> tuple[str, int]:
    """(name, rows kept or skipped together)"""
    if granularity == "row":
        return "row", 1
    if granularity == "sample":
        return "sample", rows
    if isinstance(granularity, int) and not isinstance(granularity, bool) and granularity >= 1:
        return f"tile of {granularity}", granularity
    raise ValueError(f'granularities: expected "row", "sample" or the rows of a tile, got {granularity!r}')


def _expect(name: str, values: Sequence[Any], good: Callable[[Any], bool], what: str) -> None:
    if not isinstance(values, (list, tuple, range)):
        raise TypeError(f"{name}: expected a list or tuple of {what}, got {type(values).__name__}")
    for value in values:
        if not good(value):
            raise ValueError(f"{name}: expected {what}, got {value!r}")
    if not values:
        raise ValueError(f"{name}: expected at least one, got none")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _first(args: tuple[Any, ...]) -> Tensor:
    """The first tensor, whose rows are kept or skipped."""
    found = next((t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)), None)
    if found is None or not found.dim():
        raise ValueError("inputs: expected a tensor, or arguments of which the first holds the rows, got none")
    return found


def _draw(pattern: str, recorded: Tensor | None, sizes: tuple[int, int, int], keep: float, seed: int) -> Tensor:
    """bool [B, S]"""
    batch, rows, tile = sizes
    if recorded is not None:
        start = seed * (recorded.numel() // 3)
        return replay(recorded.reshape(-1, 1), batch * rows, 1, start=start).view(batch, rows)
    return row_mask(pattern, batch, rows, keep, tile=tile, generator=torch.Generator().manual_seed(seed))


def _points(
    patterns: Mapping[str, Tensor | None],
    batch: int,
    x: Tensor,
    granularities: Sequence[str | int],
    keeps: Sequence[float],
    masks: int,
) -> Iterator[_Point]:
    """Those of one batch. A recorded pattern has its own share and granularity; a share that rounding has brought to
    the count of one before is left out."""
    sequences = x.dim() == 3
    samples, rows = (x.shape[0], x.shape[1]) if sequences else (1, x.shape[0])
    for pattern, recorded in patterns.items():
        for granularity in ("row",) if recorded is not None else granularities:
            name, tile = _tile(granularity, rows if sequences else 1)
            known: set[int] = set()
            for keep in (1.0,) if recorded is not None else keeps:
                drawn = [_draw(pattern, recorded, (samples, rows, tile), keep, seed) for seed in range(masks)]
                kept = int(drawn[0].sum())
                if kept not in known:
                    known.add(kept)
                    yield _Point(pattern, batch, name, drawn if sequences else [m.view(rows) for m in drawn])


class _Sweep:
    """The module of a sweep, its gate, and how both are run."""

    def __init__(self, make: Callable[[ForcedGate], Any], dense: Any, backward: bool) -> None:
        self.gate = ForcedGate()
        if isinstance(make, nn.Module):
            what = type(make).__name__
            raise TypeError(f"make: expected a function of a gate, `lambda gate: {what}(..., gate)`, got a {what}")
        self.module = make(self.gate)
        if not callable(self.module):
            raise TypeError(f"make: expected a module or another callable, got {type(self.module).__name__}")
        self.dense, self.mode, self.backward = dense, "auto", backward
        if dense is None:
            try:
                twin, _ = baselines.dense(Call(self.module, (), {}))
                self.dense, self.mode = twin.module, twin.mode
            except baselines.NoBaseline:
                self.dense, self.mode = self.module, "masked"

    def _leaves(self, fn: Any, args: tuple[Any, ...]) -> list[Tensor]:
        parameters = list(fn.parameters()) if isinstance(fn, nn.Module) else []
        return [t for t in (*parameters, *pytree.tree_leaves(args)) if isinstance(t, Tensor) and t.requires_grad]

    def _run(self, fn: Any, mode: str, args: tuple[Any, ...]) -> list[Tensor]:
        """Tensors of the output; with a backward pass of ones where asked for, whose gradients are not kept."""
        with execution(mode), torch.set_grad_enabled(self.backward):
            values = [t for t in pytree.tree_leaves(fn(*args)) if isinstance(t, Tensor)]
            if self.backward:
                leaves = self._leaves(fn, args)
                before = [t.grad for t in leaves]
                torch.autograd.backward([t.sum() for t in values if t.requires_grad])
                for t, grad in zip(leaves, before, strict=True):
                    t.grad = grad
        return values

    def ours(self, *args: Any) -> list[Tensor]:
        """Skipping."""
        return self._run(self.module, "sparse", args)

    def masked(self, *args: Any) -> list[Tensor]:
        """Computing everything, then masking."""
        return self._run(self.module, "masked", args)

    @property
    def baseline(self) -> str:
        """What skipping is measured against: a "dense" twin, or "masked" execution where there is none."""
        return "masked" if self.dense is self.module else "dense"

    def everything(self, *args: Any) -> list[Tensor]:
        """The baseline."""
        return self._run(self.dense, self.mode, args)

    def measure(self, point: _Point, args: tuple[Any, ...], seconds: float, min_rounds: int) -> dict[str, Any]:
        """Timings and FLOPs. Raises ValueError where skipping gives other numbers than masking."""
        counts: list[int] = []
        device = _first(args).device
        masks = [mask.to(device) for mask in point.masks]
        for mask in masks:
            self.gate.mask, self.gate.asked = mask, False
            for value, expected in zip(self.ours(*args), self.masked(*args), strict=True):
                why = disagreement(value, expected)
                if why is not None:
                    raise ValueError(f"sparse and masked execution differ: {why}")
            if not self.gate.asked:
                raise ValueError("make: expected a layer that asks its gate, got one that never did")
            counts.append(int(flops(self.ours, *args)))
        executed, dense = round(sum(counts) / len(counts)), int(flops(self.everything, *args))

        def arguments(name: str, round: int) -> tuple[Any, ...]:
            self.gate.mask = masks[round % len(masks)]
            return args

        synchronize = torch.cuda.synchronize if device.type == "cuda" else None
        timer = Interleaved({_OURS: self.ours, _DENSE: self.everything}, arguments=arguments, synchronize=synchronize)
        timings = timer.run(seconds=seconds, min_rounds=min_rounds)
        flop_speedup = dense / executed if executed else None
        ours, theirs = timings[_OURS].median, timings[_DENSE].median
        return {
            "flops": {"executed": executed, "dense": dense},
            "variants": {name: timing.record() for name, timing in timings.items()},
            "flop_speedup": flop_speedup,
            "wall_clock_speedup": theirs / ours,
            "se": scaling_efficiency(theirs / ours, flop_speedup) if flop_speedup else None,
            "rsr": realised_saving(ours, theirs, executed, dense),
            "against": {_DENSE: theirs / ours},
        }


def sweep(
    make: Callable[[ForcedGate], Any],
    inputs: Callable[[int], Any],
    *,
    keeps: Sequence[float] = (0.125, 0.25, 0.5, 0.75, 1.0),
    batches: Sequence[int] = (1, 8),
    granularities: Sequence[str | int] = ("row",),
    patterns: Sequence[str] = ROW_PATTERNS,
    recorded: Tensor | None = None,
    dense: Callable[..., Any] | None = None,
    backward: bool = False,
    masks: int = 3,
    seconds: float = 0.5,
    min_rounds: int = 6,
    name: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """FLOPs and wall clock of a dynamic layer over keep ratio, batch, granularity and pattern of what is kept.

    Args:
        make: makes the layer around a gate, which it calls as any other gate, such as
            `lambda gate: dyncore.nn.TokenSkip(block, gate)`; called once. The gate gives the masks of the sweep.
        inputs: maps a batch size to what the layer is called with: a tensor or a tuple of arguments. The rows of the
            first tensor are kept or skipped: tokens of [B, S, H], else samples.
        keeps: shares of rows to keep. batches: batch sizes.
        granularities: "row", the rows of a tile (an int), or "sample": what is kept or skipped as one.
        patterns: of `dyncore.masks.row_mask`: "iid", "clustered", "correlated" (by sample), "adversarial".
        recorded: bool, a mask of rows that was recorded: replayed as a pattern of its own share, "recorded".
        dense: the dense twin, called with the same inputs; None: one that is made of the layer, as by `savings`, or
            where that cannot be done the layer in masked execution, which computes everything (`baseline` in a record).
        backward: forward and backward instead of forward alone.
        masks: different ones drawn for each point; rounds take turns, and medians are over all of them.
        seconds, min_rounds: of the timing of each point, as in Interleaved.run.
        name: `mechanism` of the records; None: the class of what `make` made.
        progress: called with each point before it is measured, and the number that is left of its batch.

    Returns a document of schema dyncore.results/1 (docs/results.md), which `write_results` writes, `dyncore report`
    draws and `pandas.json_normalize(document["records"])` reads. A point that fails, or whose numbers differ from those
    of masked execution, is in its `errors`; the others stand, as they do after Ctrl-C (`interrupted`).

    Raises TypeError or ValueError on arguments that do not fit.
    """
    for argument, fn in (("make", make), ("inputs", inputs), ("dense", dense)):
        if not callable(fn) and not (argument == "dense" and fn is None):
            raise TypeError(f"{argument}: expected a callable, got {type(fn).__name__}")

    def share(keep: Any) -> bool:
        return isinstance(keep, (int, float)) and 0 < keep <= 1

    _expect("keeps", keeps, share, "shares above 0, up to 1")
    _expect("batches", batches, _whole, "whole numbers >= 1")
    _expect("patterns", patterns, lambda p: p in ROW_PATTERNS, f"some of {', '.join(ROW_PATTERNS)}")
    _expect("granularities", granularities, lambda g: bool(_tile(g, 1)), '"row", "sample" or the rows of a tile')
    for argument, number in (("masks", masks), ("min_rounds", min_rounds)):
        _expect(argument, [number], _whole, "a whole number >= 1")
    if not seconds > 0:
        raise ValueError(f"seconds: expected a number above 0, got {seconds}")
    if recorded is not None and (not isinstance(recorded, Tensor) or recorded.dtype != torch.bool):
        got = recorded.dtype if isinstance(recorded, Tensor) else type(recorded).__name__
        raise TypeError(f"recorded: expected a bool tensor, got {got}")
    if recorded is not None and not recorded.numel():
        raise ValueError("recorded: expected a mask of one row at least, got none")
    chosen: dict[str, Tensor | None] = dict.fromkeys(patterns)
    if recorded is not None:
        chosen["recorded"] = recorded.cpu()
    running = _Sweep(make, dense, backward)
    mechanism = name or type(running.module).__name__
    results = new_results("dyncore.measure.sweep")
    results["warnings"] = timing_warnings()
    try:
        for batch in batches:
            try:
                made = inputs(batch)
            except Exception as error:  # such as no memory for so many
                results["errors"].append(_error(f"batch {batch}", error))
                continue
            args: tuple[Any, ...] = made if isinstance(made, tuple) else (made,)
            x = _first(args)
            points = list(_points(chosen, batch, x, granularities, keeps, masks))
            for left, point in zip(itertools.count(len(points) - 1, -1), points):
                if progress is not None:
                    progress(f"{point}; {left} more of this batch")
                try:
                    measured = running.measure(point, args, seconds, min_rounds)
                except Exception as error:  # one point's failure leaves the others
                    results["errors"].append(_error(str(point), error))
                else:
                    results["records"].append(_record(mechanism, point, x, backward, running.baseline) | measured)
    except KeyboardInterrupt:
        results["interrupted"] = True
    finally:
        running.gate.mask = None
    if results["errors"] and not results["records"]:
        warnings.warn(f"every point failed, the first by {results['errors'][0]['message']}", stacklevel=2)
    return results


def _error(point: str, error: Exception) -> dict[str, str]:
    message = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return {"point": point, "variant": _OURS, "message": message}


def _record(mechanism: str, point: _Point, x: Tensor, backward: bool, baseline: str) -> dict[str, Any]:
    """What a point is."""
    letters = _LETTERS.get(x.dim(), "ABCDEFG")
    return {
        "mechanism": mechanism,
        "input": point.pattern,
        "shape": dict(zip(letters, x.shape, strict=False)),
        "dtype": str(x.dtype).removeprefix("torch."),
        "phase": "forward+backward" if backward else "forward",
        "keep_ratio": point.keep,
        "granularity": point.granularity,
        "baseline": baseline,
        "execution": "sparse",
        "unavailable": {},
    }

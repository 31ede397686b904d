"""What an audit found, as a table and as a document of schema dyncore.audit/1."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from dyncore import break_even
from dyncore.measure.calls import several
from dyncore.measure.records import write_results
from dyncore.measure.timing import Timing, ratio_interval

SCHEMA = "dyncore.audit/1"
_TEXTS = 2  # columns of a table that hold text
_NOISY_ABOVE = 0.3
PAYS = 1.05  # from this speed-up on a replacement is called a gain


@dataclasses.dataclass
class Layer:
    """One layer that skips, or could, or looks as if it could.

    Attributes:
        name, was: of the module within the model, and its class.
        kind: "relu" (MLPs whose activations hold zeros), "moe" (a router and experts), "masked" (computed in full, then
            multiplied by a mask of rows), "dynamic" (a layer of dyncore.nn), "other" (looks like one of the first
            three, but `why_not` says why it is none).
        what: what was recognised, with its sizes.
        how: the line of code that replaces it; None where nothing does.
        why_not: why nothing can, or why it would not pay; None where it pays.
        calls: how often one forward calls it. input: shape and dtype of its first tensor.
        flops: of one call: "now", and "replaced" (executed ones, counted); of a dynamic layer "now" are those of
            computing everything and "replaced" those it executes.
        density: the share of rows, experts or activations that is needed; break_even: from which density on computing
            everything is faster, None for never.
        timings: "now" and "replaced", likewise.
        estimated: speed-ups by phase, from density and break-even, where they can be estimated.
        sparsity: the record of the layer's zeros (dyncore.measure.activation_sparsity), histogram included.
    """

    name: str
    was: str
    kind: str
    what: str
    how: str | None = None
    why_not: str | None = None
    calls: int = 0
    input: str = ""
    flops: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    density: float | None = None
    break_even: float | None = None
    timings: dict[str, Timing] = dataclasses.field(default_factory=dict[str, Timing])
    estimated: dict[str, float] | None = None
    sparsity: dict[str, Any] | None = None

    @property
    def speedup(self) -> float | None:
        """Measured: time now over time replaced."""
        if len(self.timings) < 2:
            return None
        return self.timings["now"].median / self.timings["replaced"].median

    @property
    def noisy(self) -> bool:
        """Whether the samples of either side spread so widely that the speed-up is not to be relied on."""
        return is_noisy(self.timings)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the speed-up lies with 95%; None where fewer than five samples were taken of a side."""
        return ratio_interval(self.timings["now"], self.timings["replaced"]) if len(self.timings) > 1 else None

    @property
    def loses(self) -> bool:
        """Whether it was measured not to pay."""
        return self.speedup is not None and self.speedup < PAYS

    @property
    def flop_speedup(self) -> float | None:
        """FLOPs now over FLOPs executed; None where either is unknown or 0."""
        now, replaced = self.flops.get("now"), self.flops.get("replaced")
        return now / replaced if now and replaced else None

    def judge(self) -> None:
        """Say in `why_not` why it does not pay, where the samples show that, or that they cannot tell."""
        if self.why_not is None and self.speedup is not None:
            self.why_not = self._verdict(self.speedup)

    def _verdict(self, speedup: float) -> str | None:
        saved = self.flop_speedup
        if self.kind == "dynamic" and (saved is None or saved < 1.005):
            return "nothing was skipped on these inputs: it executes as many FLOPs as computing everything does"
        low, high = self.interval or (speedup, speedup)
        if low < PAYS <= high:
            what = f"{low:.2f}x to {high:.2f}x with 95%"
            return f"whether it pays is not known: {what}; more seconds or a quieter machine would say more"
        if speedup >= PAYS:
            return None
        if self.kind == "relu" and self.density is None:
            return "less than 10% of its activations are zero on these inputs"
        if self.kind == "relu" and self.break_even is not None and (self.density or 0) >= self.break_even:
            zeros, needed = 1 - (self.density or 0), 1 - self.break_even
            return f"too few zeros on these inputs: {zeros:.0%}, and skipping them pays from {needed:.0%} on"
        return f"what it saves is lost again at this size: measured {speedup:.2f}x"

    def record(self) -> dict[str, Any]:
        """As a plain dict, raw samples included."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **fields,
            "timings": {name: timing.record() for name, timing in self.timings.items()},
            "speedup": self.speedup,
            "interval": self.interval,
            "noisy": self.noisy,
            "flop_speedup": self.flop_speedup,
        }


def is_noisy(timings: dict[str, Timing]) -> bool:
    """Whether the samples of some spread by more than 30%, interquartile range over median."""
    return any(timing.spread > _NOISY_ABOVE for timing in timings.values())


def gigaflop(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.3g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _by_text(texts: list[tuple[str | None, str]]) -> list[str]:
    """Of (text or None, name): each text with the names that have it in common."""
    groups: dict[str, list[str]] = {}
    for text, name in texts:
        if text is not None:
            groups.setdefault(text, []).append(name)
    return [f"  {text}\n      for {several(names)}" for text, names in groups.items()]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i < _TEXTS else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


@dataclasses.dataclass
class Audit:
    """What dyncore could do for a model, layer by layer. print() makes a table of it.

    Attributes:
        model: class, parameters, dtype, device, threads, inputs, and of one call: flops and timings "now" and
            "replaced" (all that can be replaced, replaced).
        layers: Layer, in the order of the model.
        notes: what else a reader should know.
        errors: [{"point", "variant", "message"}]: layers that gave wrong numbers or failed; the others stand.
        interrupted: not everything was measured.
        results: the document's head: created, command, environment, warnings.
    """

    model: dict[str, Any]
    layers: list[Layer]
    notes: list[str]
    errors: list[dict[str, str]]
    interrupted: bool
    results: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """The document: `records` has one entry a layer."""
        timings = self.model.get("timings", {})
        return {
            **self.results,
            "schema": SCHEMA,
            "interrupted": self.interrupted,
            "model": {**self.model, "timings": {name: timing.record() for name, timing in timings.items()}},
            "break_evens": "measured" if break_even.tuned() else "defaults",
            "records": [layer.record() for layer in self.layers],
            "notes": self.notes,
            "errors": self.errors,
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `record()` as JSON."""
        write_results(path, self.record())

    def _head(self) -> list[str]:
        model = self.model
        threads = f"{model['threads']} thread{'s' * (model['threads'] > 1)}"
        lines = [
            f"{model['class']}: {model['parameters']:,} parameters, {model['dtype']}, on {model['device']}, {threads}",
            f"inputs: {model['inputs']}",
        ]
        flops, timings = model.get("flops", {}), model.get("timings", {})
        if flops:
            lines.append(f"one call in evaluation: {gigaflop(flops['now'])} GFLOP")
        if "now" in timings:
            lines[-1] += f", {timings['now'].median * 1e3:.2f} ms"
        if "replaced" in timings:
            now, then = timings["now"], timings["replaced"]
            lines.append(
                f"with all of it replaced: {gigaflop(flops['replaced'])} GFLOP, {then.median * 1e3:.2f} ms: "
                f"{now.median / then.median:.2f}x{', of samples that spread widely' * is_noisy(timings)}"
            )
        return lines

    def _table(self, layers: list[Layer]) -> list[str]:
        total = self.model.get("flops", {}).get("now")
        rows = [["layer", "what it is", "GFLOP", "of the model", "if skipped", "needed", "break-even", "FLOPs", "time"]]
        for layer in layers:
            now, replaced = layer.flops.get("now"), layer.flops.get("replaced")
            rows.append(
                [
                    layer.name,
                    layer.what,
                    gigaflop(now),
                    _share(now * layer.calls / total if now is not None and total else None),
                    gigaflop(replaced),
                    _share(layer.density),
                    _share(layer.break_even),
                    "-" if layer.flop_speedup is None else f"{layer.flop_speedup:.2f}x",
                    "-" if layer.speedup is None else f"{layer.speedup:.2f}x{'~' * layer.noisy}",
                ]
            )
        measured = (
            "measured by dyncore tune" if break_even.tuned() else "defaults; dyncore tune measures this machine's"
        )
        return [
            *_aligned(rows),
            "GFLOP: of one call, 2 per multiply-add; needed: share of rows, experts or activations; break-even: from "
            f"which share on computing everything is faster, 100%: never ({measured}); FLOPs, time: speed-ups of the "
            "layer on these inputs, counted (zeros as skipped, even above the break-even) and measured; ~: samples "
            f"spread by more than {_NOISY_ABOVE:.0%}",
        ]

    def _rest(self, layers: list[Layer]) -> list[str]:
        """The share of the model's FLOPs that no layer of the table has."""
        total = self.model.get("flops", {}).get("now")
        names = [layer.name for layer in layers]
        outer = [layer for layer in layers if not any(layer.name.startswith(f"{name}.") for name in names)]
        if not total or any("now" not in layer.flops for layer in outer):
            return []
        rest = 1 - sum(layer.flops["now"] * layer.calls for layer in outer) / total
        return [f"the other {rest:.0%} of the model's FLOPs are in layers that dyncore has nothing for"] * (
            rest > 0.005
        )

    def __str__(self) -> str:
        lines = self._head()
        shown = [layer for layer in self.layers if layer.kind != "other"]
        if "flops" not in self.model:  # the forward failed
            lines += ["", *self._failures()]
            lines += ["", "nothing was measured; by the modules alone, without a call:"] if self.layers else []
        elif shown:
            lines += ["", *self._table(shown), *self._rest(shown)]
        else:
            lines += ["", "no dynamic layer of dyncore, and none that dyncore replaces"]
        # mixtures first: convert.relu_sparse would take their experts, too
        hows = sorted(self.layers, key=lambda layer: layer.kind == "relu")
        how = _by_text([(layer.how, layer.name) for layer in hows if not layer.loses])
        why_not = _by_text([(layer.why_not, layer.name) for layer in self.layers])
        lines += ["", "how", *how] if how else []
        lines += ["", "why not", *why_not] if why_not else []
        lines += ["", *self.notes] if self.notes else []
        lines += [f"warning: {text}" for text in self.results.get("warnings", [])]
        lines += self._failures() if "flops" in self.model else []
        return "\n".join(lines)

    def _failures(self) -> list[str]:
        return [f"error: {e['point']}: {e['message']}" for e in self.errors]

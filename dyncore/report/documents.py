"""Documents of every schema that dyncore writes, as the few kinds of data that a report draws.

- comparisons: one way to compute something against computing everything: records of dyncore.results/1 (bench, tests,
  benchmarks), savings, the layers of an audit.
- zeros: of a layer's activations: dyncore.activation_sparsity/1, its relatives, audits.
- stages: the shares of time of one comparison's steps, where a record has `stages` {name: share}.
- ranking: dyncore.ranking/1. audit: dyncore.audit/1.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
_NOISY_ABOVE = 0.3  # interquartile range over median
_FEW = 0.05  # a curve down to this share or below has most of its points where little is left


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What one point took with and without skipping.

    Attributes:
        mechanism, input, shape: what it is, of which kind of input, and of which size; or `input` is its name.
        keep: the share that was executed; None where it is not known.
        executed, dense: FLOPs; dense is None where computing everything took no part.
        ms: medians by variant: "dyncore", the baseline and others; spread: of dyncore's.
        bytes: that a call must at least move, where it is known. stages: shares of time. ceilings: GFLOP/s and GB/s of
            the machine, where they were measured beside it. source: the file.
        baseline: the variant that computes everything: "dense", "masked" where no dense one took part, and in audits
            "now", the layer as the model has it.
        noisy: whether the samples of dyncore or of the baseline spread widely. forced: whether gates were forced.
    """

    mechanism: str
    input: str
    shape: str
    dtype: str
    phase: str
    keep: float | None
    executed: int | None
    dense: int | None
    ms: dict[str, float]
    spread: float
    bytes: float | None
    stages: dict[str, float]
    ceilings: tuple[float, float] | None = None
    source: str = ""
    baseline: str = "dense"
    noisy: bool = False
    forced: bool = False

    @property
    def name(self) -> str:
        """Which of its mechanism."""
        return f"{self.input} {self.shape}".strip()

    @property
    def curve(self) -> tuple[str, ...]:
        """What tells it from all but those of the same file that differ in `keep`."""
        return (self.mechanism, self.name, self.dtype, self.phase, self.source)

    @property
    def against(self) -> dict[str, float]:
        """Wall-clock speed-ups of dyncore over each rival."""
        return {name: ms / self.ms["dyncore"] for name, ms in self.ms.items() if name != "dyncore"}

    @property
    def speedup(self) -> float | None:
        """Wall-clock speed-up over computing everything."""
        return self.ms[self.baseline] / self.ms["dyncore"] if self.baseline in self.ms else None

    @property
    def flop_speedup(self) -> float | None:
        """FLOPs of computing everything over those executed."""
        return self.dense / self.executed if self.dense and self.executed else None


@dataclasses.dataclass(frozen=True)
class Document:
    """One file: what it says of itself, and what it holds of each kind; `unavailable`: rivals that could not run, with
    the reason; savings: records of measure.savings."""

    path: str
    head: Record
    comparisons: list[Comparison]
    zeros: list[Record]
    unavailable: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    ranking: Record | None = None
    audit: Record | None = None
    savings: list[Record] = dataclasses.field(default_factory=list[Record])


def _bytes(record: Record, executed: int | None) -> float | None:
    """Least bytes of a forward: those that the record states, else the weights in use and the rows in and out."""
    if record.get("bytes"):
        return float(record["bytes"])
    shape, sizes = record.get("shape", {}), {"float32": 4, "bfloat16": 2, "float16": 2}
    size = sizes.get(record.get("dtype", ""))
    if not executed or size is None or record.get("phase") != "forward" or not {"T", "H", "I"} <= shape.keys():
        return None
    rows, width, hidden = shape["T"], shape["H"], shape["I"]
    if {"E", "K"} <= shape.keys():
        slots = rows * shape["K"]
        matrices = executed / (2 * slots * width * hidden)  # 2, or 3 with a gate
        return size * (min(shape["E"], slots) * matrices * width * hidden + 2 * rows * width)
    if record.get("mechanism") == "token-skipping":
        return size * (2 * width * hidden + 2 * record["keep_ratio"] * rows * width)
    return None


def _of_results(record: Record) -> Comparison | None:
    variants: dict[str, Record] = record.get("variants") or {}
    if "dyncore" not in variants:
        return None
    flops = record.get("flops") or {}
    baseline = str(record.get("baseline", "dense"))
    if baseline not in variants and "dense" in variants:  # a sweep without a dense twin
        variants = {baseline if name == "dense" else name: variant for name, variant in variants.items()}
    shape = " ".join(f"{letter}={size}" for letter, size in (record.get("shape") or {}).items())
    return Comparison(
        mechanism=str(record["mechanism"]),
        input=_input(record),
        shape=shape,
        dtype=str(record.get("dtype", "")),
        phase=str(record.get("phase", "forward")),
        keep=record.get("keep_ratio"),
        executed=flops.get("executed"),
        dense=flops.get("dense"),
        ms={name: float(variant["median_ms"]) for name, variant in variants.items()},
        spread=float(variants["dyncore"].get("spread", 0.0)),
        bytes=_bytes(record, flops.get("executed")),
        stages=_stages(record),
        ceilings=_ceilings(record),
        baseline=baseline,
        noisy=_noisy(variants["dyncore"], variants.get(baseline, {})),
    )


def _noisy(*timings: Record) -> bool:
    return any(timing.get("spread", 0.0) > _NOISY_ABOVE for timing in timings)


def _input(record: Record) -> str:
    units = record.get("granularity", "row")
    return str(record.get("input", "")) + ("" if units == "row" else f" by {units}")


def _stages(record: Record) -> dict[str, float]:
    stages = record.get("stages")
    return {str(name): float(share) for name, share in stages.items()} if isinstance(stages, dict) else {}


def _ceilings(record: Record) -> tuple[float, float] | None:
    found = record.get("ceilings")
    return (float(found["gflops"]), float(found["gbs"])) if isinstance(found, dict) else None


def _of_savings(record: Record) -> Comparison | None:
    """Of measure.savings: flops and timings by execution."""
    timings, flops = record["timings"], record["flops"]
    ours, theirs = ("sparse", record["baseline"]) if "baseline" in record else ("replaced", "now")
    if ours not in timings or theirs not in timings:
        return None
    name = _name(record)
    others = {other: timing for other, timing in timings.items() if other not in (ours, theirs)}
    named = {"dyncore": timings[ours], theirs: timings[theirs], **others}
    return Comparison(
        mechanism=str(record.get("kind", f"savings of {name}")),
        input=name,
        shape="",
        dtype=str(record.get("dtype") or str(record.get("input", "")).rpartition(" ")[2]),
        phase=str(record.get("phase", "forward")),
        keep=record.get("density"),
        executed=flops.get(ours),
        dense=flops.get(theirs),
        ms={n: float(timing["median_ms"]) for n, timing in named.items()},
        spread=float(timings[ours].get("spread", 0.0)),
        bytes=record.get("bytes"),
        stages=_stages(record),
        ceilings=_ceilings(record),
        baseline=theirs,
        noisy=_noisy(timings[ours], timings[theirs]),
    )


def _name(record: Record) -> str:
    return str(next((record[key] for key in ("name", "layer", "module", "class") if record.get(key)), "module"))


def _of_sweep(record: Record) -> list[Comparison]:
    """The points of a savings' sweep over the share that gates let through; its FLOPs are not counted."""
    sweep = record.get("sweep")
    if not isinstance(sweep, dict):
        return []
    baseline, everything = str(record["baseline"]), sweep["baseline"]
    return [
        Comparison(
            mechanism=f"savings of {_name(record)}",
            input=f"{_name(record)}, gates forced",
            shape="",
            dtype=str(record.get("dtype", "")),
            phase=str(record.get("phase", "forward")),
            keep=float(keep),
            executed=None,
            dense=None,
            ms={"dyncore": float(timing["median_ms"]), baseline: float(everything["median_ms"])},
            spread=float(timing.get("spread", 0.0)),
            bytes=None,
            stages={},
            baseline=baseline,
            noisy=_noisy(timing, everything),
            forced=True,
        )
        for keep, timing in zip(sweep["keep"], sweep["timings"], strict=True)
    ]


def _comparison(record: Record) -> Comparison | None:
    if "variants" in record:
        return _of_results(record)
    return _of_savings(record) if "timings" in record and "flops" in record else None


def read_document(path: str | os.PathLike[str]) -> Document:
    """The document in a file. Raises ValueError where it is none that dyncore writes."""
    try:
        found: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"results: cannot read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"results: expected JSON in {str(path)!r}, got something else ({error})") from error
    schema = str(found.get("schema", "")) if isinstance(found, dict) else ""
    if not schema.startswith("dyncore.") and not (isinstance(found, dict) and {"timings", "baseline"} <= found.keys()):
        raise ValueError(f"results: expected a document that dyncore wrote, {str(path)!r} has the schema {schema!r}")
    try:
        return _document(str(path), found, schema)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        kind = schema or "savings"
        raise ValueError(f"results: expected all of {kind} in {str(path)!r}, got a part ({error!r})") from error


def _document(path: str, found: Record, schema: str) -> Document:
    records: list[Record] = found["records"] if isinstance(found.get("records"), list) else [found]
    zeros = [
        {"layer": r.get("layer", r.get("name")), **(r.get("sparsity") or r)}
        for r in records
        if "zero_fraction" in (r.get("sparsity") or r)
    ]
    points = [c for c in map(_comparison, records) if c is not None]
    points += [c for record in records for c in _of_sweep(record)]
    compared = [dataclasses.replace(c, source=path) for c in points]
    head = {
        name: value for name, value in found.items() if name not in ("records", "examples", "pictures", "mean_ranks")
    }
    return Document(
        path,
        head,
        compared,
        zeros,
        {str(name): str(why) for r in records for name, why in (r.get("unavailable") or {}).items()},
        ranking=found if schema.startswith("dyncore.ranking") else None,
        audit=found if schema.startswith("dyncore.audit") else None,
        savings=[record for record in records if {"timings", "flops", "baseline"} <= record.keys()],
    )


def compared(documents: Sequence[Document]) -> list[Comparison]:
    """Those of all documents."""
    return [c for document in documents for c in document.comparisons]


def by_mechanism(points: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """Points of each mechanism, in the order in which they come."""
    found: dict[str, list[Comparison]] = {}
    for point in points:
        found.setdefault(point.mechanism, []).append(point)
    return found


def curves(points: Sequence[Comparison], *, sparse: bool) -> dict[tuple[str, ...], list[Comparison]]:
    """Points that differ in their keep ratio alone, three at least, by keep ratio; `sparse`: those that go down to
    where next to nothing stays, whose ratios need a logarithmic axis, or the others."""
    found: dict[tuple[str, ...], list[Comparison]] = {}
    for point in points:
        if point.keep is not None and point.speedup is not None:
            found.setdefault(point.curve, []).append(point)
    ordered = {key: sorted(of, key=lambda c: c.keep or 0.0) for key, of in found.items()}
    ordered = {key: of for key, of in ordered.items() if len({c.keep for c in of}) >= 3}
    return {key: of for key, of in ordered.items() if ((of[0].keep or 0.0) <= _FEW) == sparse}

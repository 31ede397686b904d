"""The bars of the GPU kernels: what each demands of the records of a run, and whether they meet it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from benchmarks.gpu.measure import Record

Points = Mapping[tuple[str, str], Mapping[str, Record]]  # (part, label) -> way -> record
Value = Callable[[Points], float | None]  # None: not measured


@dataclasses.dataclass(frozen=True)
class Bar:
    text: str
    value: Value
    bound: float
    at_most: bool = False
    target: float | None = None

    def judge(self, points: Points) -> Record:
        value = self.value(points)
        met = None if value is None else value <= self.bound if self.at_most else value >= self.bound
        limits = {"bound": self.bound, "at_most": self.at_most, "target": self.target}
        return {"text": self.text, "value": value, "met": met, **limits}


def line(verdict: Record) -> str:
    state = {None: "unmeasured", True: "met", False: "MISSED"}[verdict["met"]]
    value = "-" if verdict["value"] is None else f"{verdict['value']:.4g}"
    target = "" if verdict["target"] is None else f", target {verdict['target']:g}"
    limits = f"({'<=' if verdict['at_most'] else '>='} {verdict['bound']:g}{target})"
    return f"bar {state:<10} {value:>7} {limits:<21} {verdict['text']}"


def points_of(records: Sequence[Record]) -> Points:
    """The timed ways of each case."""
    points: dict[tuple[str, str], dict[str, Record]] = {}
    for r in records:
        if "ms" in r:
            points.setdefault((r["part"], r["label"]), {})[r["way"]] = r
    return points


def _ms(points: Points, part: str, label: str, *ways: str) -> float | None:
    """The fastest of the ways that were timed."""
    timed = points.get((part, label), {})
    return min((timed[way]["ms"] for way in ways if way in timed), default=None)


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def of_cublas(label: str) -> Value:
    """Share of cuBLAS's rate on the large product in the same rounds."""

    def value(points: Points) -> float | None:
        timed = points.get(("moe", label), {})
        ours, theirs = (timed[way]["tflops"] if way in timed else None for way in ("dyncore", "cublas"))
        return _ratio(ours, theirs)

    return value


def over(label: str, *rivals: str) -> Value:
    """How many times as fast as the fastest of the rivals that ran."""
    return lambda points: _ratio(_ms(points, "moe", label, *rivals), _ms(points, "moe", label, "dyncore"))


def microseconds(part: str, label: str, way: str = "dyncore") -> Value:
    def value(points: Points) -> float | None:
        ms = _ms(points, part, label, way)
        return None if ms is None else 1e3 * ms

    return value


def se(keep: float) -> Value:
    """Wall-clock speed-up over FLOP speed-up, both against the dense MLP."""

    def value(points: Points) -> float | None:
        timed = points.get(("token_skip", f"keep={keep:g}"), {})
        if not {"dyncore", "dense"} <= timed.keys():
            return None
        ours = timed["dyncore"]
        return timed["dense"]["ms"] / ours["ms"] * ours["slots"] / ours["rows"]

    return value


def of_dense_time(way: str) -> Value:
    return lambda points: _ratio(_ms(points, "token_skip", "keep=1", way), _ms(points, "token_skip", "keep=1", "dense"))


def kernels(label: str) -> Value:
    return lambda points: points.get(("layer", label), {}).get("dyncore", {}).get("kernels")


def beyond_kernels(label: str) -> Value:
    """Microseconds of a graph's replay besides its kernels."""

    def value(points: Points) -> float | None:
        replay = points.get(("layer", label), {}).get("dyncore_graph")
        return None if replay is None else 1e3 * (replay["ms"] - replay["kernels_ms"])

    return value


MOE = {"E=64 k=8": "MoE T=16k E=64 k=8 H=2048 I=1024", "E=8 k=2": "MoE T=16k E=8 k=2 H=4096 I=14336"}
FEW_ROWS = {1: 45, 64: 410, 512: 442, 4096: 800}
PLANS = ("select", "select_topk", "route", "route_topk", "route_mask")
LAYER_ROWS = (64, 16384)


def _bars() -> Iterator[Bar]:
    for label, text in MOE.items():
        yield Bar(f"{text} forward: share of cuBLAS's rate", of_cublas(label), 0.6, target=0.7)
        yield Bar(f"{text} forward+backward: share of cuBLAS's rate", of_cublas(f"{label} training"), 0.5, target=0.6)
        yield Bar(f"{text} forward: times as fast as ScatterMoE", over(label, "scattermoe"), 1.2)
        best = over(label, "grouped_mm", "grouped_mm_compiled")
        yield Bar(f"{text} forward: times as fast as grouped_mm, compiled or not", best, 1.1)
    for rows, bound in FEW_ROWS.items():
        text = f"few rows E=128 k=8 H=2816 I=704 T={rows}, graph, plan included: us"
        yield Bar(text, microseconds("few_rows", f"E=128 k=8 T={rows}"), bound, at_most=True)
    for keep in (0.125, 0.25, 0.5, 0.75):
        yield Bar(f"token-skip MLP T=16k H=4096 I=16384 keep={keep:g}: SE", se(keep), 0.9)
    for way, where, bound in (("dyncore_host", "host", 1.03), ("dyncore", "device", 1.12)):
        text = f"token-skip MLP keep=1, count known on the {where}: time over dense cuBLAS MLP"
        yield Bar(text, of_dense_time(way), bound, at_most=True)
    for name in PLANS:
        yield Bar(f"plan making, {name}, T=16k: us", microseconds("plans", name), 30, at_most=True)
    for rows in LAYER_ROWS:
        yield Bar(f"nn.MoE forward T={rows}: kernels", kernels(f"T={rows}"), 6, at_most=True)
        text = f"nn.MoE forward T={rows}: graph replay besides its kernels, us"
        yield Bar(text, beyond_kernels(f"T={rows}"), 10, at_most=True)


BARS = list(_bars())


def judge(records: Sequence[Record]) -> list[Record]:
    points = points_of(records)
    return [bar.judge(points) for bar in BARS]

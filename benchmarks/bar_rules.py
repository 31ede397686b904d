"""The bars: what each demands of the records of `python -m benchmarks.bars`, and whether they meet it.

Knows records alone (schema: dyncore.measure.records), so that it can be tried on made-up ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Record = dict[str, Any]


def ms(record: Record, variant: str = "dyncore") -> float:
    return record["variants"][variant]["median_ms"]


def against(record: Record, *rivals: str) -> float | None:
    """Speed-up against the fastest of the rivals that ran."""
    times = [ms(record, rival) for rival in rivals if rival in record["variants"]]
    return min(times) / ms(record) if times else None


def own_se(record: Record) -> float | None:
    """SE against dyncore with nothing skipped."""
    speedup = against(record, "own")
    return None if speedup is None else speedup / record["flop_speedup"]


def live(record: Record) -> int:
    return round(record["keep_ratio"] * record["shape"]["T"])


def bandwidth(record: Record, variant: str = "dyncore") -> float:
    """GB/s over the weights a call must read."""
    return record["bytes"] / ms(record, variant) / 1e6


def of_plain_read(record: Record) -> float | None:
    return against(record, *(name for name in record["variants"] if name.startswith("read_")))


def gflops_per_core(record: Record, variant: str = "dyncore") -> float:
    return record["flops"]["executed"] / ms(record, variant) / 1e6 / record["threads"]


def microseconds(record: Record) -> float:
    return ms(record) * 1e3


@dataclasses.dataclass(frozen=True)
class Bar:
    """One demand.

    Attributes:
        text: as people read it.
        over: which records it is about.
        value: of a record; None where its rival did not run.
        bound: what is to be reached.
        mean: the geometric mean has to reach it, instead of every single point.
        at_most: smaller is better.
    """

    text: str
    over: Callable[[Record], bool]
    value: Callable[[Record], float | None]
    bound: float
    mean: bool = False
    at_most: bool = False


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was measured of a bar: `value` is None, and `met` false, where no record is about it."""

    text: str
    value: float | None
    bound: float
    met: bool
    points: int
    worst: str
    worst_value: float | None

    def record(self) -> Record:
        return dataclasses.asdict(self)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def point_name(record: Record) -> str:
    """Which point this is: unlike any other's."""
    shape = " ".join(f"{letter}={size}" for letter, size in record["shape"].items())
    words = [record["mechanism"], record["input"], shape, record["dtype"], f"keep={record['keep_ratio']:.3g}"]
    if record["phase"] != "forward":
        words.append(record["phase"])
    return " ".join([*words, f"threads={record['threads']}"])


def judge(bar: Bar, records: Sequence[Record]) -> Verdict:
    measured = [(record, bar.value(record)) for record in records if bar.over(record)]
    found = [(value, record) for record, value in measured if value is not None]
    if not found:
        return Verdict(bar.text, None, bar.bound, False, 0, "not measured", None)
    worst_value, worst = (max if bar.at_most else min)(found, key=lambda pair: pair[0])
    value = geometric_mean([value for value, _ in found]) if bar.mean else worst_value
    met = value <= bar.bound if bar.at_most else value >= bar.bound
    return Verdict(bar.text, value, bar.bound, met, len(found), point_name(worst), worst_value)


def _token(**limits: Any) -> Callable[[Record], bool]:
    """Records of token skipping: keep below 1 unless asked for."""
    rows, live_rows, keep_all = limits.get("rows", 0), limits.get("live_rows", 0), limits.get("keep_all", False)

    def over(r: Record) -> bool:
        everything = r["mechanism"] == "token-skipping" and r["phase"] == "forward"
        return everything and (r["keep_ratio"] == 1) == keep_all and r["shape"]["T"] >= rows and live(r) >= live_rows

    return over


def _moe(dtype: str, phase: str = "forward", experts: int | None = None, rows: Sequence[int] = ()):
    def over(r: Record) -> bool:
        wanted = r["mechanism"] == "moe" and r["dtype"] == dtype and r["phase"] == phase
        return wanted and experts in (None, r["shape"]["E"]) and (not rows or r["shape"]["T"] in rows)

    return over


def _is(mechanism: str, input: str | None = None, dtype: str | None = None) -> Callable[[Record], bool]:
    return lambda r: r["mechanism"] == mechanism and input in (None, r["input"]) and dtype in (None, r["dtype"])


def _se(r: Record) -> float | None:
    return r["se"]


def _over_dense(r: Record) -> float | None:
    return against(r, "dense")


def _over_naive(r: Record) -> float | None:
    return against(r, "naive")


def _over_loop_and_grouped_mm(r: Record) -> float | None:
    return against(r, "naive", "grouped_mm")


def _over_grouped_mm(r: Record) -> float | None:
    return against(r, "grouped_mm")


def _over_indexed(r: Record) -> float | None:
    return against(r, "indexed")


def saved_times_fewer(record: Record) -> float | None:
    """One tensor [T, I] over what a forward keeps besides its inputs."""
    kept = record.get("saved_bytes")
    size = {"float32": 4, "bfloat16": 2}[record["dtype"]]
    return None if kept is None else record["shape"]["T"] * record["shape"]["I"] * size / kept


def _relu(mechanism: str, dtype: str | None = None, rows: int | None = None, keep: float | None = None, **limits: Any):
    """Records of ReLU sparsity; `at_least` and `at_most` bound the keep ratio."""
    phase, low, high = limits.get("phase", "forward"), limits.get("at_least", 0.0), limits.get("at_most", 1.0)

    def over(r: Record) -> bool:
        wanted = r["mechanism"] == mechanism and r["phase"] == phase and dtype in (None, r["dtype"])
        return (
            wanted
            and rows in (None, r["shape"]["T"])
            and keep in (None, r["keep_ratio"])
            and low <= r["keep_ratio"] <= high
        )

    return over


def _over_own(r: Record) -> float | None:
    return against(r, "own")


def _zeros(keep: float) -> str:
    return f"{1 - keep:.0%}"


# (rows, dtype, against own dense) -> {keep ratio: at least}
_DOWN: dict[tuple[int, str, bool], dict[float, float]] = {
    (1, "float32", False): {0.1: 10, 0.05: 18, 0.01: 40},
    (1, "float32", True): {0.1: 7, 0.05: 12, 0.01: 30},
    (1, "bfloat16", False): {0.1: 12, 0.05: 14, 0.01: 40},
    (64, "float32", False): {0.1: 3.5, 0.05: 6, 0.01: 15},
    (64, "bfloat16", False): {0.1: 1.6, 0.05: 2.7, 0.01: 6.7},
    (512, "float32", False): {0.1: 3.8, 0.05: 6},
    (512, "bfloat16", False): {0.1: 1.8, 0.05: 2.7},
}


def _down_bars() -> Iterator[Bar]:
    for (rows, dtype, own), bounds in _DOWN.items():
        short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
        value, rival = (_over_own, "own dense") if own else (_over_dense, "dense")
        for keep, bound in bounds.items():
            text = f"ReLU down {short} T={rows}, {_zeros(keep)} zeros: >= {bound:g}x {rival}"
            yield Bar(text, _relu("relu-down", dtype, rows, keep), value, bound)


def _mlp_bars() -> Iterator[Bar]:
    for mechanism, name, limit, bound in (
        ("relu-mlp", "ReLU MLP", "2/(1+density)", 0.9),
        ("reglu-mlp", "ReGLU MLP", "3/(1+2 density)", 0.85),
    ):
        over = _relu(mechanism, rows=1, at_most=0.2)
        yield Bar(f"{name} T=1, 80-99% zeros: >= {bound} of {limit} over own dense", over, own_se, bound)
        yield Bar(f"{name} T=1, 80-99% zeros: >= {bound} of {limit} over dense", over, _se, bound)


def _training_bars() -> Iterator[Bar]:
    for keep, bound in {0.2: 1.4, 0.1: 2.2, 0.05: 3.0}.items():
        over = _relu("relu-mlp", keep=keep, phase=_BOTH)
        yield Bar(f"ReLU MLP training, {_zeros(keep)} zeros: >= {bound:g}x dense", over, _over_dense, bound)
    for keep, bound in {0.2: 4.0, 0.1: 7.0, 0.05: 11.0}.items():
        over, times = _relu("relu-mlp", keep=keep, phase=_BOTH), f"{bound:g}x"
        yield Bar(f"ReLU MLP saves >= {times} fewer bytes, {_zeros(keep)} zeros", over, saved_times_fewer, bound)


def _over_shipped(r: Record) -> float | None:
    return against(r, "eager", "batched_mm", "grouped_mm")


def _experts(rows: Sequence[int], phase: str, *dtypes: str, layer: str = "swiglu") -> Callable[[Record], bool]:
    def over(r: Record) -> bool:
        wanted = r["mechanism"] == "transformers" and r["input"] == layer and r["phase"] == phase
        return wanted and r["shape"]["T"] in rows and r["dtype"] in dtypes

    return over


def _transformers_bars() -> Iterator[Bar]:
    wide = ("float32", "bfloat16")
    for phase, many, few in (("forward", 2.0, 1.0), (_BOTH, 2.5, 1.3)):
        start = f"transformers experts, {phase},"
        for short, dtype in zip(("fp32", "bf16"), wide, strict=True):
            over = _experts((512,), phase, dtype)
            yield Bar(f"{start} {short} T=512: >= {many:g}x the best shipped", over, _over_shipped, many)
        over = _experts((512,), phase, "float16")
        yield Bar(f"{start} fp16 T=512: >= 8x the best shipped", over, _over_shipped, 8.0)
        over = _experts((1, 8), phase, *wide, "float16")
        yield Bar(f"{start} T=1, 8: >= {few:g}x the best shipped", over, _over_shipped, few)
        over = _experts((1, 8, 512), phase, *wide, layer="gpt-oss")
        yield Bar(f"{start} gpt-oss: >= 1x the best shipped", over, _over_shipped, 1.0)


_BOTH = "forward+backward"
BARS = (
    Bar("token skipping: SE against dense, geometric mean >= 0.95", _token(), _se, 0.95, mean=True),
    Bar("token skipping: the same, T >= 512, >= 1.05", _token(rows=512), _se, 1.05, mean=True),
    Bar("token skipping: SE against dense, no point below 0.7", _token(), _se, 0.7),
    Bar("token skipping: SE against own keep=1, 64 rows live or more, >= 0.9", _token(live_rows=64), own_se, 0.9),
    Bar("token skipping: keep=1 over dense, geometric mean >= 1", _token(keep_all=True), _over_dense, 1.0, mean=True),
    Bar("token skipping: keep=1 over dense, no point below 0.92", _token(keep_all=True), _over_dense, 0.92),
    Bar("token skipping: never slower than naive, at any keep (>= 1x)", _is("token-skipping"), _over_naive, 1.0),
    Bar(
        "MoE fp32 E=64 T=64, 512: >= 2.5x the faster of loop and grouped_mm",
        _moe("float32", experts=64, rows=(64, 512)),
        _over_loop_and_grouped_mm,
        2.5,
    ),
    Bar("MoE fp32 E=64 T=8: >= 2x", _moe("float32", experts=64, rows=(8,)), _over_loop_and_grouped_mm, 2.0),
    Bar("MoE fp32: >= 1.15x everywhere", _moe("float32"), _over_loop_and_grouped_mm, 1.15),
    Bar("MoE fp32: geometric mean >= 2.2x", _moe("float32"), _over_loop_and_grouped_mm, 2.2, mean=True),
    Bar("MoE bf16: geometric mean >= 1.7x", _moe("bfloat16"), _over_loop_and_grouped_mm, 1.7, mean=True),
    Bar("MoE fp16: geometric mean >= 5x", _moe("float16"), _over_loop_and_grouped_mm, 5.0, mean=True),
    Bar(
        "MoE fp32 forward+backward: geometric mean >= 2x grouped_mm", _moe("float32", _BOTH), _over_grouped_mm, 2, True
    ),
    Bar(
        "MoE bf16 forward+backward: geometric mean >= 2x grouped_mm", _moe("bfloat16", _BOTH), _over_grouped_mm, 2, True
    ),
    Bar("MoE fp32 forward+backward, E=64 T=512: >= 5x the loop by index", _moe("float32", _BOTH), _over_indexed, 5.0),
    Bar("T <= 4: >= 0.8 of the bandwidth of a plain read", _is("stream"), of_plain_read, 0.8),
    Bar("large products fp32: >= 95 GFLOP/s a core", _is("product", dtype="float32"), gflops_per_core, 95.0),
    Bar("large products bf16: >= 200 GFLOP/s a core", _is("product", dtype="bfloat16"), gflops_per_core, 200.0),
    Bar("plan making T=4096 E=64 k=2: <= 150 us", _is("overhead", "route"), microseconds, 150.0, at_most=True),
    Bar("call of select, tiny: <= 8 us", _is("overhead", "select"), microseconds, 8.0, at_most=True),
    Bar("call of grouped_mlp, tiny: <= 15 us", _is("overhead", "grouped_mlp"), microseconds, 15.0, at_most=True),
    *_down_bars(),
    Bar("ReLU down, 0-50% zeros: never below 0.97x dense", _relu("relu-down", at_least=0.5), _over_dense, 0.97),
    *_mlp_bars(),
    *_training_bars(),
    Bar("ReLU MLP training: never below 0.97x dense", _relu("relu-mlp", phase=_BOTH), _over_dense, 0.97),
    *_transformers_bars(),
)

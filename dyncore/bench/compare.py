"""What became faster or slower since an earlier run of the same points: `dyncore bench --compare`."""

from __future__ import annotations

import statistics
from typing import Any

from rich import box
from rich.table import Table

from dyncore.bench.table import one_point

_Record = dict[str, Any]
_CLEAR = (
    1.05  # a median that moved by less is called the same, and so is one that moved by less than the samples spread
)


def _key(record: _Record) -> tuple[Any, ...]:
    shape = tuple(sorted(record["shape"].items()))
    what = (record["mechanism"], record["input"], record.get("granularity", "row"), shape, record.get("device", "cpu"))
    return (*what, record["dtype"], record["phase"], record["keep_ratio"])


def _ours(record: _Record) -> dict[str, Any]:
    variant: dict[str, Any] = record["variants"]["dyncore"]
    return variant


def changes(earlier: list[_Record], records: list[_Record]) -> list[dict[str, Any]]:
    """One entry for each point that both have: what was measured of it before and now.

    before_ms, now_ms: medians. speedup: before over now. relative: how much the median over the rivals' moved, by the
    geometric mean of the rivals that both have: a machine that is slower today leaves it as it was; None without
    rivals. verdict: "faster", "slower" or "same", by `relative` where it is known, else by `speedup`.
    """
    before = {_key(r): r for r in earlier if "dyncore" in r.get("variants", {})}
    found: list[dict[str, Any]] = []
    for record in records:
        old = before.get(_key(record))
        if old is None:
            continue
        was, now = _ours(old), _ours(record)
        rivals = [name for name in record["against"] if name in old["against"]]
        moved = [record["against"][name] / old["against"][name] for name in rivals]
        speedup = was["median_ms"] / now["median_ms"]
        relative = statistics.geometric_mean(moved) if moved else None
        change = speedup if relative is None else relative
        noise = max(_CLEAR, 1 + max(was["spread"], now["spread"]))
        found.append(
            {
                "point": one_point(record),
                "before_ms": was["median_ms"],
                "now_ms": now["median_ms"],
                "speedup": speedup,
                "relative": relative,
                "verdict": "faster" if change > noise else "slower" if change < 1 / noise else "same",
            }
        )
    return found


def sentences(earlier: dict[str, Any], found: list[dict[str, Any]], count: int) -> list[str]:
    """What is compared with what, and how it came out; `count`: points of this run."""
    environment = earlier.get("environment") or {}
    commit = (environment.get("commit") or {}).get("id", "unknown commit")[:12]
    with_what = f"the run of {earlier['created']} ({commit}, {environment.get('cpu', 'unknown machine')})"
    if not found:
        return [f"None of the {count} points is in {with_what}."]
    verdicts = [change["verdict"] for change in found]
    median = statistics.median(change["relative"] or change["speedup"] for change in found)
    return [
        f"{len(found)} of {count} points are in {with_what}, too: {verdicts.count('faster')} faster, "
        f"{verdicts.count('slower')} slower, {verdicts.count('same')} the same within their spread; in the median "
        f"{median:.2f}x as fast, measured against the rivals of each run."
    ]


def table(found: list[dict[str, Any]]) -> Table:
    """The points that moved, the slowest first."""
    shown = Table(title="what moved", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("point", "before ms", "now ms", "speed-up", "against rivals"):
        shown.add_column(column, justify="left" if column == "point" else "right")
    moved = [change for change in found if change["verdict"] != "same"]
    for change in sorted(moved, key=lambda change: change["relative"] or change["speedup"]):
        relative = "-" if change["relative"] is None else f"{change['relative']:.2f}x"
        colour = "green" if change["verdict"] == "faster" else "red"
        shown.add_row(
            change["point"],
            f"{change['before_ms']:.3f}",
            f"{change['now_ms']:.3f}",
            f"{change['speedup']:.2f}x",
            f"[{colour}]{relative}[/]",
        )
    return shown

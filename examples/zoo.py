"""Every example in one table and one plot: accuracy against wall clock, one curve a mechanism.

    python -m examples.zoo                          # all, three minutes each at most
    python -m examples.zoo --only skipnet           # one more; the others' curves are kept
    python -m examples.zoo --quick --out /tmp/zoo   # a smoke test: a few seconds each

Writes OUT.json (the curves with machine and commit), OUT.md (the table) and OUT.png (the plot).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dyncore.measure import new_results, write_results
from examples.common import Point, Result, marked, table, times

NAMES: tuple[str, ...] = tuple(
    path.stem for path in sorted(Path(__file__).parent.glob("*.py")) if "\ndef run(quick: bool)" in path.read_text()
)
SCHEMA = "dyncore.zoo/1"  # records of one mechanism each: its dense network and the points of its curve
DEFAULT = Path(__file__).parents[1] / "benchmarks" / "results" / "zoo"
LOSS = 0.01  # of accuracy: what the summary allows
FRAME = (88, 100.6)  # of accuracies in the plot, %: curves that go lower leave it
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1)


def run(name: str, quick: bool) -> Result:
    return marked(importlib.import_module(f"examples.{name}").run(quick), quick)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of an earlier run."""
    return json.loads(path.read_text())["records"]


def as_record(name: str, result: Result, seconds: float) -> dict[str, Any]:
    return {"example": name, "threads": torch.get_num_threads(), "seconds": seconds} | dataclasses.asdict(result)


def as_result(record: dict[str, Any]) -> Result:
    points = [Point(**point) for point in record["points"]]
    return Result(record["name"], Point(**record["dense"]), points, record["note"])


HEADER = """\
| mechanism | threshold | accuracy | dense | fewer FLOPs | faster | SE | alone, faster |
|---|---:|---:|---:|---:|---:|---:|---:|"""


def row(result: Result, point: Point) -> str:
    """A point, as ratios to the dense network of its mechanism."""
    dense = result.dense
    fewer, faster = times(result, point)
    cells = [result.name, f"{point.threshold:.4g}", f"{point.accuracy:.1%}", f"{dense.accuracy:.1%}"]
    cells += [f"{fewer:.2f}x", f"{faster:.2f}x", f"{faster / fewer:.2f}", f"{dense.single_ms / point.single_ms:.2f}x"]
    return f"| {' | '.join(cells)} |"


def kept(result: Result) -> Point | None:
    """The fastest point whose accuracy is less than `LOSS` below the dense network's."""
    close = [p for p in result.points if p.accuracy > result.dense.accuracy - LOSS]
    return min(close, key=lambda p: p.ms, default=None)


def markdown(results: Sequence[Result]) -> str:
    """The fastest point of each mechanism that is as good as dense, then all points and notes."""
    best = [row(result, point) for result in results if (point := kept(result))]
    every = [row(result, point) for result in results for point in result.points]
    notes = [f"- {result.name}: {result.note}" for result in results if result.note]
    title = f"The fastest point of each whose accuracy is less than {LOSS:.0%} below that of its dense network:"
    return "\n".join([title, "", HEADER, *best, "", "All points:", "", HEADER, *every, "", *notes, ""])


def plot(results: Sequence[Result], path: Path) -> None:
    """Accuracy against wall clock, the time of each mechanism's own dense network being 1: a panel each, the others'
    curves in grey behind it, and dotted what the FLOPs promise."""
    from matplotlib.figure import Figure

    columns = min(4, len(results))
    lines = -(-len(results) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.5 * lines + 0.6), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    clocks = [[point.ms / result.dense.ms for point in result.points] for result in results]
    accuracies = [[100 * point.accuracy for point in result.points] for result in results]
    for number, (axes, result) in enumerate(zip(panels, results, strict=False)):
        for clock, accuracy in zip(clocks, accuracies, strict=True):
            axes.plot(clock, accuracy, color="0.88", lw=0.8, zorder=1)
        axes.axvline(1, color="0.7", lw=0.8, zorder=1)
        promised = [point.flops / result.dense.flops for point in result.points]
        axes.plot(promised, accuracies[number], ":", color="C1", label="FLOPs")
        axes.plot(clocks[number], accuracies[number], "o-", color="C0", ms=3.5, label="wall clock")
        axes.plot(1, 100 * result.dense.accuracy, "k*", ms=8, zorder=4, label="dense")
        axes.set_title(result.name, fontsize="small")
        axes.set(xscale="log", ylim=FRAME, xlim=(0.018, 1.6), xticks=TICKS, xticklabels=[f"{t:g}" for t in TICKS])
        axes.minorticks_off()
        axes.tick_params(labelsize="small")
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize="small")
    figure.supxlabel("of the dense network's wall clock (FLOPs: of its FLOPs)", fontsize="medium")
    figure.supylabel("test accuracy, %", fontsize="medium")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=NAMES, help="may be given more than once")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=DEFAULT, help="without suffix (default: benchmarks/results/zoo)")
    args = parser.parse_args(argv)
    results = new_results(" ".join(["python -m examples.zoo", *(sys.argv[1:] if argv is None else argv)]))
    results["schema"] = SCHEMA
    stamp = {"measured": results["created"], "commit": results["environment"]["commit"]}
    place = args.out.with_suffix(".json")
    records = {r["example"]: r for r in read(place)} if place.exists() and args.only else {}
    for name in args.only or NAMES:
        torch.manual_seed(0)
        start = time.perf_counter()
        result = run(name, args.quick)
        seconds = round(time.perf_counter() - start)
        records[name] = as_record(name, result, seconds) | stamp
        print(f"{table(result)}\n{seconds} s\n", flush=True)
        results["records"] = [records[name] for name in NAMES if name in records]
        write_results(place, results)
    curves = [as_result(record) for record in results["records"]]
    args.out.with_suffix(".md").write_text(markdown(curves))
    plot(curves, args.out.with_suffix(".png"))
    print(f"{place}, .md, .png")


if __name__ == "__main__":
    main()

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
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dyncore.measure import new_results, read_results, write_results
from examples.common import Point, Result, marked, table, times

NAMES: tuple[str, ...] = tuple(
    path.stem for path in sorted(Path(__file__).parent.glob("*.py")) if "\ndef run(quick: bool)" in path.read_text()
)
DEFAULT = Path(__file__).parents[1] / "benchmarks" / "results" / "zoo"
MARKS = "osD^v<>Pphd*X8"


def run(name: str, quick: bool) -> Result:
    return marked(importlib.import_module(f"examples.{name}").run(quick), quick)


def as_record(name: str, result: Result, seconds: float) -> dict[str, Any]:
    return {"example": name, "threads": torch.get_num_threads(), "seconds": seconds} | dataclasses.asdict(result)


def as_result(record: dict[str, Any]) -> Result:
    points = [Point(**point) for point in record["points"]]
    return Result(record["name"], Point(**record["dense"]), points, record["note"])


def markdown(results: Sequence[Result]) -> str:
    """Each mechanism's points, as ratios to its own dense network."""
    lines = [
        "| mechanism | threshold | accuracy | dense | fewer FLOPs | faster | SE | alone, faster |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        dense = result.dense
        for point in result.points:
            fewer, faster = times(result, point)
            alone = dense.single_ms / point.single_ms
            cells = [result.name, f"{point.threshold:.4g}", f"{point.accuracy:.1%}", f"{dense.accuracy:.1%}"]
            cells += [f"{fewer:.2f}x", f"{faster:.2f}x", f"{faster / fewer:.2f}", f"{alone:.2f}x"]
            lines.append(f"| {' | '.join(cells)} |")
    notes = [f"- {result.name}: {result.note}" for result in results if result.note]
    return "\n".join([*lines, *(["", *notes] if notes else []), ""])


def plot(results: Sequence[Result], path: Path) -> None:
    """Accuracy against wall clock, the time of each mechanism's own dense network being 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    colours = [f"C{i % 10}" for i in range(len(results))]
    for result, colour, mark in zip(results, colours, MARKS * 2, strict=False):
        clock = [point.ms / result.dense.ms for point in result.points]
        axes.plot(clock, [100 * p.accuracy for p in result.points], mark + "-", color=colour, label=result.name, ms=4)
        axes.plot(1, 100 * result.dense.accuracy, mark, color=colour, fillstyle="none", ms=8)
    axes.axvline(1, color="0.8", zorder=0)
    axes.set(xlabel="wall clock, the dense network's = 1 (open marks)", ylabel="test accuracy, %", xscale="log")
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=NAMES, help="may be given more than once")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=DEFAULT, help="without suffix (default: benchmarks/results/zoo)")
    args = parser.parse_args(argv)
    results = new_results(" ".join(["python -m examples.zoo", *(sys.argv[1:] if argv is None else argv)]))
    stamp = {"measured": results["created"], "commit": results["environment"]["commit"]}
    place = args.out.with_suffix(".json")
    records = {r["example"]: r for r in read_results(place)["records"]} if place.exists() and args.only else {}
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

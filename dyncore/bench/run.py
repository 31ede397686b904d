"""The sweep of `dyncore bench`: points one after the other; what was measured is on disk after each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dyncore.bench import compare, points
from dyncore.bench.contest import Point, measure
from dyncore.bench.table import one_line, render
from dyncore.measure.environment import timing_warnings
from dyncore.measure.records import new_results, write_results
from dyncore.report import read_document, report_page
from dyncore.report.summary import sentences

INTERRUPTED = 130  # exit status of a process that Ctrl-C ended


@dataclasses.dataclass(frozen=True)
class Options:
    """What `dyncore bench` was asked for: the report goes into `out`, a folder that exists; `seconds` and `min_rounds`
    bound the timing of each point; `earlier` are results to compare with."""

    out: Path
    names: tuple[str, ...] = ()
    size: str = "quick"
    dtype: torch.dtype | None = None
    threads: int | None = None
    device: torch.device | None = None
    seconds: float = 1.0
    min_rounds: int = 5
    command: str = "dyncore bench"
    earlier: dict[str, Any] | None = None


def _expected_seconds(point: Point, options: Options) -> float:
    """Rough, at 100 GFLOP/s: rounds and a warm-up, and the check in float64. The time left is scaled by what passed."""
    timing = max(options.seconds * point.share, (options.min_rounds + 1) * point.work / 100)
    return 0.3 + timing + point.work / 50


def sweep(chosen: Sequence[Point], folder: Path, options: Options, console: Console) -> dict[str, Any]:
    """Measure the points; results.json in `folder` is whole after each. Ctrl-C ends the sweep, not the report."""
    results = new_results(options.command)
    results["warnings"] = timing_warnings()
    for warning in results["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    path = folder / "results.json"
    costs = [_expected_seconds(point, options) for point in chosen]
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, speed_estimate_period=3600) as progress:
        task = progress.add_task("", total=sum(costs))
        try:
            for i, (point, cost) in enumerate(zip(chosen, costs, strict=True), 1):
                progress.update(task, description=f"{i}/{len(chosen)} {point}")
                record, errors = measure(
                    point, seconds=options.seconds, min_rounds=options.min_rounds, device=options.device
                )
                results["errors"] += errors
                if record is not None:
                    results["records"].append(record)
                    progress.console.print(one_line(record), highlight=False, soft_wrap=True)
                for error in errors:
                    text = f"error: {error['point']}: {error['variant']}: {error['message']}"
                    progress.console.print(text, style="red", highlight=False, markup=False, soft_wrap=True)
                write_results(path, results)
                progress.advance(task, cost)
        except KeyboardInterrupt:
            results["interrupted"] = True
            write_results(path, results)
    return results


def run(options: Options) -> int:
    """Sweep, print the table, write results.json and index.html; the exit status."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device is not None and options.device.type == "cuda":
        torch.cuda.set_device(options.device)
    folder = options.out
    out, log = Console(), Console(stderr=True)
    if not out.is_terminal:
        out.width = 160  # a table in a file or pipe is not broken at 80 columns
    chosen = points(options.names, options.size, options.dtype)
    results = sweep(chosen, folder, options, log)
    if results["records"]:
        document = read_document(folder / "results.json")
        page = report_page([document])
        (folder / "index.html").write_text(page, encoding="utf-8")  # first: a reader of the output may leave
        for table in render(results["records"]):
            out.print(table)
        for sentence in sentences(document.comparisons):
            out.print(sentence, highlight=False, soft_wrap=True)
        for warning in results["warnings"]:
            out.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
        if options.earlier is not None:
            found = compare.changes(options.earlier["records"], results["records"])
            results["compared"] = {"with": options.earlier["created"], "points": found}
            write_results(folder / "results.json", results)
            if any(change["verdict"] != "same" for change in found):
                out.print(compare.table(found))
            for sentence in compare.sentences(options.earlier, found, len(results["records"])):
                out.print(sentence, highlight=False, soft_wrap=True)
        out.print(f"Report: {folder / 'index.html'}", highlight=False, soft_wrap=True)
    if results["interrupted"]:
        log.print(
            f"Interrupted after {len(results['records'])} of {len(chosen)} points; what was measured is in {folder}"
        )
        return INTERRUPTED
    if results["errors"]:
        log.print(f"{len(results['errors'])} variants gave wrong numbers or failed; they have no times above")
        return 1
    return 0

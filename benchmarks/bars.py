"""`python -m benchmarks.bars [--part NAME] [--only TEXT]`: every bar the CPU kernels are to reach, measured and judged.

Rivals run in the same rounds, numbers are checked first, weights are cold where a model's are (dyncore.bench.contest).
Prints a line a point, then a line a bar; writes the records and the verdicts. A run of some points replaces their
records and keeps the others, so that a long run may be had in pieces.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bar_points import PARTS, Job
from benchmarks.bar_rules import (
    BARS,
    Record,
    Verdict,
    bandwidth,
    gflops_per_core,
    judge,
    of_plain_read,
    own_se,
    point_name,
    saved_times_fewer,
)
from dyncore.bench.contest import OURS, Contest, measure
from dyncore.measure.records import new_results, read_results, write_results

DEFAULT = Path(__file__).parent / "results" / "bars.json"
_MACHINE = ("cpu", "isa", "threads", "system")


def saved_bytes(contest: Contest) -> int:
    """Bytes of storages that our forward keeps for its backward, besides those of its inputs and weights."""
    variant = contest.variants[OURS]
    args = (*contest.inputs[0], *variant.weights)
    given = {t.untyped_storage().data_ptr() for t in args}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = variant.run(*args)  # alive, and with it what it keeps: no storage is counted for another's address
    assert out.requires_grad
    return sum(size for start, size in kept.items() if start not in given)


def run(job: Job, seconds: float) -> tuple[Record | None, list[dict[str, str]]]:
    """(record or None, errors) of a job; times are of one call."""
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads or before)
    try:
        record, errors = measure(job.point, seconds=seconds, min_rounds=job.min_rounds)
        if record is None:
            return None, errors
        record["threads"] = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    if job.bytes is not None:
        record["bytes"] = job.bytes
    if job.saved:
        record["saved_bytes"] = saved_bytes(job.point.build())
    for variant in record["variants"].values():
        variant["median_ms"] /= job.calls
        variant["samples_ns"] = [round(sample / job.calls) for sample in variant["samples_ns"]]
    return record, errors


def one_line(record: Record) -> str:
    """A point: our time, and how it stands to each rival."""
    took = record["variants"][OURS]["median_ms"]
    words = [f"{name} {x:.2f}x" for name, x in record["against"].items()]
    if record["se"] is not None and record["keep_ratio"] < 1:
        own = own_se(record)
        words.append(f"SE {record['se']:.2f}" + (f", own SE {own:.2f}" if own is not None else ""))
    if "saved_bytes" in record:
        words.append(f"{saved_times_fewer(record):.1f}x fewer bytes saved")
    if "bytes" in record:
        words = [f"{bandwidth(record):.1f} GB/s, {of_plain_read(record):.2f} of a plain read"]
    if record["mechanism"] == "product":
        ours, theirs = gflops_per_core(record), gflops_per_core(record, "dense")
        words = [f"{ours:.0f} GFLOP/s a core, torch {theirs:.0f}"]
    time = f"{took * 1e3:8.1f} us" if took < 0.3 else f"{took:8.2f} ms"
    return f"{point_name(record):<86} {time}  {'; '.join(words)}"


def report(verdicts: Sequence[Verdict]) -> str:
    """One line a bar, and the worst point of each."""
    lines = []
    for v in verdicts:
        if v.value is not None:
            state = "met" if v.met else "MISSED"
            worst = f"worst of {v.points}: {v.worst_value:.4g} at {v.worst}"
            lines.append(f"{v.text:<72} {v.value:6.4g}  {state:<6}  {worst}")
    missing = [v.text for v in verdicts if v.value is None]
    return "\n".join([*lines, f"{len(missing)} bars are not measured yet"] if missing else lines)


def merged(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """`new` with those records of `old` that it has no newer ones of, if the same machine made them."""
    if old is None or any(old["environment"][key] != new["environment"][key] for key in _MACHINE):
        return new
    measured = {point_name(record) for record in new["records"]}
    kept = [record for record in old["records"] if point_name(record) not in measured]
    return new | {"records": kept + new["records"]}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bars", description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all; may be given more than once")
    parser.add_argument("--only", action="append", default=[], help="points with this in their name: float32, T=512")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each point (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT, help="default: benchmarks/results/bars.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a variant gave wrong numbers. A missed bar is a figure, not a failure."""
    args = _arguments(argv)
    whole = args.part is None and not args.only
    results = new_results(" ".join(["python -m benchmarks.bars", *(sys.argv[1:] if argv is None else argv)]))
    stamp = {"measured": results["created"], "commit": results["environment"]["commit"]}
    old = read_results(args.out) if args.out.exists() and not whole else None
    start = time.perf_counter()
    for part in args.part or PARTS:
        for job in PARTS[part]():
            if any(text not in str(job.point).split() for text in args.only):
                continue
            record, errors = run(job, args.seconds)
            results["errors"] += errors
            for error in errors:
                print(f"error: {error['point']}: {error['variant']}: {error['message']}", file=sys.stderr)
            if record is not None:
                results["records"].append(record | stamp)
                print(one_line(record), flush=True)
    results = merged(old, results)
    verdicts = [judge(bar, results["records"]) for bar in BARS]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_results(args.out, results | {"bars": [verdict.record() for verdict in verdicts]})
    print(f"\n{report(verdicts)}\n\n{args.out}, {time.perf_counter() - start:.0f} s")
    return 1 if results["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.layers [--only NAME]`: what each dynamic layer saves, and whether that is enough.

A mechanism at every share and its dense network are timed in the same rounds, each with weights of its own; before
that, its "sparse" result is held against its "masked" one. A run of some mechanisms replaces their records and keeps
the others.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import itertools
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import benchmarks.layers as families
import dyncore as dc
from benchmarks.bar_rules import Record
from benchmarks.layers import Forced, Mechanism
from dyncore.bench.contest import DENSE, OURS
from dyncore.execution import mode
from dyncore.measure import (
    Interleaved,
    Timing,
    flops,
    new_results,
    read_results,
    realised_saving,
    scaling_efficiency,
    write_results,
)
from dyncore.measure.agreement import disagreement

DEFAULT = Path(__file__).parents[1] / "results" / "layers.json"
SE_AT, SE_BAR, DENSE_BAR = 0.25, 0.8, 0.97
FRESH = 4  # inputs that take turns


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def keep_memory() -> None:
    """Memory that is freed stays with the process, as other allocators have it: glibc gives large blocks back to the
    system at moments that depend on all sizes before, and a call that pages 80 MB in anew takes 10% longer, the same
    network in one process and not in the next."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def mechanisms() -> Iterator[Mechanism]:
    """Of every file in this folder, in the order of their names."""
    for info in pkgutil.iter_modules(families.__path__):
        if info.name != "__main__":
            yield from importlib.import_module(f"benchmarks.layers.{info.name}").MECHANISMS


def restart(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Forced):
            module.restart()


def check(model: nn.Module, args: tuple[Tensor, ...]) -> str | None:
    """Why the network is wrong: it does not give in "sparse" execution what it gives in "masked"."""
    results = []
    for execution in ("sparse", "masked"):
        restart(model)
        with dc.execution(execution):
            results.append([t for t in pytree.tree_leaves(model(*args)) if isinstance(t, Tensor)])
    for ours, truth in zip(*results, strict=True):
        why = disagreement(ours, truth.double()) if truth.is_floating_point() else None
        if why:
            return f"sparse and masked execution differ: {why}"
    return None


def timed(
    models: Mapping[str, nn.Module], inputs: Callable[[], tuple[Tensor, ...]], seconds: float
) -> dict[str, Timing]:
    """Timings by name: every network in every round, on fresh inputs that take turns."""
    fresh = [inputs() for _ in range(FRESH)]
    calls: dict[str, Callable[..., Any]] = dict(models)
    timer = Interleaved(calls, arguments=lambda name, round: fresh[round % FRESH])
    return timer.run(seconds=seconds, min_rounds=7, max_rounds=400)


@torch.no_grad()
def measure(mechanism: Mechanism, seconds: float) -> tuple[list[Record], list[dict[str, str]]]:
    """(a record for each share, errors): one call of a batch, and in "batch_1" of one row, sequence or image."""
    torch.manual_seed(0)
    models = {"dense": mechanism.dense().eval()} | {f"{k:g}": mechanism.at(k).eval() for k in mechanism.keeps}
    args = mechanism.inputs(False)
    counts, errors = {}, []
    for name, model in models.items():
        why = None if name == "dense" else check(model, args)
        if why:
            errors.append({"point": f"{mechanism.name} keep={name}", "variant": OURS, "message": why})
        restart(model)
        counts[name] = flops(model, *args)
    batch = timed(models, lambda: mechanism.inputs(False), seconds)
    one = timed(models, lambda: mechanism.inputs(True), seconds / 4)
    records = []
    for keep in mechanism.keeps:
        name = f"{keep:g}"
        executed, dense = counts[name], counts["dense"]
        faster, fewer = batch["dense"].median / batch[name].median, dense / executed if executed else None
        records.append(
            {
                "mechanism": mechanism.name,
                "input": "random",
                "shape": dict(zip("BCHW" if args[0].dim() == 4 else "BSD", args[0].shape, strict=False)),
                "dtype": str(args[0].dtype).removeprefix("torch."),
                "phase": "forward",
                "keep_ratio": keep,
                "execution": mode(),
                "threads": torch.get_num_threads(),
                "flops": {"executed": executed, "dense": dense},
                "variants": {OURS: batch[name].record(), DENSE: batch["dense"].record()},
                "flop_speedup": fewer,
                "wall_clock_speedup": faster,
                "se": scaling_efficiency(faster, fewer) if fewer else None,
                "rsr": realised_saving(batch[name].median, batch["dense"].median, executed, dense),
                "against": {DENSE: faster},
                "unavailable": {},
                "saves": mechanism.saves,
                # a mean: of single rows some are skipped and the others are not
                "batch_1": {OURS: {"mean_ms": mean_ms(one[name])}, DENSE: {"mean_ms": mean_ms(one["dense"])}},
            }
        )
    return records, errors


def name_of(record: Record) -> str:
    return record["mechanism"]


def mean_ms(timing: Timing) -> float:
    """Mean of the samples without the slowest twentieth, which are the machine's stalls."""
    samples = sorted(timing.samples_ns)
    samples = samples[: len(samples) - len(samples) // 20]
    return sum(samples) / len(samples) / 1e6


def bars(records: Sequence[Record]) -> dict[str, Any]:
    """Of one mechanism's records: does time fall with the share, SE at a quarter, everything kept against dense."""
    times = [r["variants"][OURS]["median_ms"] for r in records]
    se = next((r["se"] for r in records if r["keep_ratio"] == SE_AT), None)
    whole = next((r["wall_clock_speedup"] for r in records if r["keep_ratio"] == 1), None)
    met = {
        "time falls with the share": all(later < earlier for earlier, later in itertools.pairwise(times)),
        f"SE at {SE_AT} >= {SE_BAR}": se is not None and se >= SE_BAR,
        f"keep 1 >= {DENSE_BAR} of dense": whole is not None and whole >= DENSE_BAR,
    }
    return {"mechanism": records[0]["mechanism"], "met": met, "se_at_a_quarter": se, "keep_1_over_dense": whole}


def lines(records: Sequence[Record]) -> Iterator[str]:
    """One mechanism's records as text."""
    first = records[0]
    shape = " ".join(f"{letter}={size}" for letter, size in first["shape"].items())
    dense, one = first["variants"][DENSE]["median_ms"], first["batch_1"][DENSE]["mean_ms"]
    gflop = first["flops"]["dense"] / 1e9
    yield f"{first['mechanism']}, {shape}: dense {dense:.2f} ms, {gflop:.2f} GFLOP; batch 1 {one:.3f} ms"
    for r in records:
        fewer = "    -" if r["flop_speedup"] is None else f"{r['flop_speedup']:5.2f}"
        se = "   -" if r["se"] is None else f"{r['se']:4.2f}"
        yield (
            f"  keep {r['keep_ratio']:<5g}{r['variants'][OURS]['median_ms']:9.2f} ms  {fewer}x fewer FLOPs  "
            f"{r['wall_clock_speedup']:6.2f}x faster  SE {se}  batch 1 {r['batch_1'][OURS]['mean_ms']:.3f} ms"
        )
    if first["saves"]:
        missed = [text for text, met in bars(records)["met"].items() if not met]
        yield f"  MISSED: {'; '.join(missed)}" if missed else "  met"
    else:
        yield "  cannot save"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 1 if a mechanism is wrong. A missed bar is a figure, not a failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="mechanisms with this in their name")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each mechanism (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT, help="default: benchmarks/results/layers.json")
    args = parser.parse_args(argv)
    keep_memory()
    results = new_results(" ".join(["python -m benchmarks.layers", *(sys.argv[1:] if argv is None else argv)]))
    stamp = {"measured": results["created"], "commit": results["environment"]["commit"]}
    for mechanism in mechanisms():
        if args.only and not any(text in mechanism.name for text in args.only):
            continue
        records, errors = measure(mechanism, args.seconds)
        results["records"] += [record | stamp for record in records]
        results["errors"] += errors
        for error in errors:
            print(f"error: {error['point']}: {error['message']}", file=sys.stderr)
        print("\n".join(lines(records)), flush=True)
    if args.out.exists() and args.only:
        new = {record["mechanism"] for record in results["records"]}
        results["records"] += [r for r in read_results(args.out)["records"] if r["mechanism"] not in new]
    results["records"].sort(key=name_of)  # stable: shares stay in their order
    results["bars"] = [bars(list(records)) for _, records in itertools.groupby(results["records"], key=name_of)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_results(args.out, results)
    return 1 if results["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())

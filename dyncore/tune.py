"""`dyncore tune`: measures this machine's break-evens and writes them where dyncore.break_even reads them. Floor 5.

Three questions, each for a few sizes: from which density of slots computing everything is faster than skipping, from
which density of non-zeros a dense product is faster than skipping zeros, and whether torch's matmul on gathered rows,
group by group, is faster than our kernels. Ways are timed in turn, weights
come from memory. Needs torch alone.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import dyncore as dc
from dyncore import break_even
from dyncore.backends import cpu, cpu_sparse, torch_matmul
from dyncore.break_even import MARGIN, SCHEMA, Table, machine, parse, path, read
from dyncore.measure.environment import timing_warnings
from dyncore.measure.records import write_results
from dyncore.measure.savings import break_even as crossing
from dyncore.measure.timing import Interleaved, Timing, cold_copies

OPS = ("grouped_linear", "grouped_mlp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUPS = 4
_DENSITIES = (0.5, 0.75, 1.0)
_NONZEROS = (0.1, 0.25, 0.4, 0.55)
# Spread of a quarter of the cells from which a machine counts as busy. Measured by tune --quick with 2 threads on 2
# cores: 0.08 with nothing beside it, 1.2 beside two other programs.
NOISY = 0.25


@dataclasses.dataclass(frozen=True)
class Effort:
    """Rows of a group and widths (a product of width x width, or its equal in an MLP) of the executors' table, rows and
    widths of the other one, and seconds for each cell (a slow machine, or dtype, takes three rounds however long)."""

    rows: tuple[int, ...] = (8, 64, 512)
    widths: tuple[int, ...] = (256, 1024, 2048)
    masked_rows: tuple[int, ...] = (64, 1024)
    masked_widths: tuple[int, ...] = (256, 1024)
    seconds: float = 0.4


FULL = Effort()
QUICK = Effort(rows=(16, 256), widths=(256, 1024), masked_rows=(256,), masked_widths=(256, 1024), seconds=0.1)


def _weights(op: str, groups: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of width^2 elements a group: [N, K] of a linear, or [2H, H] and [H, 2H] of an MLP."""
    half = width // 2
    shapes = [(width, width)] if op == "grouped_linear" else [(2 * half, half), (half, 2 * half)]
    return tuple((torch.randn(groups, n, k) / k**0.5).to(dtype) for n, k in shapes)


def _spread(timings: dict[str, Timing]) -> float:
    """How much the samples of a cell's ways vary: the median of their interquartile ranges, as shares of the median."""
    return float(f"{statistics.median(timing.spread for timing in timings.values()):.3g}")


def _rounds(ways: dict[str, Callable[..., Any]], weights: tuple[Tensor, ...], seconds: float) -> dict[str, Timing]:
    copies = itertools.cycle(cold_copies(weights))
    timer = Interleaved(ways, arguments=lambda name, round: next(copies))
    with torch.no_grad():
        return timer.run(seconds=seconds, limit=2 * seconds)


def executor_cell(op: str, dtype: torch.dtype, rows: int, width: int, seconds: float) -> dict[str, Any]:
    """GFLOP/s of our kernels and of torch's matmul, `rows` rows in each group."""
    weights = _weights(op, _GROUPS, width, dtype)
    slots = rows * _GROUPS
    plan = dc.route(torch.arange(slots)[:, None] % _GROUPS, num_groups=_GROUPS)
    tensors = (plan.rows, plan.offsets, None, plan.row_offsets, plan.row_slots)
    x = torch.randn(slots, weights[0].shape[2]).to(dtype)

    def way(module: Any) -> Callable[..., Any]:
        def linear(w: Tensor) -> Any:
            return module.grouped_linear(x, w, None, *tensors, "none", True, True, False)

        def mlp(w_in: Tensor, w_out: Tensor) -> Any:
            return module.grouped_mlp(x, w_in, w_out, None, None, None, *tensors, "gelu", False)

        return linear if op == "grouped_linear" else mlp

    with break_even.use(Table()):  # the cpu backend answers with its own kernels
        timings = _rounds({"ours": way(cpu), "torch": way(torch_matmul)}, weights, seconds)
    gflop = 2e-9 * slots * width**2
    rates = {name: float(f"{gflop / timing.median:.4g}") for name, timing in timings.items()}
    cell = {"op": op, "dtype": str(dtype).removeprefix("torch."), "rows": rows, "weights": width**2}
    return {**cell, **rates, "spread": _spread(timings)}


def masked_cell(op: str, dtype: torch.dtype, rows: int, width: int, seconds: float) -> dict[str, Any]:
    """The density from which computing everything is faster, for x of `rows` rows; None for never."""
    weights = _weights(op, 1, width, dtype)
    x = torch.randn(rows, weights[0].shape[2]).to(dtype)
    order = torch.randperm(rows)
    plans = [dc.select(order < round(density * rows)) for density in _DENSITIES]

    def way(mode: str, plan: dc.Plan) -> Callable[..., Any]:
        def run(*weights: Tensor) -> Tensor:
            with dc.execution(mode):
                return getattr(dc, op)(x, *weights, plan=plan)

        return run

    ways = {f"{density}": way("sparse", plan) for density, plan in zip(_DENSITIES, plans, strict=True)}
    timings = _rounds({**ways, "masked": way("masked", plans[-1])}, weights, seconds)
    times = [timings[name].median for name in ways]
    limit = timings["masked"].median * MARGIN
    density = None if times[-1] <= limit else crossing(_DENSITIES, times, limit) or _DENSITIES[0]
    name = str(dtype).removeprefix("torch.")
    cell = {"op": op, "dtype": name, "rows": rows, "weights": width**2}
    return {**cell, "density": density, "spread": _spread(timings)}


def dense_cell(dtype: torch.dtype, rows: int, width: int, seconds: float) -> dict[str, Any]:
    """The density of non-zeros from which a dense product is faster than sparse_linear's lists; None for never."""
    weights = (_weights("grouped_linear", 1, width, dtype)[0][0].t(),)  # stored neuron by neuron
    x = torch.randn(rows, width)
    inputs = [(x * (torch.rand_like(x) < density)).to(dtype) for density in _NONZEROS]

    def way(h: Tensor, dense_from: float) -> Callable[[Tensor], Tensor]:
        return lambda w: cpu_sparse.sparse_linear(h, w, None, dense_from)

    ways = {f"{density}": way(h, break_even.NEVER) for density, h in zip(_NONZEROS, inputs, strict=True)}
    timings = _rounds({**ways, "dense": way(inputs[-1], 0.0)}, weights, seconds)
    times = [timings[name].median for name in ways]
    limit = timings["dense"].median
    density = None if times[-1] <= limit else crossing(_NONZEROS, times, limit) or _NONZEROS[0]
    name = str(dtype).removeprefix("torch.")
    cell = {"op": "sparse_linear", "dtype": name, "rows": rows, "weights": width**2}
    return {**cell, "density": density, "spread": _spread(timings)}


def _executor_line(cell: dict[str, Any]) -> str:
    ours, torchs = cell["ours"], cell["torch"]
    verdict = "torch" if torchs > MARGIN * ours else "ours" if ours > MARGIN * torchs else "even"
    return f"{_size(cell)} {ours:10.1f} {torchs:10.1f}  {verdict}"


def _masked_line(cell: dict[str, Any]) -> str:
    return f"{_size(cell)}  {'never' if cell['density'] is None else format(cell['density'], '.2f')}"


def _size(cell: dict[str, Any]) -> str:
    return f"{cell['op']:<15} {cell['dtype']:<9} {cell['rows']:>5} {cell['weights']:>9}"


def measure(effort: Effort) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(list of the table, cell, line to print) for every cell, as it is measured."""
    executors = []
    for op, dtype, width, rows in itertools.product(OPS, DTYPES, effort.widths, effort.rows):
        cell = executor_cell(op, dtype, rows, width, effort.seconds)
        executors.append(cell)
        yield "executors", cell, _executor_line(cell)
    with break_even.use(parse({"masked": [], "executors": executors, "dense": []})):  # skipping as it will be
        for op, dtype, width, rows in itertools.product(OPS, DTYPES, effort.masked_widths, effort.masked_rows):
            cell = masked_cell(op, dtype, rows, width, effort.seconds)
            yield "masked", cell, _masked_line(cell)
    for dtype, width, rows in itertools.product(DTYPES, effort.masked_widths, effort.rows):
        cell = dense_cell(dtype, rows, width, effort.seconds)
        yield "dense", cell, _masked_line(cell)


_HEADINGS = {
    "executors": "GFLOP/s by rows of a group and elements of its weights\n"
    "op              dtype      rows   weights       ours      torch  faster",
    "masked": "\ndensity of slots from which computing everything is faster, by rows of x and elements of the weights\n"
    "op              dtype      rows   weights  from",
    "dense": "\ndensity of non-zeros from which a dense product is faster, by rows and elements of the weights\n"
    "op              dtype      rows   weights  from",
}


def _noise(record: dict[str, Any]) -> float:
    """How much the samples of a quarter of the cells vary, at least."""
    spreads = [cell["spread"] for cells in record.values() for cell in cells]
    return statistics.quantiles(spreads, n=4, method="inclusive")[2]


def run(effort: Effort, threads: int | None = None, *, force: bool = False) -> int:
    """Measure, print, write; the exit status. Tables of other thread counts, made by the same machine, are kept. Times
    that vary as those of a busy machine do are written with `force` alone."""
    if threads is not None:
        torch.set_num_threads(threads)
    if not cpu.available:
        print(f"dyncore tune: nothing to choose from: {cpu.reason}", file=sys.stderr)
        return 1
    file, here = path(), machine()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"dyncore tune: cannot make the folder {file.parent}: {error.strerror}", file=sys.stderr)
        return 1
    for warning in timing_warnings():
        print(f"dyncore tune: warning: {warning}", file=sys.stderr)
    threads = torch.get_num_threads()
    print(f"{here['cpu']}, {here['isa']}, {threads} threads, torch {here['torch']}")
    print("(the CPU; dyncore tune --device cuda measures tilings on a CUDA device)\n")
    torch.manual_seed(0)
    record: dict[str, Any] = {"masked": [], "executors": [], "dense": []}
    heading = None
    for name, cell, line in measure(effort):
        if name != heading:
            heading = name
            print(_HEADINGS[name])
        print(line, flush=True)
        record[name].append(cell)
    noise = _noise(record)
    if noise > NOISY and not force:
        print(
            f"dyncore tune: a quarter of the times vary by {noise:.0%} and more (on a quiet machine by less than "
            f"{NOISY:.0%}): other programs are at work. Nothing was written; try again without them, or with --force",
            file=sys.stderr,
        )
        return 1
    try:
        old = read(file)
    except (OSError, ValueError):
        old = None
    kept = old.get("threads", {}) if old is not None and old.get("machine") == here else {}
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    document = {"schema": SCHEMA, "machine": here, "threads": {**kept, str(threads): {"created": created, **record}}}
    try:
        write_results(file, document)
    except OSError as error:
        print(f"dyncore tune: cannot write {file}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"\nWritten to {file}; read by every process that starts from now on and runs {threads} threads.")
    return 0

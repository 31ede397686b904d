"""`dyncore tune --device cuda`: times the tilings of the Triton kernels on a CUDA device and writes the table that
dyncore.tilings reads. Floor 5.

For each kernel, arithmetic and bucket of sizes, the built-in tiling and its rivals run in turn on data that comes from
memory. A tiling that does not fit the device, spills registers, or gives other numbers than the built-in one is left
out; the fastest of the others is taken where it is faster by more than MARGIN.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dyncore import tilings
from dyncore.backends import triton as backend
from dyncore.break_even import read
from dyncore.measure.records import write_results
from dyncore.measure.timing import InterleavedOnDevice, Timing, cold_copies

if TYPE_CHECKING:
    from dyncore.kernels.common.configs import Config, Key, Target

MARGIN = 1.02  # how much faster than the built-in tiling another must be before it is taken
_DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
# Tilings add in other orders: how far results may lie apart, as a share of the larger of a result and the RMS of all
_TOLERANCE = {"half": 5e-2, "tf32": 1e-2, "ieee": 1e-4}

_SPILLS = "spills registers"

Variants = Mapping[str, Callable[..., Any]]
Timer = Callable[[Variants, Sequence[tuple[Tensor, ...]], float], Mapping[str, Timing]]


@dataclasses.dataclass(frozen=True)
class Effort:
    """What is measured: arithmetics; for buckets by their least rows a group, the (groups, rows a group) that stand for
    them, and for buckets by their least depth, the depth; the other side of the weights; seconds for each cell."""

    arithmetics: tuple[str, ...]
    rows: Mapping[int, tuple[int, int]]
    depths: Mapping[int, int]
    columns: int = 2048
    seconds: float = 0.25


_ROWS = {1: (32, 8), 17: (32, 64), 97: (16, 256), 513: (8, 2048)}
FULL = Effort(("half", "tf32", "ieee"), _ROWS, {1: 256, 513: 1024, 1536: 4096})
QUICK = dataclasses.replace(FULL, arithmetics=("half",), seconds=0.1)


# One cell -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """A kernel's launch as the ops make it. call: (target, *tensors) -> what was written; flops: of one call."""

    call: Callable[..., list[Tensor]]
    tensors: tuple[Tensor, ...]
    flops: int


def problem(key: Key, effort: Effort, device: torch.device) -> Problem:
    from dyncore.kernels.common.product import product, slot_buffer
    from dyncore.kernels.common.product_backward import product_backward
    from dyncore.kernels.common.weight_gradient import weight_gradient

    (groups, rows), depth, n = effort.rows[key.rows], effort.depths[key.depth], effort.columns
    slots, dtype = groups * rows, _DTYPES[key.arithmetic]
    offsets = torch.arange(0, slots + 1, rows, dtype=torch.int32, device=device)
    source = torch.randperm(slots, device=device).view(groups, rows).sort(1)[0].flatten().int()
    scale = torch.rand(slots, device=device)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype) / math.sqrt(shape[-1])

    def plain(target: Target, x: Tensor, weight: Tensor) -> list[Tensor]:
        out = slot_buffer(x, slots, n)
        product(x, weight, None, scale, source, offsets, out, target=target)
        return [out]

    def gated(target: Target, x: Tensor, weight: Tensor) -> list[Tensor]:
        out = x.new_empty(slots, n)
        product(x, weight, None, None, source, offsets, out, activation="silu", gated=True, target=target)
        return [out]

    def transposed(target: Target, x: Tensor, weight: Tensor) -> list[Tensor]:
        out = slot_buffer(x, slots, n)
        product(x, weight.transpose(1, 2), None, None, None, offsets, out, target=target)
        return [out]

    def through(target: Target, grad: Tensor, weight: Tensor, pre: Tensor) -> list[Tensor]:
        out, hidden = torch.empty_like(pre), grad.new_empty(slots, n)
        pieces = product_backward(
            grad, weight.transpose(1, 2), pre, scale, source, offsets, out, hidden, activation="silu", gated=True,
            sum_rows=True, target=target,
        )  # fmt: skip
        return [out, hidden, pieces]  # of row sums, as many as a tiling has tiles of columns

    def gradient(target: Target, left: Tensor, right: Tensor) -> list[Tensor]:
        out = left.new_empty(groups, n, depth)
        weight_gradient(left, right, source, offsets, out, gather_left=False, gather_right=True, target=target)
        return [out]

    call, more, wide = {
        "product": (plain, [(groups, n, depth)], 1),
        "product_gated": (gated, [(groups, 2 * n, depth)], 2),
        "product_transposed": (transposed, [(groups, depth, n)], 1),
        "product_backward": (through, [(groups, depth, n), (slots, 2 * n)], 1),
        "weight_gradient": (gradient, [], 1),
    }[key.kernel]
    shapes = [(slots, depth), *more] if more else [(slots, n), (slots, depth)]
    return Problem(call, tuple(randn(*shape) for shape in shapes), 2 * slots * n * depth * wide)


def label(config: Config) -> str:
    return f"{config.BM}x{config.BN}x{config.BK}/{config.num_warps}/{config.num_stages}/{config.resident}"


def _spilled() -> int:
    """Spilled registers of all variants of the kernels that this process has compiled for the current device. Triton's
    interpreter compiles none; a version that keeps them elsewhere leaves spills to the clock."""
    from dyncore.kernels.common.product import product_kernel
    from dyncore.kernels.common.product_backward import product_backward_kernel
    from dyncore.kernels.common.weight_gradient import weight_gradient_kernel

    total = 0
    for kernel in (product_kernel, product_backward_kernel, weight_gradient_kernel):
        try:
            compiled = kernel.device_caches[torch.cuda.current_device()][0].values()  # pyright: ignore
            total += sum(getattr(variant, "n_spills", 0) for variant in compiled)  # none where it was never loaded
        except (AttributeError, LookupError, TypeError):
            continue
    return total


def _error(value: Tensor, right: Tensor) -> float:
    """Largest error over the larger of the right value and the RMS of all; NaN where one is NaN."""
    if value.shape != right.shape:
        value, right = value.sum(0), right.sum(0)
    value, right = value.float(), right.float()
    return float(((value - right).abs() / right.abs().clamp(min=float(right.square().mean().sqrt()))).max())


def _trial(run: Callable[[], list[Tensor]], right: list[Tensor] | None, tolerance: float) -> tuple[Any, str | None]:
    """(what was written, why it is left out)."""
    from triton.errors import TritonError

    spilled = _spilled()
    try:
        got = run()
    except torch.OutOfMemoryError:
        raise
    except (TritonError, RuntimeError) as error:  # it does not fit, or a compiler's pass fails
        if right is None and not isinstance(error, TritonError):
            raise  # not of the tiling's making
        return None, " ".join(str(error).split("Reducing")[0].split())[:80]
    if right is None:
        return got, None
    if _spilled() > spilled:
        return got, _SPILLS
    error = max(_error(a, b) for a, b in zip(got, right, strict=True))
    return got, None if error <= tolerance else f"wrong values: error {error:.1e}"


def measure_cell(
    key: Key, effort: Effort, target: Target, device: torch.device, timer: Timer, spilling: set[tuple[Any, ...]]
) -> dict[str, Any]:
    """A cell of the table: TFLOP/s of each candidate, or why it has none, and the one to take. `spilling` grows by what
    spills: a kernel that an earlier cell has compiled shows nothing new."""
    from dyncore.kernels.common.candidates import candidates

    made = problem(key, effort, device)
    configs = {label(config): config for config in candidates(target, key)}
    own = next(iter(configs))

    def way(config: Config) -> Callable[..., list[Tensor]]:
        chosen = target._replace(tuned={key: config})
        return lambda *tensors: made.call(chosen, *tensors)

    ways: dict[str, Callable[..., list[Tensor]]] = {}
    left_out: dict[str, str] = {}
    got = right = None
    for name, config in configs.items():
        run = way(config)
        got, why = _trial(lambda run=run: run(*made.tensors), right, _TOLERANCE[key.arithmetic])
        right = got if right is None else right
        compiled = (key.kernel, key.arithmetic, config)
        if why == _SPILLS:
            spilling.add(compiled)
        elif why is None and compiled in spilling:
            why = _SPILLS
        if why is None:
            ways[name] = run
        else:
            left_out[name] = why
    del got, right
    timings = timer(ways, cold_copies(made.tensors, cache_bytes=_cache(device)), effort.seconds) if ways else {}
    rates = {name: made.flops / timing.median / 1e12 for name, timing in timings.items()}
    found = {name: left_out.get(name) or float(f"{rates[name]:.4g}") for name in configs}
    return {**key._asdict(), "config": list(configs[choose(rates, own)]), "tflops": found}


def choose(rates: Mapping[str, float], own: str) -> str:
    """The fastest, but the built-in one where none is faster by more than MARGIN."""
    best = max(rates, key=lambda name: rates[name], default=own)
    return best if own not in rates or rates[best] > MARGIN * rates[own] else own


def _cache(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def on_device(ways: Variants, copies: Sequence[tuple[Tensor, ...]], seconds: float) -> Mapping[str, Timing]:
    turn = itertools.cycle(copies)
    return InterleavedOnDevice(ways, arguments=lambda name, round: next(turn)).run(seconds=seconds, limit=2 * seconds)


# All cells ------------------------------------------------------------------------------------------------------------


def cells(effort: Effort) -> Iterator[Key]:
    from dyncore.kernels.common.configs import KERNELS, Key

    sizes = itertools.product(effort.arithmetics, KERNELS, effort.rows, effort.depths)
    return (Key(kernel, arithmetic, rows, depth) for arithmetic, kernel, rows, depth in sizes)


def lines(cell: Mapping[str, Any]) -> str:
    """The cell's bucket, and a line for each candidate."""
    from dyncore.kernels.common.configs import Config

    taken = label(Config(*cell["config"]))
    heading = f"{cell['kernel']} {cell['arithmetic']}, from {cell['rows']} rows a group and a depth of {cell['depth']}"
    found = [heading]
    for name, rate in cell["tflops"].items():
        words = f"  {rate}" if isinstance(rate, str) else f"{rate:8.4g}"
        found.append(f"  {name:<20} {words}{'  taken' if name == taken else ''}")
    return "\n".join(found)


def driver() -> str:
    """The version of the device's driver, for the record."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().split("\n")[0] or "unknown"


def _kept(document: Any, here: dict[str, str]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Cells of an older table of this machine, by key."""
    from dyncore.kernels.common.configs import Key

    try:
        if document is None or document["machine"] != here:
            return {}
        tilings.parse(document)
        return {Key(*(cell[name] for name in Key._fields)): cell for cell in document["cells"]}
    except tilings.UNREADABLE:
        return {}


def run(effort: Effort, index: int = 0, timer: Timer = on_device) -> int:
    """Measure, print, write after each cell; the exit status. Cells of an older table of this machine are kept."""
    if not (torch.cuda.is_available() and backend.available):
        reason = backend.reason if torch.cuda.is_available() else "PyTorch finds no CUDA device"
        print(f"dyncore tune: no tilings to choose from: {reason}", file=sys.stderr)
        return 1
    count = torch.cuda.device_count()
    if index >= count:
        print(f"dyncore tune: expected a device below cuda:{count}, got cuda:{index}", file=sys.stderr)
        return 1
    from dyncore.kernels.common.configs import Target, device_facts

    with torch.cuda.device(index), torch.no_grad():
        facts = device_facts(index)
        return measure(
            effort,
            lambda arithmetic: Target(*facts, arithmetic == "tf32"),
            torch.device("cuda", index),
            tilings.machine(index),
            timer,
        )


def measure(
    effort: Effort, target: Callable[[str], Target], device: torch.device, here: dict[str, str], timer: Timer
) -> int:
    """`run` on a device that is there; target: by arithmetic."""
    file = tilings.path(here["device"])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        old = read(file, tilings.SCHEMA)
    except ValueError:  # of another version, or broken: replaced
        old = None
    except OSError as error:
        print(f"dyncore tune: cannot use {file}: {error.strerror}", file=sys.stderr)
        return 1
    measured = _kept(old, here)
    made_with = {"torch": torch.__version__, "driver": driver()}
    print(", ".join(f"{name} {value}" for name, value in {**here, **made_with}.items()))
    print("TFLOP/s of tilings: rows x columns x depth of a step / warps / steps in flight / programs a multiprocessor;")
    print("of each bucket the built-in one first\n")
    torch.manual_seed(0)
    spilling: set[tuple[Any, ...]] = set()
    for key in cells(effort):
        try:
            cell = measure_cell(key, effort, target(key.arithmetic), device, timer, spilling)
        except torch.OutOfMemoryError:
            print(f"{key}: not enough memory on this device: the built-in tiling stays", file=sys.stderr)
            continue
        print(lines(cell), flush=True)
        measured[key] = cell
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        document = {"schema": tilings.SCHEMA, "machine": here, "made_with": made_with, "created": created}
        try:
            write_results(file, {**document, "cells": list(measured.values())})
        except OSError as error:
            print(f"dyncore tune: cannot write {file}: {error.strerror}", file=sys.stderr)
            return 1
    print(f"\nWritten to {file}; read by every process that starts from now on.")
    return 0

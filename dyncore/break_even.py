"""Break-evens: what "auto" and the cpu backend ask before they choose between ways that give the same numbers.

`python -m dyncore tune` measures them and writes a table into the user's cache folder. It is read once, when first
asked for, and never measured implicitly; without one, or with one of another machine, the defaults below serve.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

SCHEMA = "dyncore.tune/1"
NEVER = math.inf
MARGIN = 1.05  # how much faster another way must be before it is taken

_T = TypeVar("_T")
_Kind = tuple[str, torch.dtype]  # op, dtype of x


class Grid(Generic[_T]):
    """Values at a few sizes (rows, elements of a group's weights); any other size takes the nearest one's, by ratio."""

    def __init__(self, cells: Mapping[tuple[int, int], _T]) -> None:
        if not cells:
            raise ValueError("cells: expected at least one, got none")
        self._rows = sorted({rows for rows, _ in cells})
        self._weights = sorted({weights for _, weights in cells})
        self._cells = [[cells[rows, weights] for rows in self._rows] for weights in self._weights]
        self._row_edges, self._weight_edges = _edges(self._rows), _edges(self._weights)

    def values(self) -> Iterable[_T]:
        return (value for line in self._cells for value in line)

    def at(self, rows: int, weights: int) -> _T:
        return self._cells[bisect.bisect(self._weight_edges, weights)][bisect.bisect(self._row_edges, rows)]


def _edges(sizes: Sequence[int]) -> list[float]:
    """Where the nearest of two neighbouring sizes changes."""
    return [math.sqrt(a * b) for a, b in itertools.pairwise(sizes)]


@dataclasses.dataclass(frozen=True)
class Table:
    """Break-evens at one number of threads.

    Attributes:
        masked: by (op, dtype), the density of slots, at (rows of x, weights), from which computing everything is
            faster than skipping.
        dense: by ("sparse_linear", dtype), the density of non-zeros from which a dense product is faster, at (rows,
            weights) for weights stored neuron by neuron.
        executors: by (op, dtype), GFLOP/s of (our kernels, torch's matmul) at (rows of a group, weights).
    """

    masked: Mapping[_Kind, Grid[float]] = dataclasses.field(default_factory=dict)
    executors: Mapping[_Kind, Grid[tuple[float, float]]] = dataclasses.field(default_factory=dict)
    dense: Mapping[_Kind, Grid[float]] = dataclasses.field(default_factory=dict)

    def useful(self) -> Table:
        """Without the kinds in which nothing ever changes what is done: they cost no look-up."""
        masked = {kind: grid for kind, grid in self.masked.items() if min(grid.values()) < NEVER}
        executors = {
            kind: grid
            for kind, grid in self.executors.items()
            if any(torchs > MARGIN * ours for ours, torchs in grid.values())
        }
        return Table(masked, executors, self.dense)


# Density of non-zeros from which a dense product is faster. Measured on Zen 4 with 2 threads at 64 and 512 rows, with
# weights [1024, 4096] from memory: float32 0.47 and 0.50, bfloat16 pairs 0.26 and 0.31, float16 0.46 and 0.56.
_DENSE_FROM = {torch.float32: 0.45, torch.bfloat16: 0.28, torch.float16: 0.45}
# Below so many rows, weights stored row by row are read by a dense product as fast as they can be transposed.
_FEW_ROWS = 49


@functools.cache
def _default() -> Table:
    """Ours, always; but matrix units (AMX) run a bfloat16 product at several times the rate of the vector units that
    our kernels use, which pays for gathering rows and for passes over the hidden activations from some rows a group
    on. Rates are relative, of the arithmetic alone: no machine of this project has such units."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if not capabilities.get("amx_bf16") or not torch.backends.mkldnn.is_available():
        return Table()
    large = Grid({(16, 2**14): (1.0, 0.5), (16, 2**20): (1.0, 0.5), (256, 2**14): (1.0, 0.5), (256, 2**20): (1.0, 2.0)})
    return Table(executors={(op, torch.bfloat16): large for op in ("grouped_linear", "grouped_mlp")})


# The file -------------------------------------------------------------------------------------------------------------


def path() -> Path:
    """Where the table stands: in DYNCORE_CACHE, else in dyncore/ of XDG_CACHE_HOME or of ~/.cache."""
    own = os.environ.get("DYNCORE_CACHE")
    if own:
        return Path(own) / "tune.json"
    shared = Path(os.environ.get("XDG_CACHE_HOME") or "")  # only absolute paths count, says its specification
    folder = shared if shared.is_absolute() else Path(os.path.expanduser("~/.cache"))
    return folder / "dyncore" / "tune.json"


def machine() -> dict[str, str]:
    """What a table's figures depend on, besides the number of threads."""
    import dyncore  # both import this module
    from dyncore.backends import cpu

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "cpu": str(capabilities.get("cpu_name") or platform.processor() or platform.machine()),
        "isa": cpu.isa(),
        "torch": torch.__version__,
        "dyncore": dyncore.__version__,
    }


def _grid(cells: list[dict[str, Any]], value: Any) -> dict[_Kind, Grid[Any]]:
    kinds: dict[_Kind, dict[tuple[int, int], Any]] = {}
    for cell in cells:
        dtype = getattr(torch, cell["dtype"])
        if not (cell["rows"] >= 1 and cell["weights"] >= 1 and isinstance(dtype, torch.dtype)):
            raise ValueError(f"expected positive sizes and a dtype, got {cell}")
        kinds.setdefault((cell["op"], dtype), {})[cell["rows"], cell["weights"]] = value(cell)
    return {kind: Grid(values) for kind, values in kinds.items()}


def _positive(number: float) -> float:
    if not 0 < number < math.inf:
        raise ValueError(f"expected a positive number, got {number}")
    return float(number)


def parse(record: Mapping[str, Any]) -> Table:
    """The table of a record as `tune` writes it: lists of cells. Raises ValueError, KeyError, ... on anything else."""

    def density(cell: dict[str, Any]) -> float:
        return NEVER if cell["density"] is None else _positive(cell["density"])

    def rates(cell: dict[str, Any]) -> tuple[float, float]:
        return _positive(cell["ours"]), _positive(cell["torch"])

    executors = _grid(record["executors"], rates)
    return Table(_grid(record["masked"], density), executors, _grid(record["dense"], density))


def read(file: Path, expected: str = SCHEMA) -> dict[str, Any] | None:
    """The document in `file`; None if there is no file. Raises ValueError if it is not one of the expected schema."""
    try:
        document = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != expected:
        raise ValueError(f"expected a table of schema {expected}, got {schema!r}")
    return document


def _load() -> dict[int, Table]:
    """Tables by number of threads; none, with a warning, where the file is of no use."""
    file = path()
    try:
        document = read(file)
        if document is None:
            return {}
        here, there = machine(), document["machine"]
        differing = [f"{key} {there.get(key)}, here {here[key]}" for key in here if there.get(key) != here[key]]
        if not differing:
            return {int(threads): parse(record).useful() for threads, record in document["threads"].items()}
        problem = f"was measured with {'; '.join(differing)}"
    except (OSError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError, AttributeError) as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
    warnings.warn(f"{file} {problem}: the defaults serve; python -m dyncore tune makes a new one", stacklevel=2)
    return {}


_tables: dict[int, Table] | None = None
_idle = False  # read, and nothing in it or in the defaults ever changes what is done: a call pays 0.1 us


def current() -> Table:
    """The table in force at today's number of threads."""
    global _tables, _idle
    if _tables is None:
        _tables = _load()
        _idle = not any(t.masked or t.executors or t.dense for t in (*_tables.values(), _default()))
    return _tables.get(torch.get_num_threads()) or _default()


def tuned() -> bool:
    """Whether a measured table serves today's number of threads."""
    current()
    return torch.get_num_threads() in (_tables or ())


def thread_counts() -> tuple[int, ...]:
    """The numbers of threads for which there are measured tables."""
    current()
    return tuple(sorted(_tables or ()))


@contextmanager
def use(table: Table) -> Generator[None, None, None]:
    """`table` at today's number of threads, whatever the file says; for the whole process, within the block."""
    global _tables, _idle
    before = _tables, _idle
    _tables, _idle = {torch.get_num_threads(): table.useful()}, False
    try:
        yield
    finally:
        _tables, _idle = before


# Questions ------------------------------------------------------------------------------------------------------------


def masked_from(device: str, op: str, rows: int, weights: Sequence[Tensor]) -> float:
    """Density of slots from which `op` on x of `rows` rows computes everything in "auto".

    On a CPU never, unless the table says so: with every row selected the fused kernels run at 0.97 to 1.14 times the
    speed of a plain dense layer (benchmarks/results/quick, keep ratio 1), which masked execution, with its selections
    on top, does not reach. While torch.compile traces, the table is not asked. On a CUDA device never: its kernels
    read no rows but those of slots. Elsewhere there are no kernels: at 1, where there is nothing to skip.
    """
    if device != "cpu":
        return NEVER if device == "cuda" else 1.0
    if torch.compiler.is_compiling() or _idle:  # in this order: a graph must not depend on what was read since
        return NEVER
    grid = current().masked.get((op, weights[0].dtype))
    return NEVER if grid is None else grid.at(rows, _elements(weights))


def _elements(weights: Sequence[Tensor]) -> int:
    """Of one group."""
    return sum(w.shape[1] * w.shape[2] for w in weights)


def dense_from(device: str, op: str, rows: int, weights: Sequence[Tensor]) -> float | None:
    """Density of non-zeros from which sparse `op` ("sparse_linear", "sparse_mlp") on `rows` rows makes dense products.

    weights: the last is [N, I], of the product that skips. None where no kernel skips: plain PyTorch is faster. A
    single row always skips where weights are stored neuron by neuron: they are then read at memory's speed. While
    torch.compile traces, neither the table nor the number of rows is asked: a graph must not depend on them.
    """
    down = weights[-1]
    default = _DENSE_FROM.get(down.dtype) if device == "cpu" else None
    if default is None or torch.compiler.is_compiling():
        return default
    if rows < _FEW_ROWS and down.stride(0) != 1:
        return 0.0
    if rows == 1:
        return NEVER
    grid = None if _idle else current().dense.get(("sparse_linear", down.dtype))
    return default if grid is None else grid.at(rows, down.numel())


def torch_is_faster(op: str, dtype: torch.dtype, offsets: Tensor, *weights: Tensor) -> bool:
    """Whether torch's matmul, group by group, does a whole call sooner than our kernels, by the table."""
    if _idle:
        return False
    grid = current().executors.get((op, dtype))
    if grid is None:
        return False
    bounds, size = offsets.tolist(), _elements(weights)
    ours = torchs = 0.0
    for start, end in itertools.pairwise(bounds):
        if end > start:
            our_rate, torch_rate = grid.at(end - start, size)
            ours += (end - start) / our_rate
            torchs += (end - start) / torch_rate
    return torchs * MARGIN < ours

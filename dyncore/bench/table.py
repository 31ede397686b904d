"""Records as people read them: a line while the sweep runs, a table a mechanism after it."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from dyncore.report.rivals import heading

NOISY = "~"  # after a ratio
_NOISY_ABOVE = 0.3
SPREAD = f"{NOISY}: samples of either side spread by more than {_NOISY_ABOVE:.0%} (interquartile range over median)"
_OTHERS = ("naive", "grouped_mm", "equal_flops", "csr", "own")
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
RIVALS_LINE = (
    "dense: nothing skipped (MoE: every expert); naive: index_select, linear, index_add (MoE: a loop over experts; "
    "ReLU: the neurons that are on in some row); grouped_mm: torch's own; equal FLOPs: a static MLP of equal FLOPs; "
    "CSR: torch.sparse; own dense: dyncore, nothing skipped"
)


def shape_text(record: dict[str, Any]) -> str:
    return " ".join(f"{letter}={size}" for letter, size in record["shape"].items())


def _input(record: dict[str, Any]) -> str:
    units = record.get("granularity", "row")
    return str(record["input"]) + ("" if units == "row" else f" by {units}")


def _dtype(record: dict[str, Any]) -> str:
    dtype: str = record["dtype"]
    return _DTYPES.get(dtype, dtype)


def _phase(record: dict[str, Any]) -> str:
    return "fwd" if record["phase"] == "forward" else "fwd+bwd"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _gflop(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.3g}"


def _ratio(record: dict[str, Any], value: float | None, rival: str) -> str:
    """A ratio of two times, marked where the samples of either spread widely."""
    spreads = [record["variants"][name]["spread"] for name in ("dyncore", rival) if name in record["variants"]]
    mark = NOISY if value is not None and max(spreads) > _NOISY_ABOVE else ""
    return _number(value) + mark


def milliseconds(variant: dict[str, Any] | None) -> str:
    if variant is None:
        return "-"
    ms = variant["median_ms"]
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"


def cells(record: dict[str, Any]) -> list[str]:
    """The row of a record, in the order of COLUMNS."""
    variants, against, flops = record["variants"], record["against"], record["flops"]
    return [
        record["mechanism"],
        _input(record),
        shape_text(record),
        _dtype(record),
        _phase(record),
        f"{record['keep_ratio']:.3g}",
        _gflop(flops["executed"]),
        _gflop(flops["dense"]),
        f"{milliseconds(variants['dyncore'])} ±{variants['dyncore']['spread']:.0%}",
        milliseconds(variants.get("dense")),
        milliseconds(variants.get("naive")),
        _number(record["flop_speedup"]),
        _ratio(record, record["wall_clock_speedup"], "dense"),
        _ratio(record, record["se"], "dense"),
        *(_ratio(record, against.get(name), name) for name in _OTHERS),
    ]


COLUMNS = [
    "mechanism",
    "input",
    "shape",
    "dtype",
    "pass",
    "keep",
    "GFLOP",
    "dense GFLOP",
    "ms",
    "dense ms",
    "naive ms",
    "FLOPs x",
    "time x",
    "SE",
    *(f"vs {heading(name)}" for name in _OTHERS),
]


_TEXTS = ("input", "shape", "dtype", "pass")
_SPEEDUPS = ("time x", *(column for column in COLUMNS if column.startswith("vs ")))


def _shown(column: str, text: str) -> str:
    """A cell; speed-ups: at a glance, which are gains."""
    if column not in _SPEEDUPS or text == "-":
        return text
    return f"[{'green' if float(text.rstrip(NOISY)) >= 1 else 'red'}]{text}[/]"


def _table(mechanism: str, records: list[dict[str, Any]]) -> Table:
    rows = [dict(zip(COLUMNS, cells(record), strict=True)) for record in records]
    columns = [name for name in COLUMNS if name != "mechanism" and any(row[name] != "-" for row in rows)]
    table = Table(title=mechanism, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        # headings are broken at spaces; a narrow terminal breaks shapes too, never a number
        is_shape = column == "shape"
        table.add_column(
            column.replace(" ", "\n"),
            justify="left" if column in _TEXTS else "right",
            no_wrap=not is_shape,
            min_width=14 if is_shape else None,
        )
    for row in rows:
        table.add_row(*(_shown(column, row[column]) for column in columns))
    return table


def render(records: list[dict[str, Any]]) -> list[Table]:
    """A table of each mechanism, without the columns that are empty there; the last one's caption explains them.

    FLOPs x, time x and SE are against dense; "vs" are wall-clock speed-ups.
    """
    mechanisms = dict.fromkeys(record["mechanism"] for record in records)
    tables = [_table(name, [r for r in records if r["mechanism"] == name]) for name in mechanisms]
    caption = "FLOPs x, time x: speed-ups against dense; SE = time x / FLOPs x; vs: wall-clock speed-up against a rival"
    tables[-1].caption = f"{caption}\n{RIVALS_LINE}\n{SPREAD}"
    return tables


def one_point(record: dict[str, Any]) -> str:
    """Which point a record is of."""
    return (
        f"{record['mechanism']} {_input(record)} {shape_text(record)} {_dtype(record)} "
        f"{_phase(record)} keep {record['keep_ratio']:.3g}"
    )


def one_line(record: dict[str, Any]) -> str:
    """What is printed when a point is done."""
    against = ", ".join(f"{x:.2f}x {heading(name)}" for name, x in record["against"].items())
    return f"{one_point(record)}: {milliseconds(record['variants']['dyncore'])} ms, {against}"

"""Plots of a sweep, in a light and a dark version: speed-up against FLOPs saved, time against keep ratio, rivals,
speed-up against the sparsity of a ReLU's output."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from dyncore.bench.relu_sparsity import DOWN, GATED, MLP
from dyncore.bench.table import RIVALS, shape_text
from dyncore.measure.figures import THEMES, legend, new_figure, style
from dyncore.measure.savings import break_even

# Okabe and Ito: told apart by readers who see few colours, on either paper.
COLOURS = {
    "dyncore": "#0a84d0",
    "dense": "#8c959f",
    "naive": "#e69f00",
    "grouped_mm": "#cc79a7",
    "equal_flops": "#009e73",
    "csr": "#cc79a7",
    "own": "#009e73",
}
_MARKERS = {"token-skipping": "o", "moe": "s", DOWN: "^", MLP: "v", GATED: "D"}
_RELU = (DOWN, MLP, GATED)
_RATIOS = tuple(2.0**i for i in range(-4, 8))  # ticks
_Records = list[dict[str, Any]]


def _plain(value: float, _: object = None) -> str:
    return f"{value:g}"


def speedup_plot(records: _Records, theme: str) -> Figure | None:
    """Wall-clock speed-up against FLOP speed-up, both over dense; on the line y = x each saved FLOP saved its time."""
    points = [r for r in records if r["flop_speedup"]]
    if not points:
        return None
    figure = new_figure(6.4, 6.0, theme)
    axes = figure.subplots()
    for mechanism in dict.fromkeys(r["mechanism"] for r in points):
        of = [r for r in points if r["mechanism"] == mechanism]
        x = [r["flop_speedup"] for r in of]
        marker = _MARKERS.get(mechanism, "^")
        ours = [r["wall_clock_speedup"] for r in of]
        axes.scatter(x, ours, marker=marker, color=COLOURS["dyncore"], label=f"{mechanism}: dyncore", zorder=3)
        naive = [
            (r["flop_speedup"], r["variants"]["dense"]["median_ms"] / r["variants"]["naive"]["median_ms"])
            for r in of
            if "naive" in r["variants"]
        ]
        hollow = {"facecolors": "none", "edgecolors": COLOURS["naive"], "marker": marker}
        axes.scatter(*zip(*naive, strict=True), label=f"{mechanism}: naive PyTorch", **hollow) if naive else None
    low = min(1.0, *(r["wall_clock_speedup"] for r in points)) * 0.8
    high = max(2.0, *(max(r["flop_speedup"], r["wall_clock_speedup"]) for r in points)) * 1.25
    axes.plot(
        [low, high], [low, high], color=THEMES[theme][1], linewidth=1, label="y = x: each saved FLOP saves its time"
    )
    axes.axhline(1, color=THEMES[theme][1], linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="FLOP speed-up over dense", ylabel="wall-clock speed-up over dense")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_plain))
        axis.set_ticks([t for t in _RATIOS if low <= t <= high])
        axis.set_minor_locator(NullLocator())
    axes.set(xlim=(0.9, high), ylim=(low, high))
    style(axes, theme)
    legend(axes, theme)
    return figure


def _curves(records: _Records) -> dict[tuple[str, ...], _Records]:
    """Records that differ in keep ratio alone, three at least: title -> records, by keep ratio. ReLU has its own."""
    curves: dict[tuple[str, ...], _Records] = {}
    for r in (r for r in records if r["mechanism"] not in _RELU):
        key = (r["mechanism"], r["input"], shape_text(r), r["dtype"], r["phase"])
        curves.setdefault(key, []).append(r)
    ordered = {key: sorted(of, key=lambda r: r["keep_ratio"]) for key, of in curves.items()}
    return {key: of for key, of in ordered.items() if len({r["keep_ratio"] for r in of}) >= 3}


def _curve(axes: Axes, title: str, records: _Records, theme: str) -> None:
    keep = [r["keep_ratio"] for r in records]
    for name in ("dense", "naive", "dyncore"):
        of = [r for r in records if name in r["variants"]]
        times = [r["variants"][name]["median_ms"] for r in of]
        axes.plot(
            [r["keep_ratio"] for r in of], times, marker="o", color=COLOURS[name], label=RIVALS.get(name, (name,))[0]
        )
    dense = [r["variants"]["dense"]["median_ms"] for r in records]
    relative = [r["variants"]["dyncore"]["median_ms"] / d for r, d in zip(records, dense, strict=True)]
    at = break_even(keep, relative, 1.0)
    if max(relative) <= 1:  # no crossing, though break_even names the last point
        axes.plot([], [], " ", label="faster than dense at each point")
    elif at is not None:
        label = f"faster than dense up to keep {at:.2f}"
        axes.axvline(at, color=COLOURS["dyncore"], linestyle="--", linewidth=1, label=label)
    else:
        axes.plot([], [], " ", label="slower than dense at each point")
    axes.set(xlabel="keep ratio", ylabel="ms", xlim=(0, 1.04), ylim=(0, 1.15 * max(dense)))
    axes.set_title(title, fontsize=9)
    style(axes, theme)
    legend(axes, theme)


def keep_plot(records: _Records, theme: str) -> Figure | None:
    """Time against keep ratio, with the break-even marked: one panel for each shape with three ratios or more."""
    curves = _curves(records)
    if not curves:
        return None
    figure = new_figure(6.4, 3.8 * len(curves), theme)  # one column: readable on a phone
    panels = figure.subplots(len(curves), squeeze=False).flatten()
    for axes, ((mechanism, _, shape, dtype, phase), of) in zip(panels, curves.items(), strict=True):
        _curve(axes, f"{mechanism}, {shape}, {dtype}, {phase}", of, theme)
    return figure


def moe_plot(records: _Records, theme: str) -> Figure | None:
    """Speed-up of dyncore over each rival at every mixture-of-experts point; left of 1 the rival is faster."""
    points = [r for r in records if r["mechanism"] == "moe"]
    if not points:
        return None
    figure = new_figure(7.2, 0.62 * len(points) + 1.4, theme)
    axes = figure.subplots()
    names = [name for name in RIVALS if any(name in r["against"] for r in points)]
    for i, name in enumerate(names):
        of = [(j, r["against"][name]) for j, r in enumerate(points) if name in r["against"]]
        places = [j + (i - (len(names) - 1) / 2) * 0.19 for j, _ in of]
        axes.barh(
            places, [x - 1 for _, x in of], left=1, height=0.17, color=COLOURS[name], label=f"over {RIVALS[name][0]}"
        )
    labels = [f"{r['input']}, {r['dtype']}, {r['phase']}\n{shape_text(r)}" for r in points]
    axes.set_yticks(range(len(points)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color=THEMES[theme][1], linewidth=1)
    axes.set(xscale="log", xlabel="wall-clock speed-up of dyncore")
    low, high = axes.get_xlim()
    axes.set_xticks([t for t in _RATIOS if low <= t <= high])
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.xaxis.set_minor_locator(NullLocator())
    style(axes, theme)
    paper, ink, _ = THEMES[theme]
    figure.legend(loc="outside upper center", ncols=4, facecolor=paper, edgecolor=paper, labelcolor=ink, fontsize=8)
    return figure


_STYLES = {"uniform": ("-", "o"), "beta": ("--", "s"), "recorded": ("", "*")}  # line and marker by input


def _relu_lines(axes: Axes, records: _Records, theme: str) -> None:
    """Speed-ups over dense PyTorch: ours for each kind of mask, the rivals' for uniform ones."""
    uniform = sorted((r for r in records if r["input"] == "uniform"), key=lambda r: r["keep_ratio"])
    most = [(r["keep_ratio"], r["flop_speedup"]) for r in uniform if r["flop_speedup"]]
    axes.plot(*zip(*most, strict=True), color=THEMES[theme][1], linewidth=1, linestyle=":", label="FLOP speed-up")
    for name in ("own", "csr", "naive"):
        of = [r for r in uniform if name in r["variants"]]
        speedups = [r["wall_clock_speedup"] / r["against"][name] for r in of]
        keep = [r["keep_ratio"] for r in of]
        axes.plot(keep, speedups, marker=".", color=COLOURS[name], linewidth=1, label=RIVALS[name][0]) if of else None
    for kind, (line, marker) in _STYLES.items():
        of = sorted((r for r in records if r["input"] == kind), key=lambda r: r["keep_ratio"])
        keep, speedups = [r["keep_ratio"] for r in of], [r["wall_clock_speedup"] for r in of]
        form: dict[str, Any] = {"linestyle": line, "marker": marker, "color": COLOURS["dyncore"], "zorder": 3}
        axes.plot(keep, speedups, label=f"dyncore, {kind} mask", **form) if of else None


def _relu_panel(axes: Axes, title: str, records: _Records, theme: str) -> None:
    _relu_lines(axes, records, theme)
    uniform = sorted((r for r in records if r["input"] == "uniform"), key=lambda r: r["keep_ratio"])
    relative = [1 / r["wall_clock_speedup"] for r in uniform]
    at = break_even([r["keep_ratio"] for r in uniform], relative, 1.0)
    if max(relative) <= 1:
        where = "faster than dense at each point"
    elif at is None:
        where = "slower than dense at each point"
    else:
        where = f"faster than dense from {1 - at:.0%} zeros on"
        axes.axvline(at, color=COLOURS["dyncore"], linestyle="--", linewidth=1)
    axes.axhline(1, color=COLOURS["dense"], linewidth=1)
    axes.set(xscale="log", yscale="log")
    axes.invert_xaxis()
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 1 / 16), high)  # a rival below that has lost, and would flatten the others
    axes.set_xticks([r["keep_ratio"] for r in uniform], [f"{1 - r['keep_ratio']:.0%}" for r in uniform])
    axes.set_yticks([t for t in _RATIOS if max(low, 1 / 16) <= t <= high])
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.set_title(f"{title}: {where}", fontsize=9)
    axes.set(xlabel="zeros", ylabel="speed-up over dense PyTorch")
    style(axes, theme)


def relu_plot(records: _Records, theme: str) -> Figure | None:
    """Speed-up against sparsity, the break-even marked: a row of panels for each job, a column for each dtype."""
    panels: dict[tuple[str, str, str], dict[str, _Records]] = {}
    for r in (r for r in records if r["mechanism"] in _RELU):
        job = panels.setdefault((r["mechanism"], shape_text(r), r["phase"]), {})
        job.setdefault(r["dtype"], []).append(r)
    drawn = {
        job: {dtype: of for dtype, of in dtypes.items() if any(r["input"] == "uniform" for r in of)}
        for job, dtypes in panels.items()
    }
    drawn = {job: dtypes for job, dtypes in drawn.items() if dtypes}
    if not drawn:
        return None
    columns = sorted({dtype for dtypes in drawn.values() for dtype in dtypes}, reverse=True)
    figure = new_figure(4.4 * len(columns), 3.4 * len(drawn) + 0.6, theme)
    grid = figure.subplots(len(drawn), len(columns), squeeze=False)
    for line, ((mechanism, shape, phase), dtypes) in zip(grid, drawn.items(), strict=True):
        for axes, dtype in zip(line, columns, strict=True):
            if dtype in dtypes:
                _relu_panel(axes, f"{mechanism}, {shape}, {phase}\n{dtype}", dtypes[dtype], theme)
            else:
                axes.set_visible(False)
    entries = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    paper, ink, _ = THEMES[theme]
    form = {"facecolor": paper, "edgecolor": paper, "labelcolor": ink, "fontsize": 8}
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=4, **form)
    return figure


PLOTS: dict[str, tuple[str, Callable[[_Records, str], Figure | None]]] = {
    "speedup": ("Wall-clock speed-up against FLOP speed-up", speedup_plot),
    "keep": ("Time against keep ratio, and the break-even", keep_plot),
    "moe": ("Mixture of experts against its rivals", moe_plot),
    "relu": ("ReLU sparsity: speed-up against zeros, and the break-even", relu_plot),
}


def write_plots(folder: Path, records: _Records) -> dict[str, bytes]:
    """Write <name>.png and <name>-dark.png for every plot that has data; name -> PNG."""
    written = {}
    for name, (_, plot) in PLOTS.items():
        for theme in THEMES:
            figure = plot(records, theme)
            if figure is not None:
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
                written[name + theme] = buffer.getvalue()
                (folder / f"{name}{theme}.png").write_bytes(written[name + theme])
    return written

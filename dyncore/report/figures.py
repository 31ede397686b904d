"""The figures of a report, each of what the documents hold for it, None where that is nothing. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from dyncore.measure.figures import THEMES, legend, new_figure, style
from dyncore.measure.savings import break_even
from dyncore.report.axes import COLOURS, WIDTH, plain, ratios
from dyncore.report.documents import Comparison, Document, by_mechanism, compared, curves
from dyncore.report.rankings import rank_figure
from dyncore.report.rivals import patterns_figure, rivals_figure, zeros_figure

_INK = THEMES[""][1]
_NAMED = 6  # curves of a panel that a legend names; of more only their number is said
_PANELS = 12
_LAYERS = 8
_BINS = 20
STAGES = ("deciding", "compacting", "gathering", "computing", "scattering")


def speedup_figure(documents: Sequence[Document]) -> Figure | None:
    """Wall clock against FLOPs, both over computing everything."""
    points = [c for c in compared(documents) if c.flop_speedup and c.speedup]
    if not points:
        return None
    groups = by_mechanism(points)
    figure = new_figure(WIDTH, 5.2 + 0.12 * len(groups), "")
    axes = figure.subplots()
    for i, (mechanism, of) in enumerate(groups.items()):
        x, y = [c.flop_speedup or 0.0 for c in of], [c.speedup or 0.0 for c in of]
        marker = "os^vDPX*"[i // len(COLOURS) % 8]
        axes.scatter(x, y, s=18, marker=marker, color=COLOURS[i % len(COLOURS)], label=mechanism, zorder=3)
    naive = [(c.flop_speedup or 0.0, c.ms[c.baseline] / c.ms["naive"]) for c in points if "naive" in c.ms]
    hollow: dict[str, Any] = {"s": 18, "facecolors": "none", "edgecolors": COLOURS[6], "label": "naive PyTorch"}
    axes.scatter(*zip(*naive, strict=True), **hollow) if naive else None
    values = [v for c in points for v in (c.flop_speedup, c.speedup) if v]
    low, high = min(0.9, *values) * 0.9, max(2.0, *values) * 1.15
    axes.plot([low, high], [low, high], color=_INK, linewidth=1, label="y = x: each saved FLOP saves its time")
    axes.axhline(1, color=_INK, linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log")
    axes.set(xlim=(min(0.9, *(c.flop_speedup or 1 for c in points)), high), ylim=(low, high))
    axes.set(xlabel="FLOP speed-up", ylabel="wall-clock speed-up")
    ratios(axes, "x")
    ratios(axes, "y")
    style(axes, "")
    legend(axes, "")
    return figure


def _panel(axes: Axes, mechanism: str, lines: list[list[Comparison]]) -> None:
    names = [f"{of[0].name}, {of[0].dtype}" + ("" if of[0].phase == "forward" else ", backward") for of in lines]
    edges: list[float] = []
    for i, of in enumerate(lines):
        keep, relative = [c.keep or 0.0 for c in of], [1 / (c.speedup or 1) for c in of]
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(
            keep, relative, marker=".", linewidth=1, color=colour, label=names[i] if len(lines) <= _NAMED else None
        )
        edge = break_even(keep, relative, 1.0)
        if edge is not None and max(relative) > 1:
            axes.plot([edge], [1], marker="|", markersize=12, color=colour)
        edges.append(0.0 if edge is None else 1.0 if max(relative) <= 1 else edge)
    axes.axhline(1, color=_INK, linewidth=1, linestyle="--", label="computing everything")
    axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":", label="as much as is kept")
    least, most = min(edges), max(edges)
    if least == most:
        said = {0.0: "slower everywhere", 1.0: "faster everywhere"}.get(least, f"break-even at {least:.2f}")
    else:
        said = f"break-even from {least:.2f} to {most:.2f}"
    count = "" if len(lines) <= _NAMED else f", {len(lines)} curves"
    axes.set_title(f"{mechanism}{count}: {said}", fontsize=9)
    axes.set(xlabel="keep ratio", ylabel="time over computing everything", xlim=(0, 1.02))
    axes.set_ylim(0, min(2.0, max(1.1, *(1.05 / (c.speedup or 1) for of in lines for c in of))))
    style(axes, "")
    legend(axes, "")


def keep_figure(documents: Sequence[Document]) -> Figure | None:
    """Time against keep ratio, with the break-even: a panel for each mechanism."""
    found = curves(compared(documents), sparse=False)
    mechanisms = list(dict.fromkeys(key[0] for key in found))[:_PANELS]
    if not mechanisms:
        return None
    groups = [[of for key, of in found.items() if key[0] == mechanism] for mechanism in mechanisms]
    figure = new_figure(WIDTH, 3.9 * len(mechanisms), "")
    panels = figure.subplots(len(mechanisms), squeeze=False).flatten()
    for axes, mechanism, lines in zip(panels, mechanisms, groups, strict=True):
        _panel(axes, mechanism, lines)
    return figure


def _roof(points: Sequence[Comparison]) -> tuple[float, float, str]:
    """GFLOP/s, GB/s, and where they are from."""
    measured = [c.ceilings for c in points if c.ceilings is not None]
    if measured:
        return max(peak for peak, _ in measured), max(stream for _, stream in measured), "measured beside"
    rates = [c.executed / c.ms["dyncore"] / 1e6 for c in points if c.executed]
    dense = [c.dense / c.ms["dense"] / 1e6 for c in points if c.dense and "dense" in c.ms]
    stream = max((c.bytes or 0.0) / c.ms["dyncore"] / 1e6 for c in points)
    return max([*rates, *dense]), stream, "highest here"


def roofline_figure(documents: Sequence[Document]) -> Figure | None:
    """Rate against FLOPs per byte; the roof is what was measured beside the points, else the fastest among them."""
    points = [c for c in compared(documents) if c.bytes and c.executed]
    if not points:
        return None
    figure = new_figure(WIDTH, 4.8, "")
    axes = figure.subplots()
    intensities = [(c.executed or 0) / (c.bytes or 1) for c in points]
    low, high = min(intensities) / 1.5, max(intensities) * 1.5
    for i, dtype in enumerate(dict.fromkeys(c.dtype for c in points)):
        of = [c for c in points if c.dtype == dtype]
        colour = COLOURS[i % len(COLOURS)]
        x = [(c.executed or 0) / (c.bytes or 1) for c in of]
        rates = [(c.executed or 0) / c.ms["dyncore"] / 1e6 for c in of]
        axes.scatter(x, rates, s=18, color=colour, label=f"dyncore, {dtype}", zorder=3)
        peak, stream, what = _roof(of)
        corner = peak / stream
        roof = [low, max(low, corner), max(high, corner)]
        label = f"{what}: {peak:.0f} GFLOP/s, {stream:.0f} GB/s"
        axes.plot(roof, [min(peak, stream * v) for v in roof], color=colour, linewidth=1, label=label)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must be moved", ylabel="GFLOP/s")
    axes.set_xlim(low, high)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(plain))
        axis.set_minor_locator(NullLocator())
    style(axes, "")
    legend(axes, "")
    return figure


def stages_figure(documents: Sequence[Document]) -> Figure | None:
    """Shares of time by stage, a bar for each comparison that knows them."""
    points = [c for c in compared(documents) if c.stages]
    if not points:
        return None
    points = points[:30]
    figure = new_figure(WIDTH, 1.6 + 0.32 * len(points), "")
    axes = figure.subplots()
    names = [n for n in STAGES if any(n in c.stages for c in points)]
    names += sorted({n for c in points for n in c.stages if n not in STAGES})
    left = [0.0] * len(points)
    for i, name in enumerate(names):
        totals = [sum(c.stages.values()) or 1.0 for c in points]
        shares = [c.stages.get(name, 0.0) / total for c, total in zip(points, totals, strict=True)]
        axes.barh(range(len(points)), shares, left=left, color=COLOURS[i % len(COLOURS)], label=name)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_yticks(range(len(points)), [c.name for c in points], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of time")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    style(axes, "")
    legend(axes, "")
    return figure


def _rates(record: dict[str, Any]) -> list[float]:
    """Histogram of neurons by the share of tokens on which they fire, from 101 quantiles."""
    quantiles: list[float] = record["neuron_rate_quantiles"]
    counts = [0.0] * _BINS
    for value in quantiles:
        counts[min(_BINS - 1, int(value * _BINS))] += 1 / len(quantiles)
    return counts


def _histogram(axes: Axes, rows: list[tuple[str, list[float]]], what: str, of: str) -> None:
    for i, (name, counts) in enumerate(rows):
        total = sum(counts) or 1.0
        edges = [j / len(counts) for j in range(len(counts) + 1)]
        colour = COLOURS[i % len(COLOURS)]
        axes.stairs([c / total for c in counts], edges, color=colour, label=name, fill=len(rows) == 1)
    axes.set(xlabel=what, ylabel=f"share of {of}", xlim=(0, 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    style(axes, "")
    legend(axes, "")


def sparsity_figure(documents: Sequence[Document]) -> Figure | None:
    """Histograms of zeros: of tokens by their share of zeros, of neurons by how often they fire."""
    zeros = [record for document in documents for record in document.zeros]
    layers = zeros if len(zeros) <= _LAYERS else [zeros[i * len(zeros) // _LAYERS] for i in range(_LAYERS)]
    tokens = [(str(r["layer"]), [float(n) for n in r["histogram"]]) for r in layers if r.get("histogram")]
    neurons = [(str(r["layer"]), _rates(r)) for r in layers if r.get("neuron_rate_quantiles")]
    panels = [(tokens, "zeros of a token", "tokens"), (neurons, "share of tokens on which it fires", "neurons")]
    panels = [panel for panel in panels if panel[0]]
    if not panels:
        return None
    figure = new_figure(WIDTH, 3.6 * len(panels), "")
    for axes, (rows, what, of) in zip(figure.subplots(len(panels), squeeze=False).flatten(), panels, strict=True):
        _histogram(axes, rows, what, of)
    return figure


# name -> (title, what is to be seen, figure)
FIGURES: dict[str, tuple[str, str, Callable[[Sequence[Document]], Figure | None]]] = {
    "speedup": (
        "Wall clock against FLOPs",
        "Speed-ups over computing everything. On the line every saved FLOP saved its time; below it some was lost.",
        speedup_figure,
    ),
    "keep": (
        "Time against what is kept",
        "Time over that of computing everything. Under the dashed line skipping is faster; | marks the break-even.",
        keep_figure,
    ),
    "zeros": (
        "Speed-up against what is left out",
        "Over computing everything, where next to nothing stays: zeros of a ReLU.",
        zeros_figure,
    ),
    "patterns": (
        "Which rows are kept",
        "The same number of rows, kept in other patterns, by the row, by tiles or by whole samples; | the median.",
        patterns_figure,
    ),
    "rivals": (
        "Against each rival",
        "Wall-clock speed-ups of dyncore, a dot for each point; right of the dashed line it is faster.",
        rivals_figure,
    ),
    "roofline": (
        "Roofline",
        "Executed FLOPs a second, against FLOPs per byte that a call must move. The roof is a matrix product and a "
        "copy measured beside the points, or else the highest rate that these files hold.",
        roofline_figure,
    ),
    "stages": ("Where the time goes", "Shares of time by stage.", stages_figure),
    "sparsity": (
        "Zeros of activations",
        "Which tokens have many zeros, and which neurons fire often.",
        sparsity_figure,
    ),
    "ranks": (
        "Rank against rank",
        "Each example by the compute that two methods spend on it, from least to most.",
        rank_figure,
    ),
}

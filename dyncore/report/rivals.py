"""Rivals: what they are called, and dyncore against each of them in two figures. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dyncore.measure.figures import THEMES, legend, new_figure, style
from dyncore.measure.savings import break_even
from dyncore.report.axes import COLOURS, WIDTH, ratios
from dyncore.report.documents import Comparison, Document, by_mechanism, compared, curves

_INK = THEMES[""][1]
_PANELS = 12
_OWN = ("dyncore", "own")
_BASE = "iid"  # the pattern that others are compared with
_LEAST = 1 / 16  # speed-ups below it would flatten the others

RIVALS: dict[str, tuple[str, str]] = {  # record name -> (heading, what it is)
    "dense": ("dense", "the same layer without skipping; for MoE, every expert on every row"),
    "now": ("the layer now", "the layer as the audited model has it; one of dyncore's in masked execution"),
    "masked": ("masked", "every row computed, then multiplied by 0 or 1: what most published code does"),
    "naive": (
        "naive",
        "PyTorch as one writes it: index_select, linear, index_add; for MoE, a loop over the experts; for ReLU, "
        "index_select of the neurons that are on in some row",
    ),
    "grouped_mm": ("grouped_mm", "torch.nn.functional.grouped_mm on gathered rows"),
    "equal_flops": ("equal FLOPs", "a static dense MLP of equal active FLOPs, another function"),
    "smaller": ("smaller", "a static dense network of equal FLOPs, another function"),
    "csr": ("CSR", "torch.sparse: the activations compressed on each call, and its product with the weights"),
    "own": ("own dense", "dyncore's own kernels with nothing skipped"),
}


def heading(rival: str) -> str:
    """What a rival is called in tables and figures."""
    return RIVALS[rival][0] if rival in RIVALS else rival.replace("_", " ")


def rivals_of(points: Sequence[Comparison]) -> list[str]:
    """Those that took part: the known ones first."""
    found = dict.fromkeys(name for c in points for name in c.against)
    return [*(name for name in RIVALS if name in found), *(name for name in found if name not in RIVALS)]


def rivals_figure(documents: Sequence[Document]) -> Figure | None:
    """Wall-clock speed-ups of dyncore over each rival, a dot for each point, a panel for each mechanism."""
    points = [c for c in compared(documents) if not c.forced]
    groups = {m: of for m, of in by_mechanism(points).items() if len(rivals_of(of)) > 1}
    groups = dict(list(groups.items())[:_PANELS])
    if not groups:
        return None
    lines = [len(rivals_of(of)) for of in groups.values()]
    figure = new_figure(WIDTH, sum(0.36 * n + 0.75 for n in lines), "")
    panels = figure.subplots(len(groups), squeeze=False, height_ratios=[n + 1 for n in lines]).flatten()
    for axes, (mechanism, of) in zip(panels, groups.items(), strict=True):
        _dots(axes, mechanism, of)
    return figure


def _dots(axes: Axes, mechanism: str, points: list[Comparison]) -> None:
    names = rivals_of(points)
    labels: list[str] = []
    for i, name in enumerate(names):
        speedups = [c.against[name] for c in points if name in c.against]
        middle = statistics.median(speedups)
        shown = [max(s, _LEAST) for s in speedups]
        axes.scatter(shown, [i] * len(shown), s=18, alpha=0.5, color=COLOURS[i % len(COLOURS)], zorder=3)
        axes.plot([middle] * 2, [i - 0.3, i + 0.3], color=_INK, linewidth=1.5)
        labels.append(f"{heading(name)}: {middle:.2f}x")
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axvline(1, color=_INK, linewidth=0.8, linestyle="--")
    axes.set(xscale="log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9), max(high, 1.1))
    ratios(axes, "x")
    axes.set_title(f"{mechanism}: speed-up over each, | the median", fontsize=9)
    style(axes, "")


def _patterned(points: Sequence[Comparison]) -> dict[str, list[float]]:
    """Times over that of as many independent rows of the same size, by the pattern in which rows were kept."""

    def size(c: Comparison) -> tuple[Any, ...]:
        return (c.mechanism, c.shape, c.dtype, c.phase, None if c.keep is None else round(c.keep, 6), c.source)

    base = {size(c): c.ms["dyncore"] for c in points if c.input == _BASE}
    found: dict[str, list[float]] = {}
    for c in points:
        if size(c) in base:
            found.setdefault(c.input, []).append(c.ms["dyncore"] / base[size(c)])
    return found


def patterns_figure(documents: Sequence[Document]) -> Figure | None:
    """What the pattern of kept rows and its granularity cost, a dot for each size and keep ratio."""
    found = _patterned(compared(documents))
    if len(found) < 2:
        return None
    figure = new_figure(WIDTH, 0.36 * len(found) + 1.0, "")
    axes = figure.subplots()
    for i, times in enumerate(found.values()):
        axes.scatter(times, [i] * len(times), s=18, alpha=0.5, color=COLOURS[0], zorder=3)
        axes.plot([statistics.median(times)] * 2, [i - 0.3, i + 0.3], color=_INK, linewidth=1.5)
    axes.set_yticks(range(len(found)), list(found), fontsize=8)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.axvline(1, color=_INK, linewidth=0.8, linestyle="--")
    axes.set_xlabel("time over that of as many independent rows")
    style(axes, "")
    return figure


def _kinds(points: Sequence[Comparison]) -> dict[tuple[str, ...], dict[tuple[str, str], list[Comparison]]]:
    """Of each mechanism, shape and phase that has a curve of points of which little stays: points by dtype and input,
    by keep ratio."""

    def kind(c: Comparison) -> tuple[str, ...]:
        return (c.mechanism, c.shape, c.phase, c.source)

    found: dict[tuple[str, ...], dict[tuple[str, str], list[Comparison]]] = {
        kind(of[0]): {} for of in curves(points, sparse=True).values()
    }
    for c in sorted((c for c in points if kind(c) in found and c.keep and c.speedup), key=lambda c: c.keep or 0.0):
        found[kind(c)].setdefault((c.dtype, c.input), []).append(c)
    return found


def zeros_figure(documents: Sequence[Document]) -> Figure | None:
    """Speed-up against the share that is left out, on an axis that has room where little stays."""
    panels = dict(list(_kinds(compared(documents)).items())[:_PANELS])
    if not panels:
        return None
    figure = new_figure(WIDTH, 3.9 * len(panels), "")
    axes_of = figure.subplots(len(panels), squeeze=False).flatten()
    for axes, ((mechanism, shape, phase, _), lines) in zip(axes_of, panels.items(), strict=True):
        title = f"{mechanism} {shape}" + ("" if phase == "forward" else ", forward and backward")
        _zeros(axes, title, lines)
    return figure


def _zeros(axes: Axes, title: str, lines: dict[tuple[str, str], list[Comparison]]) -> None:
    dtypes = list(dict.fromkeys(dtype for dtype, _ in lines))
    sources = list(dict.fromkeys(source for _, source in lines))
    forms = {source: ("-", "--", "-.", ":")[min(i, 3)] for i, source in enumerate(sources)}
    rivals_drawn: set[str] = set()
    for (dtype, source), of in lines.items():
        colour = COLOURS[dtypes.index(dtype) % len(COLOURS)]
        keep = [c.keep or 0.0 for c in of]
        speedups = [c.speedup or 0.0 for c in of]
        form: dict[str, Any] = {"color": colour, "marker": "." if len(of) > 1 else "*", "linestyle": forms[source]}
        axes.plot(keep, speedups, label=f"{source}, {dtype}: {_edge(keep, speedups)}", zorder=3, **form)
        fastest = [
            max((c.ms[c.baseline] / ms for name, ms in c.ms.items() if name not in _OWN), default=1.0) for c in of
        ]
        if dtype not in rivals_drawn and max(fastest) > 1:
            rivals_drawn.add(dtype)
            axes.plot(keep, fastest, color=colour, linewidth=0.8, linestyle=":", label=f"fastest rival, {dtype}")
    axes.axhline(1, color=_INK, linewidth=1, linestyle="--")
    axes.set(xscale="log", yscale="log")
    axes.invert_xaxis()
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, _LEAST), high)
    ratios(axes, "y")
    ticks = sorted({c.keep for of in lines.values() for c in of if c.keep}, reverse=True)
    shown = [t for i, t in enumerate(ticks) if i == 0 or all(t < 0.7 * s for s in ticks[:i])]
    axes.set_xticks(shown)
    axes.xaxis.set_major_formatter(lambda keep, _: f"{1 - keep:.0%}")
    axes.minorticks_off()
    axes.set_title(title, fontsize=9)
    axes.set(xlabel="left out", ylabel="speed-up over computing everything")
    style(axes, "")
    legend(axes, "")


def _edge(keep: list[float], speedups: list[float]) -> str:
    at = break_even(keep, [1 / s for s in speedups], 1.0)
    if len(speedups) == 1:
        return f"{speedups[0]:.2f}x"
    if min(speedups) >= 1:
        return "faster at each point"
    return "slower at each point" if at is None else f"faster from {1 - at:.0%} on"

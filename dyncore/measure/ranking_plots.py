"""How alike methods rank examples: a heat map of the agreement, and two methods' ranks against one another. Needs
matplotlib."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from torch import Tensor

from dyncore.measure.figures import THEMES, new_figure, style

_POINTS = 2000  # more examples than these are drawn as density


def heat_map(methods: tuple[str, ...], tau: Tensor, theme: str) -> Figure:
    """tau [M, M] with its numbers; the diagonal is the noise ceiling."""
    side = 1.6 + 0.75 * len(methods)
    figure = new_figure(side + 0.8, side, theme)
    axes = figure.subplots()
    image = axes.imshow(tau.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
    for a in range(len(methods)):
        for b in range(len(methods)):
            value = float(tau[a, b])
            text = "-" if math.isnan(value) else f"{value:.2f}"
            dark = not math.isnan(value) and abs(value) > 0.6
            axes.text(b, a, text, ha="center", va="center", fontsize=8, color="#ffffff" if dark else "#1f2328")
    places = range(len(methods))
    axes.set_xticks(places, methods, fontsize=8, rotation=30, ha="right")
    axes.set_yticks(places, methods, fontsize=8)
    axes.set_title("Kendall's tau-b; on the diagonal between seeds", fontsize=9)
    style(axes, theme)
    axes.grid(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.046)
    bar.ax.tick_params(colors=THEMES[theme][1], labelsize=8)
    return figure


def rank_rank(names: tuple[str, str], ranks: tuple[Tensor, Tensor], title: str, theme: str) -> Figure:
    """Every example at its rank by two methods, 0 for the least compute."""
    figure = new_figure(4.6, 4.4, theme)
    axes = figure.subplots()
    x, y = (r.numpy() for r in ranks)
    if len(x) > _POINTS:
        axes.hexbin(x, y, gridsize=40, mincnt=1, cmap="viridis")
    else:
        axes.scatter(x, y, s=8, alpha=0.5, linewidths=0, color="#0969da" if not theme else "#58a6ff")
    axes.set(xlabel=f"rank by {names[0]}", ylabel=f"rank by {names[1]}", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_title(title, fontsize=9)
    axes.set_aspect("equal")
    style(axes, theme)
    return figure

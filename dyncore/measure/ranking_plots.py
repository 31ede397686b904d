"""How alike methods rank examples: a heat map of the agreement, ranks against one another, the examples in dispute.
Needs matplotlib."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib import image as pixels
from matplotlib.figure import Figure
from torch import Tensor

from dyncore.measure.figures import THEMES, new_figure, style

_POINTS = 2000  # more examples than these are drawn as density
_ACROSS = 3  # panels beside one another
_PICTURES_ACROSS = 4
_BLUE = {"": "#0969da", "-dark": "#58a6ff"}


def heat_map(methods: tuple[str, ...], tau: Tensor, count: int, theme: str) -> Figure:
    """tau [M, M] with its numbers; the diagonal is the noise ceiling. A line parts the first `count`, the methods, from
    the references."""
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
    if count < len(methods):
        for line in (axes.axhline, axes.axvline):
            line(count - 0.5, color=THEMES[""][1], linewidth=1.5)
    bar = figure.colorbar(image, ax=axes, fraction=0.046)
    bar.ax.tick_params(colors=THEMES[theme][1], labelsize=8)
    return figure


def rank_rank(panels: Sequence[tuple[tuple[str, str], tuple[Tensor, Tensor], str]], theme: str) -> Figure:
    """Panels of (two names, two ranks of every example, a title): 0 for the least compute."""
    across = min(_ACROSS, len(panels))
    down = -(-len(panels) // across)
    figure = new_figure(4.6 if across == 1 else 3.1 * across, 4.4 if across == 1 else 3.2 * down, theme)
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes, (names, ranks, title) in zip(grid, panels, strict=False):
        x, y = (r.numpy() for r in ranks)
        if len(x) > _POINTS:
            axes.hexbin(x, y, gridsize=40, mincnt=1, cmap="viridis")
        else:
            axes.scatter(x, y, s=8, alpha=0.5, linewidths=0, color=_BLUE[theme])
        axes.set(xlabel=f"rank by {names[0]}", ylabel=f"rank by {names[1]}", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_title(title, fontsize=9)
        axes.set_aspect("equal")
        style(axes, theme)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure


def disputed(methods: Sequence[str], panels: Sequence[tuple[Tensor, str, Tensor]], theme: str) -> Figure:
    """Panels of (image, title, its rank by each method): the image above a bar for each."""
    across = min(_PICTURES_ACROSS, len(panels))
    down = -(-len(panels) // across)
    height = 0.22 * len(methods) + 0.3
    figure = new_figure(1.2 + 1.6 * across, down * (1.9 + height), theme)
    grid: Any = figure.subplots(2 * down, across, squeeze=False, height_ratios=[1.6, height] * down)
    for axes in grid.flatten():
        axes.set_visible(False)
    for i, (image, title, ranks) in enumerate(panels):
        row, column = divmod(i, across)
        above, below = grid[2 * row, column], grid[2 * row + 1, column]
        above.set_visible(True)
        above.imshow(image.numpy(), cmap="gray" if image.dim() == 2 else None, vmin=0, vmax=1)
        above.set_axis_off()
        above.set_title(title, fontsize=8, color=THEMES[theme][1])
        below.set_visible(True)
        style(below, theme)
        below.barh(range(len(methods)), ranks.tolist(), color=_BLUE[theme], height=0.7)
        below.set_yticks(range(len(methods)), methods if column == 0 else [""] * len(methods), fontsize=7)
        below.set_xticks([0, 0.5, 1], ["0", ".5", "1"], fontsize=7)
        below.set_xlim(0, 1)
        below.invert_yaxis()
    return figure


def png(image: Tensor) -> str:
    """An image [H, W] or [H, W, 3] in 0..1 as PNG, in base64."""
    buffer = io.BytesIO()
    if image.dim() == 2:
        image = image[..., None].expand(-1, -1, 3)
    values = (image * 255).round().to(torch.uint8).contiguous()
    pixels.imsave(buffer, values.numpy(), format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")

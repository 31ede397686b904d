"""How plots look, whoever draws them: paper, ink and lines in a light and a dark version. Needs matplotlib."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

THEMES = {"": ("#ffffff", "#1f2328", "#d0d7de"), "-dark": ("#0d1117", "#e6edf3", "#30363d")}  # paper, ink, lines


def new_figure(width: float, height: float, theme: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    figure.set_facecolor(THEMES[theme][0])
    return figure


def style(axes: Axes, theme: str) -> None:
    paper, ink, lines = THEMES[theme]
    axes.set_facecolor(paper)
    axes.grid(True, color=lines, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink, which="both")
    for spine in axes.spines.values():
        spine.set_color(lines)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(ink)


def legend(axes: Axes, theme: str) -> None:
    """Below the axes, where it covers no point."""
    paper, ink, _ = THEMES[theme]
    colors = {"facecolor": paper, "edgecolor": paper, "labelcolor": ink}
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, borderaxespad=0.8, fontsize=8, **colors)

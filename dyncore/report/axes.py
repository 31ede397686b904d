"""What the figures of a report have in common: colours, width, axes of ratios. Needs matplotlib."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

# Okabe and Ito's: told apart by readers who see few colours, on light paper and on dark
COLOURS = ("#0a84d0", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c959f", "#b8a200")
WIDTH = 6.0  # inches: text stays readable where a phone shows them


def plain(value: float, _: object = None) -> str:
    """A tick without powers."""
    return f"{value:g}"


def ratios(axes: Axes, which: str) -> None:
    """Powers of two on a logarithmic axis."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    every = [2.0**i for i in range(-10, 14) if low <= 2.0**i <= high]
    axis.set_ticks(every[:: 1 + len(every) // 9])
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_locator(NullLocator())

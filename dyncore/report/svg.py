"""Matplotlib figures as SVG that stands within a page: its colours those of the page, light or dark, its text text."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from dyncore.measure.figures import THEMES

_PAPER, _INK, _LINES = THEMES[""]
_VARIABLES = {_PAPER: "var(--paper)", _INK: "var(--ink)", _LINES: "var(--lines)"}
_SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "dyncore", "font.family": "sans-serif"}


def inline_svg(figure: Figure, number: int, label: str) -> str:
    """The figure as an <svg> element that scales with the page; `number` tells its ids from those of others."""
    figure.set_facecolor("none")
    for axes in figure.axes:
        axes.set_facecolor("none")
    buffer = io.StringIO()
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "findfont")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text, flags=re.DOTALL)  # HTML knows
    text = text.replace("xlink:href", "href")
    text = re.sub(r'id="', f'id="f{number}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#f{number}-", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    head = f'<svg class="figure" role="img" aria-label="{label}"'
    text = re.sub(r'<svg (?:height|width)="[^"]*"', head, text, count=1)
    return re.sub(r'(<svg [^>]*?) width="[\d.]+pt"', r"\1", text, count=1)

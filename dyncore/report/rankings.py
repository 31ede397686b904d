"""Rankings of examples: agreement of methods as a table, ranks against ranks, and the examples they disagree on.

Of documents of schema dyncore.ranking/1: "tau" [M][M], "mean_ranks" [M][N] from 0 (least compute) to 1, and
"pictures": [{"example": its number, "label", "png": base64, "ranks": {method: from 0 to 1}}]. Of "references", the last
of the methods, no ranks are drawn; sentences of an "answer" stand first. Needs matplotlib.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from dyncore.measure.figures import new_figure, style
from dyncore.report.axes import COLOURS, WIDTH
from dyncore.report.documents import Document

_PAIRS = 12
_POINTS = 1000  # drawn of a pair: more would only make the page heavy


def _usable(ranking: dict[str, Any]) -> bool:
    ranks = ranking.get("mean_ranks")
    return isinstance(ranks, list) and len(ranks) == len(ranking["methods"]) > 1


def rank_figure(documents: Sequence[Document]) -> Figure | None:
    """Every example at its rank by two methods, a panel for each pair."""
    found = [d.ranking for d in documents if d.ranking is not None and _usable(d.ranking)]
    counts = [len(r["methods"]) - len(r.get("references", ())) for r in found]
    pairs = [(r, *pair) for r, n in zip(found, counts, strict=True) for pair in itertools.combinations(range(n), 2)]
    pairs = pairs[:_PAIRS]
    if not pairs:
        return None
    lines = -(-len(pairs) // 2)
    figure = new_figure(WIDTH, 3.1 * lines, "")
    panels = figure.subplots(lines, 2, squeeze=False).flatten()
    for axes, (ranking, a, b) in zip(panels, pairs, strict=False):
        step = -(-len(ranking["mean_ranks"][a]) // _POINTS)
        x, y = (ranking["mean_ranks"][method][::step] for method in (a, b))
        axes.scatter(x, y, s=6, alpha=0.4, linewidths=0, color=COLOURS[0])
        names, tau = ranking["methods"], ranking["tau"][a][b]
        axes.set(xlabel=f"rank by {names[a]}", ylabel=f"rank by {names[b]}", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_title("" if tau is None else f"tau {tau:.2f}", fontsize=9)
        axes.set_aspect("equal")
        style(axes, "")
    for axes in panels[len(pairs) :]:
        axes.set_visible(False)
    return figure


def heat_table(ranking: dict[str, Any]) -> str:
    """Agreement of methods, darker where it is higher; a table, so that it can be read and copied."""
    methods = ranking["methods"]

    def cell(value: float | None) -> str:
        if value is None or math.isnan(value):
            return "<td>-</td>"
        colour = "10, 132, 208" if value >= 0 else "213, 94, 0"
        return f'<td style="background: rgba({colour}, {min(1.0, abs(value)) * 0.6:.2f})">{value:.2f}</td>'

    head = "".join(f"<th>{escape(str(name))}</th>" for name in ["", *methods])
    rows = "".join(
        f'<tr><td class="text">{escape(str(name))}</td>{"".join(map(cell, row))}</tr>'
        for name, row in zip(methods, ranking["tau"], strict=True)
    )
    said = "".join(f"<p>{escape(str(sentence))}</p>" for sentence in ranking.get("answer", ()))
    return (
        '<figure id="figure-ranking"><h2>Do methods agree on which examples need most compute?</h2>'
        f"{said}<figcaption>"
        f"Kendall's tau-b over {ranking['examples']} examples; on the diagonal between a method's own seeds, which is "
        f'the noise ceiling.</figcaption><div class="wide"><table class="heat"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></figure>"
    )


def _picture(picture: dict[str, Any]) -> str:
    label = "" if picture.get("label") is None else f"{picture['label']}, "
    name = escape(f"{label}no. {picture['example']}")
    ranks = "".join(f"<span>{escape(f'{method} {rank:.2f}')}</span>" for method, rank in picture["ranks"].items())
    image = f'<img src="data:image/png;base64,{escape(picture["png"])}" alt="{name}">'
    return f"<li>{image}<strong>{name}</strong>{ranks}</li>"


def pictures(ranking: dict[str, Any]) -> str:
    """The examples on which methods disagree most, as pictures; "" where the document has none."""
    shown = ranking.get("pictures") or []
    if not shown:
        return ""
    items = "".join(_picture(picture) for picture in shown)
    return (
        '<figure id="figure-disputed"><h2>The most disputed examples</h2><figcaption>Cheap for one method, expensive '
        "for another: the rank of each by its compute, 0 the least, 1 the most.</figcaption>"
        f'<ul class="pictures">{items}</ul></figure>'
    )

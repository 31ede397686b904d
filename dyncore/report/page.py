"""The report as HTML: one file, no network, for a phone and for the dark."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dyncore.report.documents import Comparison, Document, read_document
from dyncore.report.figures import FIGURES, compared
from dyncore.report.svg import inline_svg

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --lines: #d0d7de; --band: #f6f8fa; --gain: #116329;
  --loss: #a40e26 }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3; --lines: #30363d; --band: #161b22;
  --gain: #56d364; --loss: #ff7b72 } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 60rem; padding: 1rem }
h1, h2, h3 { line-height: 1.25 } h2 { margin-top: 2.5rem }
figure { margin: 0 } svg.figure { display: block; width: 100%; max-width: 44rem; height: auto }
.wide { overflow-x: auto } code { font-size: .85em; overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums }
td, th { border-bottom: 1px solid var(--lines); padding: .25rem .4rem; text-align: right; vertical-align: top }
td.text, th.text { text-align: left; overflow-wrap: break-word; min-width: 7rem }
tbody tr:nth-child(even) { background: var(--band) }
.heat td { text-align: center } .gain { color: var(--gain) } .loss { color: var(--loss) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem } dd { margin: 0; overflow-wrap: anywhere }
summary { cursor: pointer }
"""
_GAIN = 1.005
_NOISY_ABOVE = 0.3


class _Text(str):
    """A cell of text, to the left."""


def _cell(value: Any, tag: str = "td") -> str:
    """A cell; numbers as they are read, speed-ups (of the form "1.20x") in their colour."""
    text = "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    kind = "text" if isinstance(value, _Text) else ""
    if tag == "td" and not kind and text.endswith("x"):
        kind = "gain" if float(text[:-1]) >= _GAIN else "loss"
    return f"<{tag}{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(text)}</{tag}>"


def _table(head: Sequence[Any], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    columns = "".join(_cell(name, "th") for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{columns}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _times(value: float | None, noisy: bool = False) -> str | None:
    return None if value is None else f"{value:.2f}x{'~' * noisy}"


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>" if items else ""


def _machine(head: dict[str, Any]) -> str:
    env = head.get("environment") or {}
    versions = ", ".join(f"{name} {version}" for name, version in env.get("versions", {}).items() if version)
    commit = env.get("commit")
    facts = {
        "Command": head.get("command"),
        "Date": head.get("created"),
        "Machine": f"{env['cpu']}, {env['threads']} threads of {env['cores']} cores, {env['isa'] or 'no C++ kernels'}"
        if env
        else None,
        "GPU": (env.get("gpu") or "none used") if env else None,
        "Versions": versions,
        "Commit": commit["id"] + (" with local changes" if commit["modified"] else "") if commit else None,
    }
    return "<dl>" + "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v) + "</dl>"


def _sentences(points: Sequence[Comparison]) -> list[str]:
    """One for each mechanism: at how many points it was faster, and what a saved FLOP was worth."""
    said: list[str] = []
    for mechanism in dict.fromkeys(c.mechanism for c in points):
        of = [c for c in points if c.mechanism == mechanism and c.speedup is not None]
        if not of:
            continue
        speedups = [c.speedup or 0.0 for c in of]
        wins = sum(s > 1 for s in speedups)
        text = f"{mechanism}: faster than computing everything at {wins} of {len(of)} points"
        text += f" ({statistics.median(speedups):.2f}x in the median, {min(speedups):.2f}x to {max(speedups):.2f}x)"
        se = [(c.speedup or 0.0) / c.flop_speedup for c in of if c.flop_speedup and c.flop_speedup > _GAIN]
        if se:
            text += f"; wall-clock speed-up over FLOP speed-up {statistics.median(se):.2f} in the median"
        said.append(f"{text}.")
    return said


def _audit(audit: dict[str, Any]) -> str:
    model = audit["model"]
    parts = [f"<h2>Audit of {escape(model['class'])}</h2>"]
    parts.append(f"<p>{model['parameters']:,} parameters, {escape(model['dtype'])}; {escape(model['inputs'])}.</p>")
    timings = model.get("timings") or {}
    if {"now", "replaced"} <= timings.keys():
        now, then = timings["now"]["median_ms"], timings["replaced"]["median_ms"]
        parts.append(f"<p>One call: {now:.2f} ms; with all of it replaced {then:.2f} ms: {now / then:.2f}x.</p>")
    head = [*map(_Text, ("layer", "what it is")), "GFLOP", "if skipped", "needed", "break-even", "FLOPs", "time"]
    rows: list[list[Any]] = []
    for r in audit["records"]:
        now, then = r["flops"].get("now"), r["flops"].get("replaced")
        shares = [None if r[n] is None else f"{r[n]:.0%}" for n in ("density", "break_even")]
        counts = [None if n is None else n / 1e9 for n in (now, then)]
        speedups = [_times(r["flop_speedup"]), _times(r["speedup"], r["noisy"])]
        rows.append([_Text(r["name"]), _Text(r["what"]), *counts, *shares, *speedups])
    parts.append(_table(head, rows))
    for title, field in (("How", "how"), ("Why not", "why_not")):
        groups: dict[str, list[str]] = {}
        for r in audit["records"]:
            if r[field] and (field == "why_not" or not r["speedup"] or r["speedup"] >= 1.05):
                groups.setdefault(r[field], []).append(r["name"])
        if groups:
            tag = "code" if field == "how" else "span"
            items = (
                f"<li><{tag}>{escape(text)}</{tag}><br>for {escape(', '.join(names))}</li>"
                for text, names in groups.items()
            )
            parts.append(f"<h3>{title}</h3><ul>{''.join(items)}</ul>")
    return "".join(parts) + _list(audit.get("notes", []))


def _heat(ranking: dict[str, Any]) -> str:
    """Agreement of methods, darker where it is higher; a table, so that it can be read and copied."""
    methods = ranking["methods"]

    def cell(value: float | None) -> str:
        if value is None or math.isnan(value):
            return "<td>-</td>"
        colour = "10, 132, 208" if value >= 0 else "213, 94, 0"
        return f'<td style="background: rgba({colour}, {min(1.0, abs(value)) * 0.6:.2f})">{value:.2f}</td>'

    head = "".join(_cell(name, "th") for name in ["", *methods])
    rows = "".join(
        f"<tr>{_cell(_Text(name))}{''.join(map(cell, row))}</tr>"
        for name, row in zip(methods, ranking["tau"], strict=True)
    )
    return (
        '<figure id="figure-ranking"><h2>Do methods agree on which examples need most compute?</h2><figcaption>'
        f"Kendall's tau-b over {ranking['examples']} examples; on the diagonal between a method's own seeds, which is "
        f'the noise ceiling.</figcaption><div class="wide"><table class="heat"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></figure>"
    )


def _bars(bars: Sequence[dict[str, Any]]) -> str:
    rows = []
    for bar in bars:
        if "text" in bar:
            state = "not measured" if bar.get("met") is None else "met" if bar["met"] else "missed"
            rows.append([_Text(bar["text"]), bar.get("value"), state])
    met = sum(row[2] == "met" for row in rows)
    if not rows:
        return ""
    table = _table([_Text("bar"), "reached", ""], rows)
    return f"<details><summary>{met} of {len(rows)} bars met</summary>{table}</details>"


def _points(points: Sequence[Comparison]) -> str:
    head = [*map(_Text, ("mechanism", "point", "dtype")), "keep", "GFLOP", "ms", "dense ms", "FLOPs", "time"]
    rows = [
        [
            _Text(c.mechanism),
            _Text(c.name + ("" if c.phase == "forward" else ", forward and backward")),
            _Text(c.dtype),
            None if c.keep is None else float(c.keep),
            None if c.executed is None else c.executed / 1e9,
            f"{c.ms['dyncore']:.3g} ±{c.spread:.0%}",
            c.ms.get("dense"),
            _times(c.flop_speedup),
            _times(c.speedup, c.spread > _NOISY_ABOVE),
        ]
        for c in points
    ]
    return (
        f"<details><summary>All {len(points)} points</summary>{_table(head, rows)}<p>FLOPs are 2 per multiply-add, "
        "matrix products alone, counted as executed; times are medians of interleaved rounds, ± the interquartile "
        "range; speed-ups are over computing everything, ~ where samples spread by more than 30%.</p></details>"
    )


def _file(document: Document) -> str:
    """What one file says of itself."""
    head = document.head
    errors = [f"{e['point']}: {e.get('variant', '')}: {e['message']}" for e in head.get("errors") or []]
    parts = [
        f"<h3>{escape(Path(document.path).name)}</h3>",
        "<p><strong>Interrupted: not everything was measured.</strong></p>" if head.get("interrupted") else "",
        "".join(f"<p><strong>Warning: {escape(text)}</strong></p>" for text in head.get("warnings") or []),
        _machine(head),
        "<p>Errors:</p>" + _list(errors) if errors else "",
        _bars(head["bars"]) if isinstance(head.get("bars"), list) else "",
    ]
    return "".join(parts)


def report_page(documents: Sequence[Document]) -> str:
    """The whole page. Figures without data are left out."""
    points = compared(documents)
    figures: list[str] = []
    for number, (name, (title, caption, draw)) in enumerate(FIGURES.items()):
        figure = draw(documents)
        if figure is not None:
            figures.append(
                f'<figure id="figure-{name}"><h2>{escape(title)}</h2><figcaption>{escape(caption)}</figcaption>\n'
                f"{inline_svg(figure, number, escape(title))}</figure>"
            )
    parts = [
        "<h1>dyncore report</h1>",
        _list(_sentences(points)),
        *(_audit(d.audit) for d in documents if d.audit is not None),
        *figures,
        *(_heat(d.ranking) for d in documents if d.ranking is not None),
        _points(points) if points else "",
        "<h2>Files</h2>",
        *map(_file, documents),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>dyncore report</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def write_report(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> None:
    """Write the report of some files of results: `dyncore bench`, benchmarks, savings, activation_sparsity, audits and
    rankings in any mixture.

    Raises ValueError where a file cannot be read or is none of these, or none is given.
    """
    if not paths:
        raise ValueError("results: expected at least one file, got none")
    Path(out).write_text(report_page([read_document(path) for path in paths]), encoding="utf-8")

"""The report as HTML: one file, no network, for a phone and for the dark."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dyncore.report.documents import Comparison, Document, compared, read_document
from dyncore.report.figures import FIGURES
from dyncore.report.rankings import heat_table, pictures
from dyncore.report.rivals import RIVALS, heading, rivals_of
from dyncore.report.summary import sentences
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
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; list-style: none; padding: 0 }
.pictures li { width: 7.5rem; font-size: .75rem } .pictures span { display: block }
.pictures img { width: 100%; image-rendering: pixelated; border: 1px solid var(--lines) }
.heat td { text-align: center } .gain { color: var(--gain) } .loss { color: var(--loss) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem } dd { margin: 0; overflow-wrap: anywhere }
summary { cursor: pointer }
"""
_GAIN = 1.005


class _Text(str):
    """A cell of text, to the left."""


def _cell(value: Any, tag: str = "td") -> str:
    """A cell; numbers as they are read, speed-ups (of the form "1.20x") in their colour."""
    text = "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    kind = "text" if isinstance(value, _Text) else ""
    if tag == "td" and not kind and text.rstrip("~").endswith("x"):
        kind = "gain" if float(text.rstrip("~")[:-1]) >= _GAIN else "loss"
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


def _audit(audit: dict[str, Any]) -> str:
    model = audit["model"]
    parts = [f"<h2>Audit of {escape(model['class'])}</h2>"]
    parts.append(f"<p>{model['parameters']:,} parameters, {escape(model['dtype'])}; {escape(model['inputs'])}.</p>")
    timings = model.get("timings") or {}
    if {"now", "replaced"} <= timings.keys():
        now, then = timings["now"]["median_ms"], timings["replaced"]["median_ms"]
        wide = any(timing.get("spread", 0.0) > 0.3 for timing in timings.values())
        doubt = ", of samples that spread widely, which says little" if wide else ""
        parts.append(f"<p>One call: {now:.2f} ms; with all of it replaced {then:.2f} ms: {now / then:.2f}x{doubt}.</p>")
    head = [*map(_Text, ("layer", "what it is")), "GFLOP", "if skipped", "needed", "break-even", "FLOPs", "time"]
    rows: list[list[Any]] = []
    for r in audit["records"]:
        now, then = r["flops"].get("now"), r["flops"].get("replaced")
        shares = [None if r[n] is None else f"{r[n]:.0%}" for n in ("density", "break_even")]
        counts = [None if n is None else n / 1e9 for n in (now, then)]
        speedups = [_times(r["flop_speedup"]), _times(r["speedup"], r["noisy"])]
        rows.append([_Text(r["name"]), _Text(r["what"]), *counts, *shares, *speedups])
    parts.append(_table(head, rows))
    parts.append(
        "<p>GFLOP: of one call as it is; needed: the share of rows, experts or activations that these inputs need; "
        "break-even: from which share on computing everything is faster, 100%: never; FLOPs, time: speed-ups of the "
        "layer by its replacement, counted and measured; ~: samples spread by more than 30%.</p>"
    )
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


def _savings(record: dict[str, Any]) -> str:
    """What a record of measure.savings says beside its times."""
    said: list[str] = []
    if record.get("interval"):
        low, high = record["interval"]
        said.append(f"Wall-clock speed-up over {heading(record['baseline'])}, with 95%: {low:.2f} to {high:.2f}x.")
    if record.get("overhead") is not None:
        even = record.get("break_even")
        pays = "at no share" if even is None else f"up to a share of {even:.0%}"
        said.append(f"Pays {pays}; {record['overhead']:+.0%} time where nothing is skipped.")
    batch_1 = {name: timing["median_ms"] for name, timing in (record.get("batch_1") or {}).items()}
    for title, values, unit in (
        ("One sample alone", batch_1, "ms"),
        ("Memory", {name: size / 1e6 for name, size in (record.get("peak_bytes") or {}).items()}, "MB"),
        ("Energy of a sample", record.get("joules") or {}, "J"),
    ):
        if values:
            said.append(f"{title}: {', '.join(f'{heading(n)} {value:.3g} {unit}' for n, value in values.items())}.")
    if record.get("uncounted"):
        names = ", ".join(f"{name} x{calls}" for name, calls in record["uncounted"].items())
        said.append(f"Not counted, for nobody knows their FLOPs: {names}.")
    return _list([*said, *(text for text in (record.get("noise"), *record.get("notes", [])) if text)])


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


def _everything(c: Comparison) -> str | None:
    """The time of computing everything, with the name of what did where that is not the dense twin."""
    ms = c.ms.get(c.baseline)
    return None if ms is None else f"{ms:.3g}" + ("" if c.baseline == "dense" else f" ({heading(c.baseline)})")


def _points(points: Sequence[Comparison]) -> str:
    """Every point, with a column for each rival that took part."""
    rivals = [name for name in rivals_of(points) if name != "dense"]
    head = [*map(_Text, ("mechanism", "point", "dtype")), "keep", "GFLOP", "ms", "everything ms", "FLOPs", "time", "SE"]
    head += [f"vs {heading(name)}" for name in rivals]
    rows: list[list[Any]] = []
    for c in points:
        row: list[Any] = [
            _Text(c.mechanism),
            _Text(c.name + ("" if c.phase == "forward" else ", forward and backward")),
            _Text(c.dtype),
            None if c.keep is None else float(c.keep),
            None if c.executed is None else c.executed / 1e9,
            f"{c.ms['dyncore']:.3g} ±{c.spread:.0%}",
            _everything(c),
            _times(c.flop_speedup),
            _times(c.speedup, c.noisy),
            c.speedup / c.flop_speedup if c.speedup and c.flop_speedup else None,
        ]
        rows.append(row + [_times(c.against.get(name), c.noisy) for name in rivals])
    known = [f"{heading(name)}: {RIVALS[name][1]}" for name in ("dense", *rivals) if name in RIVALS]
    return (
        f"<details><summary>All {len(points)} points</summary>{_table(head, rows)}<p>FLOPs are 2 per multiply-add, "
        "matrix products alone, counted as executed; times are medians of interleaved rounds, ± the interquartile "
        "range, and include the making of plans and index lists; speed-ups are over computing everything (by the dense "
        "twin, or by what stands in brackets), SE is that "
        "of time over that of FLOPs, ~ where the samples of either spread by more than 30%; vs: over a rival.</p>"
        f"{_list(known)}</details>"
    )


def _file(document: Document) -> str:
    """What one file says of itself."""
    head = document.head
    errors = [f"{e['point']}: {e.get('variant', '')}: {e['message']}" for e in head.get("errors") or []]
    missing = sorted({f"{heading(name)}: {why}" for name, why in document.unavailable.items()})
    parts = [
        f"<h3>{escape(Path(document.path).name)}</h3>",
        "<p><strong>Interrupted: not everything was measured.</strong></p>" if head.get("interrupted") else "",
        "".join(f"<p><strong>Warning: {escape(text)}</strong></p>" for text in head.get("warnings") or []),
        _machine(head),
        *map(_savings, document.savings),
        "<p>Errors:</p>" + _list(errors) if errors else "",
        "<p>Not available there:</p>" + _list(missing) if missing else "",
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
        _list(sentences(points)),
        *(_audit(d.audit) for d in documents if d.audit is not None),
        *figures,
        *(heat_table(d.ranking) + pictures(d.ranking) for d in documents if d.ranking is not None),
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


def write_report(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    pictures: str | os.PathLike[str] | None = None,
) -> None:
    """Write the report of some files of results: `dyncore bench`, benchmarks, sweeps, savings, activation_sparsity,
    audits and rankings in any mixture.

    Args:
        paths: of the files, one at least.
        out: the HTML file.
        pictures: a folder, made where it is not there, into which each figure goes as <name>.png, too.

    Raises ValueError where a file cannot be read or is none of these, or none is given.
    """
    if not paths:
        raise ValueError("results: expected at least one file, got none")
    documents = [read_document(path) for path in paths]
    Path(out).write_text(report_page(documents), encoding="utf-8")
    if pictures is not None:
        write_pictures(documents, pictures)


def write_pictures(documents: Sequence[Document], folder: str | os.PathLike[str]) -> None:
    """Each figure that the documents have data for, as <name>.png."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, (_, _, draw) in FIGURES.items():
        figure = draw(documents)
        if figure is not None:
            figure.savefig(Path(folder) / f"{name}.png", facecolor=figure.get_facecolor())

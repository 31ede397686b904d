"""index.html: the report of a sweep in one file that needs no network; readable on a phone and in dark mode."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from dyncore.bench.plots import PLOTS
from dyncore.bench.table import COLUMNS, NOISY, RIVALS, RIVALS_LINE, SPREAD, cells, summary

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --lines: #d0d7de; --band: #f6f8fa; --gain: #116329;
  --loss: #a40e26 }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3; --lines: #30363d; --band: #161b22;
  --gain: #56d364; --loss: #ff7b72 } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 84rem; padding: 1rem }
img { display: block; max-width: 100%; height: auto; margin: .5rem 0 }
.wide { overflow-x: auto } .hint { display: none }
@media (max-width: 1150px) { .hint { display: block } }
table { border-collapse: collapse; font-size: .75rem; font-variant-numeric: tabular-nums }
td, th { border-bottom: 1px solid var(--lines); padding: .2rem .25rem; text-align: right; vertical-align: bottom }
td { white-space: nowrap }
td:nth-child(-n+5), th:nth-child(-n+5) { text-align: left }
tbody tr:nth-child(even) { background: var(--band) }
.gain { color: var(--gain) } .loss { color: var(--loss) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem } dd { margin: 0; overflow-wrap: anywhere }
"""


def _table(records: list[dict[str, Any]]) -> str:
    def cell(i: int, text: str) -> str:
        speedup = (i == 12 or i >= 14) and text != "-"
        kind = f' class="{"gain" if float(text.rstrip(NOISY)) >= 1 else "loss"}"' if speedup else ""
        return f"<td{kind}>{escape(text)}</td>"

    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    rows = ("".join(cell(i, text) for i, text in enumerate(cells(record))) for record in records)
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    hint = '<p class="hint">The table goes on to the right: scroll it sideways.</p>'
    return f'{hint}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _picture(name: str, plots: dict[str, bytes]) -> str:
    light, dark = ("data:image/png;base64," + base64.b64encode(plots[name + theme]).decode() for theme in ("", "-dark"))
    title = escape(PLOTS[name][0])
    return (
        f'<h2>{title}</h2>\n<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{title}"></picture>'
    )


def _machine(results: dict[str, Any]) -> str:
    env = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items() if version)
    commit = env["commit"]
    facts = {
        "Machine": f"{env['cpu']}, {env['threads']} threads of {env['cores']} cores, {env['isa'] or 'no C++ kernels'}",
        "GPU": env["gpu"] or "none used",
        "Versions": versions,
        "Commit": "-" if commit is None else commit["id"] + (" with local changes" if commit["modified"] else ""),
        "Command": results["command"],
        "Date": results["created"],
    }
    return "<dl>" + "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()) + "</dl>"


def _list(items: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def page(results: dict[str, Any], plots: dict[str, bytes]) -> str:
    """The report as HTML; `plots` are PNGs by name, "-dark" appended for the dark version."""
    interrupted = "<p><strong>Interrupted: not all points were measured.</strong></p>" if results["interrupted"] else ""
    errors = [escape(f"{e['point']}: {e['variant']}: {e['message']}") for e in results["errors"]]
    missing = {f"{name}: {why}" for r in results["records"] for name, why in r["unavailable"].items()}
    warnings = [f"<p><strong>Warning: {escape(text)}</strong></p>" for text in results.get("warnings", [])]
    parts = [
        "<h1>dyncore bench</h1>",
        interrupted,
        *warnings,
        f"<p>{escape(RIVALS_LINE, quote=False)}.</p>",
        "".join(f"<p>{escape(sentence)}</p>" for sentence in summary(results)),
        "<h2>Errors: wrong numbers, no times</h2>" + _list(errors) if errors else "",
        *(_picture(name, plots) for name in PLOTS if name in plots),
        "<h2>All points</h2>",
        _table(results["records"]),
        "<p>FLOPs are 2 per multiply-add, matrix products alone, counted as executed. Times are medians of interleaved "
        "rounds, ± the interquartile range; making plans and index lists is included. FLOPs x and time x are speed-ups "
        "against dense, SE = time x / FLOPs x; vs: wall-clock speed-up against a rival. Weights come from memory, as "
        f"in a deep model, except for the digits model at its own width. {SPREAD}. Raw samples: results.json.</p>",
        _list([f"{escape(heading)}: {escape(what)}" for heading, what in RIVALS.values()]),
        "<h2>Not available here</h2>" + _list([escape(line) for line in sorted(missing)]) if missing else "",
        "<h2>Machine</h2>",
        _machine(results),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>dyncore bench</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def write_page(folder: Path, results: dict[str, Any], plots: dict[str, bytes]) -> None:
    """Write index.html into `folder`."""
    (folder / "index.html").write_text(page(results, plots), encoding="utf-8")

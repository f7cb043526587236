"""The HTML of the report: one page, nothing from elsewhere, no script."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rlmono.observe.plots import Picture

_LONGEST = 700
"""Characters of a prompt or response that are shown at once; the rest folds out."""

CSS = """
:root { --ink:#1f2937; --muted:#6b7280; --line:#e5e7eb; --soft:#f8fafc; --accent:#2563eb; --good:#15803d; --bad:#b91c1c; }
* { box-sizing:border-box; }
body { margin:0; background:var(--soft); color:var(--ink);
  font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif; }
main { max-width:1240px; margin:0 auto; padding:36px 24px 64px; }
h1 { font-size:27px; line-height:1.2; letter-spacing:-.02em; margin:0 0 4px; overflow-wrap:anywhere; }
h2 { font-size:18px; letter-spacing:-.01em; margin:40px 0 12px; }
h3 { font-size:14px; margin:22px 0 8px; }
p { margin:0; } .muted { color:var(--muted); } .small { font-size:13px; }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(200px,1fr)); gap:12px; margin-top:24px; }
.card, figure, .table { background:#fff; border:1px solid var(--line); border-radius:12px; }
.card { padding:14px 16px; }
.card b { display:block; white-space:nowrap; font-size:22px; line-height:1.3; letter-spacing:-.02em; font-variant-numeric:tabular-nums; }
.card .from { color:var(--muted); font-weight:500; }
.figures { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr)); gap:16px; }
figure { margin:0; padding:12px 14px; } figure img { display:block; width:100%; height:auto; }
figcaption { padding:4px 6px 0; }
.table { overflow-x:auto; } table { width:100%; border-collapse:collapse; }
th { text-align:left; font-size:12.5px; font-weight:600; color:var(--muted); }
th, td { padding:9px 14px; border-top:1px solid var(--line); vertical-align:top; } thead th { border-top:0; }
td.text { width:42%; }
pre, code { font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace; overflow-wrap:anywhere; }
pre { margin:0; white-space:pre-wrap; }
summary { cursor:pointer; color:var(--accent); font-size:12.5px; margin-top:4px; }
.tag { display:inline-block; padding:0 8px; border-radius:99px; font-size:12.5px; background:#f1f5f9; color:var(--muted); }
.tag.good { background:#dcfce7; color:var(--good); } .tag.bad { background:#fee2e2; color:var(--bad); }
@media print { body { background:#fff; } figure, .card { break-inside:avoid; } }
"""


@dataclass(frozen=True)
class Card:
    """One number of the summary: `first → value` where there is a first."""

    label: str
    value: str
    first: str = ""


def render(title: str, subtitle: str, cards: Sequence[Card], pictures: Sequence[Picture], missing: Sequence[str],
           samples: Mapping[str, Sequence[Mapping[str, Any]]], options: Sequence[tuple[str, str, str]]) -> str:
    """The page. `samples`: heading -> rows; `options`: name, value, source. All text is escaped here."""
    sections = [
        f"<header><h1>{escape(title)}</h1><p class='muted'>{escape(subtitle)}</p></header>",
        f"<div class='cards'>{''.join(map(_card, cards))}</div>",
        f"<h2>Curves</h2><div class='figures'>{''.join(map(_figure, pictures))}</div>",
        _missing(missing),
        _samples(samples),
        _options(options),
    ]
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def _card(card: Card) -> str:
    first = f"<span class='from'>{escape(card.first)} → </span>" if card.first else ""
    return f"<div class='card'><span class='muted small'>{escape(card.label)}</span><b>{first}{escape(card.value)}</b></div>"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f"<figure><img alt='{escape(picture.title)}, by rollout' src='data:image/png;base64,{data}'>"
        f"<figcaption class='muted small'>{escape(picture.note)}</figcaption></figure>"
    )


def _missing(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    items = "".join(f"<li>{escape(item)}</li>" for item in missing)
    return f"<h3>Not drawn: this run has no data for</h3><ul class='muted small'>{items}</ul>"


def _samples(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    if not samples:
        return "<h2>Samples</h2><p class='muted'>This run wrote no samples (--log-samples).</p>"
    tables = []
    for heading, rows in samples.items():
        tables.append(f"<h3>{escape(heading)}</h3>" + _table(("Prompt", "Response", "Label", "Reward", "Status"), map(_sample, rows)))
    return "<h2>Samples</h2>" + "".join(tables)


def _sample(row: Mapping[str, Any]) -> str:
    status = str(row.get("status", ""))
    tone = {"completed": " good", "truncated": " bad", "failed": " bad", "aborted": " bad"}.get(status, "")
    return (
        f"<tr><td class='text'>{_text(row.get('prompt'))}</td><td class='text'>{_text(row.get('response'))}</td>"
        f"<td><code>{escape(_plain(row.get('label')))}</code></td><td><code>{escape(_plain(row.get('reward')))}</code></td>"
        f"<td><span class='tag{tone}'>{escape(status)}</span></td></tr>"
    )


def _options(options: Sequence[tuple[str, str, str]]) -> str:
    if not options:
        return ""
    rows = (
        f"<tr><td><code>{escape(name)}</code></td><td><code>{escape(value)}</code></td><td class='muted small'>{escape(source)}</td></tr>"
        for name, value, source in options
    )
    return "<h2>Options that are not at their default</h2>" + _table(("Option", "Value", "From"), rows)


def _table(head: Sequence[str], rows: Iterable[str]) -> str:
    cells = "".join(f"<th>{name}</th>" for name in head)
    return f"<div class='table'><table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _text(value: Any) -> str:
    """A text as it is; a long one folds out."""
    text = _plain(value)
    if len(text) <= _LONGEST:
        return f"<pre>{escape(text)}</pre>"
    start, rest = text[:_LONGEST], text[_LONGEST:]
    return f"<pre>{escape(start)} …</pre><details><summary>{len(rest):,} more characters</summary><pre>{escape(rest)}</pre></details>"


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

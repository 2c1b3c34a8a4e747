"""Parts of HTML pages that need nothing else: no network and no files beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from tidegate.reports.charts import Bar, Bars, Chart, Curve, Panel
from tidegate.reports.looks import DARK_TONES, TONES

TITLE = "tidegate: "
DIGITS = 5
"""That are written of a number in a chart."""


def document(title: str, parts: Iterable[str], by: str) -> str:
    """Return the page of ``parts``, with the style and, where it has charts, the script that draws them.

    It names the command that it is ``by``.
    """
    body = "\n".join(part for part in parts if part)
    scripts = (asset("uPlot.iife.min.js"), asset("charts.js")) if 'class="plot"' in body else ()
    style = asset("page.css") + _tones() + (asset("uPlot.min.css") if scripts else "")
    code = "".join(f"<script>{script}</script>\n" for script in scripts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="tidegate {by}">\n'
        f"<title>{TITLE}{escape(title)}</title>\n"
        f"<style>{style}</style>\n</head>\n<body>\n{body}\n{code}</body>\n</html>\n"
    )


@cache
def asset(name: str) -> str:
    """Return a file of this room's assets."""
    return (files("tidegate.reports") / "assets" / name).read_text(encoding="utf-8")


def _tones() -> str:
    light, dark = (
        "".join(f"--t{at}:{colour};" for at, colour in enumerate(tones)) for tones in (TONES, DARK_TONES)
    )
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def warning(text: str) -> str:
    return f'<p class="warning">{escape(text)}</p>' if text else ""


def answer_box(sentences: Sequence[str]) -> str:
    """Return the box at the top of a page; the first sentence is in its heading already."""
    found = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<div class="answer"><ul>{found}</ul></div>' if found else ""


def dot(tone: int) -> str:
    return f'<span class="dot" style="background:var(--t{tone})"></span>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text: Sequence[int] = ()) -> str:
    """Return a table that scrolls sideways in a narrow window; cells are HTML, columns in ``text`` wrap."""
    cells = "".join(
        f'<th class="text">{escape(title)}</th>' if at in text else f"<th>{escape(title)}</th>"
        for at, title in enumerate(head)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="text">{cell}</td>' if at in text else f"<td>{cell}</td>"
            for at, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(chart: Chart) -> str:
    """Return a chart with its heading and caption."""
    panels = "".join(
        _bars(panel)
        if isinstance(panel, Bars)
        else _plot(panel, f"{chart.name}{int(panel.log_x)}{panel.title}")
        for panel in chart.panels
    )
    hint = " Drag to zoom in, double-click to zoom out." if 'class="plot"' in panels else ""
    return (
        f'<h3 id="{escape(chart.name, quote=True)}">{escape(chart.heading)}</h3><figure>{panels}'
        f"<figcaption>{escape(chart.caption)}{hint}</figcaption></figure>"
    )


def _plot(panel: Panel, name: str) -> str:
    title = f"<h4>{escape(panel.title)}</h4>" if panel.title else ""
    labels = ", ".join(curve.label for curve in panel.curves)
    about = escape(f"{panel.y} over {panel.x} of {labels}", quote=True)
    value = {
        "x": panel.x,
        "y": panel.y,
        "curves": [_curve(curve) for curve in panel.curves],
        "marks": [{"axis": m.axis, "at": m.at, "text": m.text} for m in panel.marks],
        "focus": panel.focus,
        "y_range": panel.y_range,
        "log_x": panel.log_x,
        "stacked": panel.stacked,
        "also": panel.also,
        "sync": None if panel.log_x or panel.focus else name.partition("-")[0],
    }
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    script = f'<script type="application/json">{text}</script>'
    return f'{title}<div class="plot" role="img" aria-label="{about}">{script}</div>'


def _curve(curve: Curve) -> dict[str, Any]:
    shown = {
        "label": curve.label,
        "tone": curve.look.tone,
        "dash": curve.look.dash,
        "width": curve.width,
        "dots": curve.dots,
        "xs": _rounded(curve.xs),
        "ys": _rounded(curve.ys),
    }
    return shown | ({"low": _rounded(curve.low), "high": _rounded(curve.high)} if curve.low else {})


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.{DIGITS}g}") for value in values]


def _bars(panel: Bars) -> str:
    reach = panel.reach
    mark = panel.mark
    at = "" if mark is None else f"{100 * mark.at / reach:.2f}%"
    rows = "".join(_bar(bar, reach, at) for bar in panel.bars)
    named = {part.label: part.tone for bar in panel.bars for part in bar.parts}
    keys = "".join(f"<span>{dot(tone)}{escape(label)}</span>" for label, tone in named.items())
    limit = ""
    if mark is not None:
        side = f"right:{100 - 100 * mark.at / reach:.2f}%;padding-right:.4em"
        named_mark = f'<span style="{side}">{escape(mark.text)} ┐</span>'
        limit = f'<div class="name"></div><div class="limit">{named_mark}</div>'
    return (
        f"<h4>{escape(panel.title)} ({escape(panel.unit)})</h4>"
        + (f'<div class="keys">{keys}</div>' if len(named) > 1 else "")
        + f'<div class="bars">{limit}{rows}</div>'
    )


def _bar(bar: Bar, reach: float, mark_at: str) -> str:
    parts = "".join(
        f'<i style="width:{100 * part.value / reach:.2f}%;background:var(--t{part.tone})" '
        f'title="{escape(part.label, quote=True)}: {part.value:,.2f}"></i>'
        for part in bar.parts
    )
    line = f'<b style="left:{mark_at}"></b>' if mark_at else ""
    spread, indent = "", ""
    if bar.interval is not None:
        low, high = (100 * end / reach for end in bar.interval)
        total = 100 * sum(part.value for part in bar.parts) / reach
        spread = f'<u style="left:{low:.2f}%;width:{max(0.0, high - low):.2f}%"></u>'
        indent = f' style="margin-left:{max(0.0, high - total):.2f}%"'
    return (
        f'<div class="name">{escape(bar.label)}</div>'
        f'<div class="track">{parts}{spread}{line}<span{indent}>{escape(bar.text)}</span></div>'
    )


def part_rows(bars: Sequence[Bars]) -> Iterator[list[str]]:
    """Yield a row per bar with the value of every part, for what is too small to be seen."""
    names = part_names(bars)
    labels = list(dict.fromkeys(bar.label for panel in bars for bar in panel.bars))
    for label in labels:
        values = {p.label: p.value for panel in bars for b in panel.bars if b.label == label for p in b.parts}
        yield [escape(label), *(f"{values[name]:,.2f}" if name in values else "0" for name in names)]


def part_names(bars: Sequence[Bars]) -> list[str]:
    """Return the names of all parts, in order."""
    return list(dict.fromkeys(p.label for panel in bars for bar in panel.bars for p in bar.parts))

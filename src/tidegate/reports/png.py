"""Charts as PNG files, by matplotlib."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from tidegate.reports.charts import Bars, Chart, Mark, Panel
from tidegate.reports.looks import TONES
from tidegate.reports.plot_style import INK, MARK_LINE, note_along, note_at, plain_log_ticks, styled

WIDTH_IN = 9.6
PANEL_IN = 3.4


def draw_png(chart: Chart) -> bytes:
    """Return a chart as a PNG file. Raises NoPlots without matplotlib."""
    heights = [0.9 + 0.4 * len(p.bars) if isinstance(p, Bars) else PANEL_IN for p in chart.panels]
    rows = len(chart.panels)
    with styled(WIDTH_IN, sum(heights) or 1.0, max(1, rows), height_ratios=heights or None) as (figure, axes):
        for axis, panel in zip(axes[:, 0], chart.panels, strict=False):
            if isinstance(panel, Bars):
                _draw_bars(axis, panel)
            else:
                _draw_panel(axis, panel)
        figure.suptitle(_plain(chart.section), fontsize=11)
        buffer = io.BytesIO()
        # No date, so that the same numbers give the same file.
        figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def _plain(text: str) -> str:
    """Escape what matplotlib would read as mathematics."""
    return text.replace("$", r"\$")


def _draw_panel(axis: Any, panel: Panel) -> None:
    if panel.stacked:
        labels = [curve.label for curve in panel.curves]
        colours = [TONES[curve.look.tone] for curve in panel.curves]
        values = [curve.ys for curve in panel.curves]
        axis.stackplot(panel.curves[0].xs, values, labels=labels, colors=colours, step="post", lw=0)
    for curve in () if panel.stacked else panel.curves:
        colour, dash = TONES[curve.look.tone], (0, curve.look.dash) if curve.look.dash else "-"
        ys = [np.nan if y is None else y for y in curve.ys]
        marker = {"marker": "o", "ms": 3.5} if curve.dots else {}
        axis.plot(
            curve.xs, ys, color=colour, ls=dash, lw=curve.width * 0.7, label=_plain(curve.label), **marker
        )
        if curve.low:
            axis.fill_between(curve.xs, curve.low, curve.high, color=colour, alpha=0.15, lw=0)
    if panel.log_x:
        axis.set_xscale("log")
    if panel.focus:
        axis.set(xlim=panel.focus[0], ylim=panel.focus[1])
    else:
        axis.set_ylim(panel.y_range or (0, None))
    for mark in panel.marks:
        _draw_mark(axis, mark)
    axis.set(title=_plain(panel.title), xlabel=panel.x, ylabel=panel.y)
    if panel.log_x:
        plain_log_ticks(axis.xaxis)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_mark(axis: Any, mark: Mark) -> None:
    low, high = sorted(axis.get_xlim() if mark.axis == "x" else axis.get_ylim())
    if not low <= mark.at <= high:
        return
    if mark.axis == "x":
        axis.axvline(mark.at, **MARK_LINE)
        note_along(axis, mark.at, _plain(mark.text))
    else:
        axis.axhline(mark.at, **MARK_LINE)
        note_at(axis, _plain(mark.text), (0, mark.at), (4, 3), xycoords=("axes fraction", "data"))


def _draw_bars(axis: Any, panel: Bars) -> None:
    named: set[str] = set()
    for index, bar in enumerate(panel.bars):
        left = 0.0
        for part in bar.parts:
            label = None if part.label in named else part.label
            named.add(part.label)
            axis.barh(index, part.value, left=left, color=TONES[part.tone], height=0.65, label=label)
            left += part.value
        end = left
        if bar.interval is not None:
            ends = np.maximum([[left - bar.interval[0]], [bar.interval[1] - left]], 0.0)
            axis.errorbar(left, index, xerr=ends, color=INK, capsize=3, lw=1.2)
            end = max(left, bar.interval[1])
        note_at(axis, bar.text, (end, index), (6, 0), va="center", fontsize=8.5)
    axis.set_yticks(range(len(panel.bars)), [_plain(bar.label) for bar in panel.bars])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(title=_plain(panel.title), xlabel=panel.unit, xlim=(0, panel.reach))
    if panel.mark is not None:
        _draw_mark(axis, panel.mark)
    if len(named) > 1:
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

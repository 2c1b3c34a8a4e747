"""The figures of a comparison's report, each as SVG for the page and as PNG for elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidegate.core.slo import Slo
from tidegate.core.stages import LATER_STAGES, TTFT_STAGES
from tidegate.measure.run_view import RunView
from tidegate.reports.comparison import ComparedSystem, Comparison, TraceComparison
from tidegate.reports.plot_style import Look, as_png, as_svg, looks, styled
from tidegate.reports.plots import (
    draw_attainment,
    draw_cdf,
    draw_goodput,
    draw_over_time,
    draw_rate,
    draw_roles,
    draw_stages,
)

WIDTH_IN = 9.6
LEGEND = {"loc": "outside lower center", "ncols": 3}
MOST_ROLE_ROWS = 6
OVER_TIME = (
    ("attained", ("Attained, by arrival", "requests (%)"), 100.0),
    ("prefill_queue_s", ("Prefill work queued, all instances", "s"), 1.0),
    ("decode_requests", ("Running decodes", "requests"), 1.0),
    ("kv_share", ("KV in use, of all instances", "%"), 100.0),
)
"""Series of a view, with title and unit, and the factor to that unit."""

Shown = list[tuple[ComparedSystem, RunView]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A finished chart. ``name`` is its file name without suffix, ``trace`` the trace that it is about."""

    name: str
    trace: str
    heading: str
    caption: str
    svg: str
    png: bytes


def draw_figures(comparison: Comparison) -> list[Figure]:
    """Draw every figure of the report. Raises NoPlots without matplotlib."""
    look = looks(comparison.systems)
    return [figure for trace in comparison.traces for figure in _of_trace(comparison, trace, look)]


def write_pngs(folder: Path, figures: list[Figure]) -> list[Path]:
    """Write the PNG of every figure; return the paths."""
    for figure in figures:
        (folder / f"{figure.name}.png").write_bytes(figure.png)
    return [folder / f"{figure.name}.png" for figure in figures]


def _of_trace(comparison: Comparison, trace: TraceComparison, look: dict[str, Look]) -> Iterator[Figure]:
    slo = Slo.parse(comparison.slo)
    shown = [(entry, entry.view) for entry in trace.entries if entry.view is not None]
    if any(found.probes for entry in trace.entries for found in entry.levels):
        yield _attainment(comparison, trace, look)
    if comparison.levels:
        yield _goodput(comparison, trace, look)
    if shown:
        yield _cdfs(trace, slo, look)
        yield _stages(trace)
        yield _roles(trace, shown)
        yield _over_time(trace, shown, look)


def _finish(figure: Any, trace: TraceComparison, kind: str, heading: str, caption: str) -> Figure:
    name = f"{re.sub(r'[^A-Za-z0-9]+', '-', trace.title).strip('-').lower()}-{kind}"
    return Figure(name, trace.title, heading, caption, as_svg(figure, name), as_png(figure))


def _attainment(comparison: Comparison, trace: TraceComparison, look: dict[str, Look]) -> Figure:
    caption = (
        f"Share of offered requests that met {comparison.slo}, over the offered rate. Points are runs "
        "of the goodput search: the mean over seeds, the band their range."
    )
    with styled(WIDTH_IN, 4.6) as (figure, axes):
        draw_attainment(axes[0][0], trace, comparison.levels, look)
        figure.legend(**LEGEND)
        return _finish(figure, trace, "attainment", "Attainment over rate", caption)


def _goodput(comparison: Comparison, trace: TraceComparison, look: dict[str, Look]) -> Figure:
    levels, rows = comparison.levels, len(trace.entries)
    caption = (
        "The highest offered rate whose attainment is at least the level, with its confidence interval "
        "over seeds. The dotted line is the fluid limit: no schedule on this hardware could go beyond it."
    )
    with styled(WIDTH_IN, (0.9 + 0.5 * rows) * len(levels), len(levels)) as (figure, axes):
        for axis, level in zip(axes[:, 0], levels, strict=True):
            draw_goodput(axis, trace, level, look)
        return _finish(figure, trace, "goodput", "Goodput", caption)


def _cdfs(trace: TraceComparison, slo: Slo, look: dict[str, Look]) -> Figure:
    caption = f"All systems at {_common(trace)}. A curve ends at the share of requests that was answered."
    with styled(WIDTH_IN, 4.2, 1, 2) as (figure, axes):
        draw_cdf(axes[0][0], trace, "ttft", slo.ttft_s, look)
        draw_cdf(axes[0][1], trace, "tpot", slo.tpot_s, look)
        figure.legend(*axes[0][0].get_legend_handles_labels(), **LEGEND)
        return _finish(figure, trace, "latency", "Latency distributions at one rate", caption)


def _stages(trace: TraceComparison) -> Figure:
    caption = f"Where the time of answered requests went, on average, at {_common(trace)}."
    with styled(WIDTH_IN, 2 * (1.3 + 0.4 * len(trace.entries)), 2) as (figure, axes):
        draw_stages(axes[0][0], trace, TTFT_STAGES, "Until the first token")
        draw_stages(axes[1][0], trace, LATER_STAGES, "After the first token")
        return _finish(figure, trace, "stages", "Time by stage", caption)


def _roles(trace: TraceComparison, shown: Shown) -> Figure:
    flips = {entry.title: (entry.at_common or {}).get("flips") or 0 for entry, _ in shown}
    flipping = [pair for pair in shown if flips[pair[0].title]]
    moving = (flipping or shown[:1])[:MOST_ROLE_ROWS]
    left_out = ""
    if len(shown) > len(moving):
        left_out = " Others are left out."
        if not flipping:
            left_out = " No system flips; one stands for all."
        elif len(flipping) == len(moving):
            left_out = " Systems that do not flip are left out."
    caption = (
        f"Labels of the instances over time at {_common(trace)}, under the offered rate (grey: arrivals, "
        f"line: smoothed).{left_out}"
    )
    with styled(WIDTH_IN, 1.6 + 1.5 * len(moving), 1 + len(moving), sharex=True) as (figure, axes):
        draw_rate(axes[0][0], shown[0][1])
        labels: dict[str, Any] = {}
        for axis, (entry, view) in zip(axes[1:, 0], moving, strict=True):
            count = flips[entry.title]
            draw_roles(axis, f"{entry.title}: {count} flip{'' if count == 1 else 's'}", view)
            labels |= {name: patch for patch, name in zip(*axis.get_legend_handles_labels(), strict=True)}
        axes[-1][0].set_xlabel("time (s)")
        figure.legend(labels.values(), labels.keys(), **LEGEND)
        return _finish(figure, trace, "roles", "Roles over time", caption)


def _over_time(trace: TraceComparison, shown: Shown, look: dict[str, Look]) -> Figure:
    caption = f"Queues, running decodes and KV use at {_common(trace)}."
    with styled(WIDTH_IN, 8.4, len(OVER_TIME), sharex=True) as (figure, axes):
        column = axes[:, 0]
        for axis, (name, labels, scale) in zip(column, OVER_TIME, strict=True):
            draw_over_time(axis, shown, name, labels, look, scale)
        column[-1].set_xlabel("time (s)")
        figure.legend(*column[0].get_legend_handles_labels(), **LEGEND)
        return _finish(figure, trace, "over-time", "Queues and KV use", caption)


def _common(trace: TraceComparison) -> str:
    if trace.common_rate_rps is None:
        return "one rate"
    return f"{trace.common_rate_rps:.2f} requests/s ({trace.common_rate_is})"

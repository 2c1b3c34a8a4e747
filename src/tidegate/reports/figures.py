"""The figures of a comparison's report, each as SVG for the page and as PNG for elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidegate.core.slo import Slo
from tidegate.core.stages import LATER_STAGES, TTFT_STAGES
from tidegate.reports.comparison import ComparedSystem, Comparison, TraceComparison
from tidegate.reports.plot_style import Look, as_png, as_svg, looks, styled
from tidegate.reports.plots import draw_attainment, draw_cdf, draw_goodput, draw_stages
from tidegate.reports.plots_timeline import draw_over_time, draw_rate, draw_roles

WIDTH_IN = 9.6
LEGEND = {"loc": "outside lower center", "ncols": 3}
MOST_ROLE_ROWS = 6


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
    shown = [entry for entry in trace.entries if entry.view is not None]
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
    with styled(WIDTH_IN, 4.6) as (figure, axes):
        draw_attainment(axes[0][0], trace, comparison.levels, look)
        figure.legend(**LEGEND)
        caption = (
            f"Share of offered requests that met {comparison.slo}, over the offered rate. Points are runs "
            "of the goodput search: the mean over seeds, the band their range."
        )
        return _finish(figure, trace, "attainment", "Attainment over rate", caption)


def _goodput(comparison: Comparison, trace: TraceComparison, look: dict[str, Look]) -> Figure:
    levels, rows = comparison.levels, len(trace.entries)
    with styled(WIDTH_IN, (0.9 + 0.5 * rows) * len(levels), len(levels)) as (figure, axes):
        for axis, level in zip(axes[:, 0], levels, strict=True):
            draw_goodput(axis, trace, level, look)
        caption = (
            "The highest offered rate whose attainment is at least the level, with its confidence interval "
            "over seeds. The dotted line is the fluid limit: no schedule on this hardware could go beyond it."
        )
        return _finish(figure, trace, "goodput", "Goodput", caption)


def _cdfs(trace: TraceComparison, slo: Slo, look: dict[str, Look]) -> Figure:
    with styled(WIDTH_IN, 4.2, 1, 2) as (figure, axes):
        draw_cdf(axes[0][0], trace, "ttft", slo.ttft_s, look)
        draw_cdf(axes[0][1], trace, "tpot", slo.tpot_s, look)
        figure.legend(*axes[0][0].get_legend_handles_labels(), **LEGEND)
        caption = f"All systems at {_common(trace)}. A curve ends at the share of requests that was answered."
        return _finish(figure, trace, "latency", "Latency distributions at one rate", caption)


def _stages(trace: TraceComparison) -> Figure:
    rows = len(trace.entries)
    with styled(WIDTH_IN, 2 * (1.3 + 0.4 * rows), 2) as (figure, axes):
        draw_stages(axes[0][0], trace, TTFT_STAGES, "Until the first token")
        draw_stages(axes[1][0], trace, LATER_STAGES, "After the first token")
        caption = f"Where the time of answered requests went, on average, at {_common(trace)}."
        return _finish(figure, trace, "stages", "Time by stage", caption)


def _roles(trace: TraceComparison, shown: list[ComparedSystem]) -> Figure:
    flipping = [entry for entry in shown if (entry.at_common or {}).get("flips")]
    moving = (flipping or shown[:1])[:MOST_ROLE_ROWS]
    rest = len(shown) - len(moving)
    left_out = ""
    if rest:
        left_out = " No system flips; one stands for all." if not flipping else " Others are left out."
        if flipping and len(flipping) == len(moving):
            left_out = " Systems that do not flip are left out."
    heights = [1.0] + [1.0] * len(moving)
    with styled(WIDTH_IN, 1.6 + 1.5 * len(moving), 1 + len(moving), sharex=True, height_ratios=heights) as (
        figure,
        axes,
    ):
        draw_rate(axes[0][0], shown[0])
        for axis, entry in zip(axes[1:, 0], moving, strict=True):
            draw_roles(axis, entry)
        axes[-1][0].set_xlabel("time (s)")
        labels: dict[str, Any] = {}
        for axis in axes[1:, 0]:
            labels |= {name: patch for patch, name in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(labels.values(), labels.keys(), **LEGEND)
        caption = (
            f"Labels of the instances over time at {_common(trace)}, under the offered rate (grey: arrivals, "
            f"line: smoothed).{left_out}"
        )
        return _finish(figure, trace, "roles", "Roles over time", caption)


def _over_time(trace: TraceComparison, shown: list[ComparedSystem], look: dict[str, Look]) -> Figure:
    with styled(WIDTH_IN, 8.4, 4, sharex=True) as (figure, axes):
        column = axes[:, 0]
        draw_over_time(column[0], shown, "attained", "Attained, by arrival", "requests (%)", look, 100.0)
        draw_over_time(column[1], shown, "prefill_queue_s", "Prefill work queued, all instances", "s", look)
        draw_over_time(column[2], shown, "decode_requests", "Running decodes", "requests", look)
        draw_over_time(column[3], shown, "kv_share", "KV in use, of all instances", "%", look, 100.0)
        column[3].set_xlabel("time (s)")
        figure.legend(*column[0].get_legend_handles_labels(), **LEGEND)
        caption = f"Queues, running decodes and KV use at {_common(trace)}."
        return _finish(figure, trace, "over-time", "Queues and KV use", caption)


def _common(trace: TraceComparison) -> str:
    if trace.common_rate_rps is None:
        return "one rate"
    return f"{trace.common_rate_rps:.2f} requests/s ({trace.common_rate_is})"

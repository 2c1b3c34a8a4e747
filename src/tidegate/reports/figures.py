"""The figures of a comparison's report, each as SVG for the page and as PNG for elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tidegate.core.slo import Slo
from tidegate.core.stages import LATER_STAGES, TTFT_STAGES
from tidegate.measure.run_view import RunView
from tidegate.reports.comparison import ComparedSystem, Comparison, TraceComparison
from tidegate.reports.plot_style import (
    INK,
    ROLE_COLOURS,
    STAGE_COLOURS,
    Look,
    as_png,
    as_svg,
    looks,
    name_bars,
    note_along,
    note_at,
    plain_log_ticks,
    styled,
)

WIDTH_IN = 9.6
LEGEND = {"loc": "outside lower center", "ncols": 3}
LEGEND_BELOW_IN = 0.5
"""From an axis to its legend: the room of its ticks and its label, however few bars it has."""
FAR = 1.3
"""Times the highest rate that was tried: a limit beyond would squeeze the curves."""
MOST_ROWS = 24
"""Bars of a chart at most; a comparison of every split of a large fleet has more, which the CSV has."""
MOST_ROLE_ROWS = 6
SMOOTH_WINDOWS = 5
LIMIT_LINE: dict[str, Any] = {"color": "#444444", "lw": 1, "ls": ":"}
TARGET_LINE: dict[str, Any] = {"color": "#444444", "lw": 1, "ls": (0, (4, 3))}
OVER_TIME = (
    ("attained", "Attained, by arrival", "requests (%)", 100.0),
    ("prefill_queue_s", "Prefill work queued, all instances", "s", 1.0),
    ("decode_requests", "Running decodes", "requests", 1.0),
    ("kv_share", "KV in use, of all instances", "%", 100.0),
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


def _of_trace(comparison: Comparison, trace: TraceComparison, look: dict[str, Look]) -> Iterator[Figure]:
    shown = [(entry, entry.view) for entry in trace.entries if entry.view is not None]
    if any(found.probes for entry in trace.entries for found in entry.levels):
        yield _attainment(comparison, trace, look)
    if comparison.levels:
        yield _goodput(comparison, trace, look)
    if shown:
        yield _cdfs(trace, shown, Slo.parse(comparison.slo), look)
        yield _stages(trace, shown)
        yield _roles(trace, shown)
        yield _over_time(trace, shown, look)


def _finish(figure: Any, trace: TraceComparison, kind: str, heading: str, caption: str) -> Figure:
    name = f"{re.sub(r'[^A-Za-z0-9]+', '-', trace.title).strip('-').lower()}-{kind}"
    return Figure(name, trace.title, heading, caption, as_svg(figure, name), as_png(figure))


def _common(trace: TraceComparison) -> str:
    if trace.common_rate_rps is None:
        return "one rate"
    return f"{trace.common_rate_rps:.2f} requests/s ({trace.common_rate_is})"


def _attainment(comparison: Comparison, trace: TraceComparison, look: dict[str, Look]) -> Figure:
    """Draw attainment over the offered rate: a point per rate, the mean over seeds, with their range."""
    caption = (
        f"Share of offered requests that met {comparison.slo}, over the offered rate. Points are runs "
        "of the goodput search: the mean over seeds, the band their range."
    )
    fastest = 0.0
    with styled(WIDTH_IN, 4.6) as (figure, axes):
        axis = axes[0][0]
        for entry in trace.entries:
            rates = _by_rate(entry)
            if not rates:
                continue
            style, xs = look[entry.system], sorted(rates)
            fastest = max(fastest, xs[-1])
            means = [100 * float(np.mean(rates[x])) for x in xs]
            style.line(axis, xs, means, entry.title, marker=style.marker, ms=4.5)
            lows, highs = [100 * min(rates[x]) for x in xs], [100 * max(rates[x]) for x in xs]
            axis.fill_between(xs, lows, highs, color=style.colour, alpha=0.15, lw=0)
        for level in comparison.levels:
            axis.axhline(100 * level, **TARGET_LINE)
            at = (1, 100 * level)
            note_at(axis, f"{100 * level:g} %", at, (3, 0), xycoords=("axes fraction", "data"), va="center")
        limit_rps = next((f.limit_rps for e in trace.entries for f in e.levels[:1]), None)
        if limit_rps and limit_rps > FAR * fastest:
            text = f"fluid limit: {limit_rps:.1f} requests/s, beyond this chart"
            note_at(axis, text, (1, 0), (-4, 4), xycoords="axes fraction", ha="right", va="bottom")
        elif limit_rps:
            axis.axvline(limit_rps, **LIMIT_LINE)
            note_along(axis, limit_rps, "fluid limit")
        labels = {"xlabel": "offered rate (requests/s)", "ylabel": "SLO attainment (%)"}
        axis.set(title=trace.title, ylim=(0, 102), **labels)
        axis.set_xlim(left=0)
        figure.legend(**LEGEND)
        return _finish(figure, trace, "attainment", "Attainment over rate", caption)


def _by_rate(entry: ComparedSystem) -> dict[float, list[float]]:
    """Return attainments by rate over the seeds of the search at the first level, and of all at that rate."""
    found: dict[float, dict[int, float]] = {}
    for level in entry.levels:
        if level.chosen == entry.levels[0].chosen:
            for each in level.probes:
                found.setdefault(each.rate_rps, {})[each.seed] = each.attainment
    return {rate: list(by_seed.values()) for rate, by_seed in found.items()}


def _goodput(comparison: Comparison, trace: TraceComparison, look: dict[str, Look]) -> Figure:
    caption = (
        "The highest offered rate whose attainment is at least the level, with its confidence interval "
        "over seeds. The dotted line is the fluid limit: no schedule on this hardware could go beyond it."
    )
    levels = comparison.levels
    height_in = (0.9 + 0.5 * len(trace.entries)) * len(levels)
    with styled(WIDTH_IN, height_in, len(levels)) as (figure, axes):
        for axis, level in zip(axes[:, 0], levels, strict=True):
            _draw_goodput(axis, trace, level, look)
        return _finish(figure, trace, "goodput", "Goodput", caption)


def _draw_goodput(axis: Any, trace: TraceComparison, level: float, look: dict[str, Look]) -> None:
    """Draw a bar per system with its confidence interval, its value and its share of the limit."""
    rows = [(e, found) for e in trace.entries for found in e.levels if found.level == level][:MOST_ROWS]
    limit_rps = next((found.limit_rps for _, found in rows if found.limit_rps), None)
    reach = max([limit_rps or 0.0, *(found.high_rps for _, found in rows)]) or 1.0
    for index, (entry, found) in enumerate(rows):
        value = found.goodput_rps
        error = np.maximum([[value - found.low_rps], [found.high_rps - value]], 0.0)
        axis.barh(index, value, color=look[entry.system].colour, height=0.65)
        axis.errorbar(value, index, xerr=error, color=INK, capsize=3, lw=1.2)
        share = "" if found.share_of_limit is None else f", {100 * found.share_of_limit:.0f} % of the limit"
        end = (max(found.high_rps, value), index)
        note_at(axis, f"{value:.2f}{share}", end, (6, 0), va="center", fontsize=8.5)
    if limit_rps:
        axis.axvline(limit_rps, **LIMIT_LINE)
    name_bars(axis, [f"{e.system}\n({f.chosen})" if f.chosen else e.system for e, f in rows])
    title = f"{trace.title}, {100 * level:g} % attained"
    axis.set(title=title, xlabel="goodput (requests/s)", xlim=(0, reach * 1.3))


def _cdfs(trace: TraceComparison, shown: Shown, slo: Slo, look: dict[str, Look]) -> Figure:
    """Draw the distributions of TTFT and TPOT at the common rate, over offered requests."""
    caption = f"All systems at {_common(trace)}. A curve ends at the share of requests that was answered."
    with styled(WIDTH_IN, 4.2, 1, 2) as (figure, axes):
        for axis, name, target_s in zip(axes[0], ("TTFT", "TPOT"), (slo.ttft_s, slo.tpot_s), strict=True):
            for entry, view in shown:
                values = getattr(view, f"{name.lower()}_quantiles_s")
                if values:
                    answered = view.answered / view.offered if view.offered else 0.0
                    shares = np.linspace(0.0, 100.0 * answered, len(values))
                    look[entry.system].line(axis, 1000 * np.maximum(values, 1e-6), shares, entry.title)
            axis.axvline(1000 * target_s, **TARGET_LINE)
            note_along(axis, 1000 * target_s, f"target {1000 * target_s:g} ms")
            labels = {"xlabel": f"{name} (ms, log scale)", "ylabel": "requests (%)"}
            axis.set(title=name, xscale="log", ylim=(0, 101), **labels)
            plain_log_ticks(axis.xaxis)
        figure.legend(*axes[0][0].get_legend_handles_labels(), **LEGEND)
        return _finish(figure, trace, "latency", "Latency distributions at one rate", caption)


def _stages(trace: TraceComparison, shown: Shown) -> Figure:
    caption = f"Where the time of answered requests went, on average, at {_common(trace)}."
    with styled(WIDTH_IN, 2 * (1.3 + 0.4 * len(trace.entries)), 2) as (figure, axes):
        _draw_stages(axes[0][0], shown[:MOST_ROWS], TTFT_STAGES, "Until the first token")
        _draw_stages(axes[1][0], shown[:MOST_ROWS], LATER_STAGES, "After the first token")
        return _finish(figure, trace, "stages", "Time by stage", caption)


def _draw_stages(axis: Any, rows: Shown, stages: Sequence[str], title: str) -> None:
    """Draw mean seconds of an answered request by stage, a bar per system."""
    from matplotlib.transforms import ScaledTranslation

    used = [stage for stage in stages if any(view.stage_means_s.get(stage, 0) > 0 for _, view in rows)]
    left = np.zeros(len(rows))
    for stage in used:
        widths = np.array([1000 * view.stage_means_s.get(stage, 0.0) for _, view in rows])
        bars = {"label": stage.replace("_", " "), "color": STAGE_COLOURS[stage], "edgecolor": "white"}
        axis.barh(range(len(rows)), widths, left=left, height=0.65, lw=0.5, **bars)
        left += widths
    name_bars(axis, [entry.title for entry, _ in rows])
    axis.set(title=title, xlabel="mean time (ms)")
    if used:
        below = axis.transAxes + ScaledTranslation(0.0, -LEGEND_BELOW_IN, axis.figure.dpi_scale_trans)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), bbox_transform=below, ncols=len(used))


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
        _draw_rate(axes[0][0], shown[0][1])
        labels: dict[str, Any] = {}
        for axis, (entry, view) in zip(axes[1:, 0], moving, strict=True):
            count = flips[entry.title]
            _draw_roles(axis, f"{entry.title}: {count} flip{'' if count == 1 else 's'}", view)
            labels |= {name: patch for patch, name in zip(*axis.get_legend_handles_labels(), strict=True)}
        axes[-1][0].set_xlabel("time (s)")
        figure.legend(labels.values(), labels.keys(), **LEGEND)
        return _finish(figure, trace, "roles", "Roles over time", caption)


def _draw_rate(axis: Any, view: RunView) -> None:
    """Draw the offered rate, as arrivals per window and smoothed."""
    at_s, smoothed = _middles(view), np.asarray(view.rate_rps)
    axis.fill_between(at_s, view.rate_rps, color="#BBBBBB", lw=0, step="mid")
    if len(smoothed) >= SMOOTH_WINDOWS:
        smoothed = _around(smoothed) / _around(np.ones(len(smoothed)))
    axis.plot(at_s, smoothed, color=INK, lw=1.4)
    axis.set(title="Offered rate", ylabel="requests/s", ylim=(0, None))


def _draw_roles(axis: Any, title: str, view: RunView) -> None:
    """Draw how many instances carry which label, stacked."""
    columns = {role: getattr(view, f"{role}_instances") for role in ROLE_COLOURS}
    used = {name: values for name, values in columns.items() if any(values)}
    colours = [ROLE_COLOURS[name] for name in used]
    axis.stackplot(view.at_s, list(used.values()), labels=list(used), colors=colours, step="post", lw=0)
    axis.set_xlim(0, view.at_s[-1] + view.window_s)
    total = max((sum(row) for row in zip(*used.values(), strict=True)), default=1.0)
    axis.set(title=title, ylabel="instances", ylim=(0, total))
    axis.grid(visible=False)
    axis.yaxis.get_major_locator().set_params(integer=True)


def _over_time(trace: TraceComparison, shown: Shown, look: dict[str, Look]) -> Figure:
    caption = f"Queues, running decodes and KV use at {_common(trace)}."
    with styled(WIDTH_IN, 8.4, len(OVER_TIME), sharex=True) as (figure, axes):
        for axis, (name, title, unit, scale) in zip(axes[:, 0], OVER_TIME, strict=True):
            for entry, view in shown:
                values = _attained_share(view) if name == "attained" else np.asarray(getattr(view, name))
                look[entry.system].line(axis, _middles(view), scale * values, entry.title, 0.7)
            axis.set(title=title, ylabel=unit)
            axis.set_ylim(bottom=0)
        axes[-1][0].set_xlabel("time (s)")
        figure.legend(*axes[0][0].get_legend_handles_labels(), **LEGEND)
        return _finish(figure, trace, "over-time", "Queues and KV use", caption)


def _middles(view: RunView) -> list[float]:
    return [at_s + view.window_s / 2 for at_s in view.at_s]


def _attained_share(view: RunView) -> Any:
    """Return the attained share over SMOOTH_WINDOWS windows around each; NaN where nothing arrived."""
    arrived = _around(np.asarray(view.rate_rps))
    met = _around(np.array([value or 0.0 for value in view.attained]) * view.rate_rps)
    return np.divide(met, arrived, out=np.full(len(met), np.nan), where=arrived > 0)


def _around(values: Any) -> Any:
    """Return the sums over SMOOTH_WINDOWS windows around each, over all where there are fewer."""
    return np.convolve(values, np.ones(min(SMOOTH_WINDOWS, len(values))), "same")

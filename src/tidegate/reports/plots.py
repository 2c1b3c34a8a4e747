"""The charts of a comparison: over rates, of latencies and stages at one rate, and over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tidegate.measure.run_view import RunView
from tidegate.reports.comparison import ComparedSystem, TraceComparison
from tidegate.reports.plot_style import (
    INK,
    ROLE_COLOURS,
    STAGE_COLOURS,
    Look,
    name_bars,
    note_along,
    note_at,
    plain_log_ticks,
)

FAR = 1.3
"""Times the highest rate that was tried: a limit beyond would squeeze the curves."""
MOST_ROWS = 24
"""Bars of a chart at most; a comparison of every split of a large fleet has more, which the CSV has."""
LEGEND_BELOW_IN = 0.5
"""From an axis to its legend: the room of its ticks and its label, however few bars it has."""
SMOOTH_WINDOWS = 5
LIMIT_LINE: dict[str, Any] = {"color": "#444444", "lw": 1, "ls": ":"}
TARGET_LINE: dict[str, Any] = {"color": "#444444", "lw": 1, "ls": (0, (4, 3))}


def draw_attainment(
    axis: Any, trace: TraceComparison, levels: Sequence[float], look: Mapping[str, Look]
) -> None:
    """Attainment over the offered rate: a point per rate, the mean over seeds, with the range over seeds."""
    fastest = 0.0
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
    for level in levels:
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


def _by_rate(entry: ComparedSystem) -> dict[float, list[float]]:
    """Return attainments by rate over the seeds of the search at the first level, and of all at that rate."""
    found: dict[float, dict[int, float]] = {}
    for level in entry.levels:
        if level.chosen == entry.levels[0].chosen:
            for each in level.probes:
                found.setdefault(each.rate_rps, {})[each.seed] = each.attainment
    return {rate: list(by_seed.values()) for rate, by_seed in found.items()}


def draw_goodput(axis: Any, trace: TraceComparison, level: float, look: Mapping[str, Look]) -> None:
    """A bar per system with its confidence interval, its value and its share of the limit."""
    rows = [(e, found) for e in trace.entries for found in e.levels if found.level == level][:MOST_ROWS]
    highest = max((found.high_rps for _, found in rows), default=0.0)
    limit_rps = next((found.limit_rps for _, found in rows if found.limit_rps), None)
    reach = max(highest, limit_rps or 0.0) or 1.0
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


def draw_cdf(
    axis: Any, trace: TraceComparison, quantity: str, target_s: float, look: Mapping[str, Look]
) -> None:
    """The distribution of ``ttft`` or ``tpot`` at the common rate, over offered requests.

    A curve ends at the share that was answered at all.
    """
    for entry in trace.entries:
        view = entry.view
        values = [] if view is None else getattr(view, f"{quantity}_quantiles_s")
        if view is None or not values:
            continue
        answered = view.answered / view.offered if view.offered else 0.0
        shares = np.linspace(0.0, 100.0 * answered, len(values))
        look[entry.system].line(axis, 1000 * np.maximum(values, 1e-6), shares, entry.title)
    axis.axvline(1000 * target_s, **TARGET_LINE)
    note_along(axis, 1000 * target_s, f"target {1000 * target_s:g} ms")
    name = quantity.upper()
    labels = {"xlabel": f"{name} (ms, log scale)", "ylabel": "requests (%)"}
    axis.set(title=name, xscale="log", ylim=(0, 101), **labels)
    plain_log_ticks(axis)


def draw_stages(axis: Any, trace: TraceComparison, stages: Sequence[str], title: str) -> None:
    """Mean seconds of an answered request by stage, a bar per system."""
    from matplotlib.transforms import ScaledTranslation

    rows = [(entry, entry.view.stage_means_s) for entry in trace.entries if entry.view is not None]
    rows = rows[:MOST_ROWS]
    used = [stage for stage in stages if any(means_s.get(stage, 0) > 0 for _, means_s in rows)]
    left = np.zeros(len(rows))
    for stage in used:
        widths = np.array([1000 * means_s.get(stage, 0.0) for _, means_s in rows])
        bars = {"label": stage.replace("_", " "), "color": STAGE_COLOURS[stage], "edgecolor": "white"}
        axis.barh(range(len(rows)), widths, left=left, height=0.65, lw=0.5, **bars)
        left += widths
    name_bars(axis, [entry.title for entry, _ in rows])
    axis.set(title=title, xlabel="mean time (ms)")
    if used:
        below = axis.transAxes + ScaledTranslation(0.0, -LEGEND_BELOW_IN, axis.figure.dpi_scale_trans)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), bbox_transform=below, ncols=len(used))


def draw_rate(axis: Any, view: RunView) -> None:
    """The offered rate, as arrivals per window and smoothed."""
    at_s, smoothed = _middles(view), np.asarray(view.rate_rps)
    axis.fill_between(at_s, view.rate_rps, color="#BBBBBB", lw=0, step="mid")
    if len(smoothed) >= SMOOTH_WINDOWS:
        smoothed = _around(smoothed) / _around(np.ones(len(smoothed)))
    axis.plot(at_s, smoothed, color=INK, lw=1.4)
    axis.set(title="Offered rate", ylabel="requests/s", ylim=(0, None))


def draw_roles(axis: Any, title: str, view: RunView) -> None:
    """How many instances carry which label, stacked."""
    columns = {role: getattr(view, f"{role}_instances") for role in ROLE_COLOURS}
    used = {name: values for name, values in columns.items() if any(values)}
    colours = [ROLE_COLOURS[name] for name in used]
    axis.stackplot(view.at_s, list(used.values()), labels=list(used), colors=colours, step="post", lw=0)
    axis.set_xlim(0, view.at_s[-1] + view.window_s)
    total = max((sum(row) for row in zip(*used.values(), strict=True)), default=1.0)
    axis.set(title=title, ylabel="instances", ylim=(0, total))
    axis.grid(visible=False)
    axis.yaxis.get_major_locator().set_params(integer=True)


def draw_over_time(
    axis: Any,
    runs: Sequence[tuple[ComparedSystem, RunView]],
    name: str,
    labels: tuple[str, str],
    look: Mapping[str, Look],
    scale: float,
) -> None:
    """One series of the views, a line per system; ``labels`` are the title and the unit."""
    for entry, view in runs:
        values = _attained_share(view) if name == "attained" else getattr(view, name)
        look[entry.system].line(axis, _middles(view), scale * np.asarray(values), entry.title, 0.7)
    axis.set(title=labels[0], ylabel=labels[1])
    axis.set_ylim(bottom=0)


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

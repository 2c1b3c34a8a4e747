"""The charts of a comparison that compare rates: attainment over rate, goodput, latencies, stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tidegate.reports.comparison import ComparedSystem, TraceComparison
from tidegate.reports.plot_style import STAGE_COLOURS, Look

FAR = 1.3
"""Times the highest rate that was tried: a limit beyond would squeeze the curves."""
MOST_ROWS = 24
"""Bars of a chart at most; a comparison of every split of a large fleet has more, which the CSV has."""


def draw_attainment(
    axis: Any, trace: TraceComparison, levels: Sequence[float], look: Mapping[str, Look]
) -> None:
    """Attainment over the offered rate: a point per rate, the mean over seeds, with the range over seeds."""
    for entry in trace.entries:
        rates = _by_rate(entry)
        if not rates:
            continue
        style = look[entry.system]
        xs = sorted(rates)
        means = [100 * float(np.mean(rates[x])) for x in xs]
        axis.plot(
            xs,
            means,
            lw=style.width,
            color=style.colour,
            marker=style.marker,
            ms=4.5,
            ls=style.dash,
            label=entry.title,
        )
        lows, highs = [100 * min(rates[x]) for x in xs], [100 * max(rates[x]) for x in xs]
        axis.fill_between(xs, lows, highs, color=style.colour, alpha=0.15, lw=0)
    for level in levels:
        axis.axhline(100 * level, color="#444444", lw=1, ls=(0, (4, 3)))
        axis.annotate(
            f"{100 * level:g} %", (1, 100 * level), xycoords=("axes fraction", "data"), fontsize=8,
            xytext=(3, 0), textcoords="offset points", va="center",
        )  # fmt: skip
    limit_rps = next((f.limit_rps for e in trace.entries for f in e.levels[:1]), None)
    fastest = max((rate for entry in trace.entries for rate in _by_rate(entry)), default=0.0)
    if limit_rps and limit_rps > FAR * fastest:
        axis.annotate(
            f"fluid limit: {limit_rps:.1f} requests/s, beyond this chart", (1, 0), xycoords="axes fraction",
            xytext=(-4, 4), textcoords="offset points", fontsize=8, ha="right", va="bottom",
        )  # fmt: skip
    elif limit_rps:
        axis.axvline(limit_rps, color="#444444", lw=1, ls=":")
        axis.annotate(
            "fluid limit", (limit_rps, 0), xycoords=("data", "axes fraction"), fontsize=8, rotation=90,
            xytext=(-3, 4), textcoords="offset points", ha="right", va="bottom",
        )  # fmt: skip
    axis.set(
        title=trace.title, xlabel="offered rate (requests/s)", ylabel="SLO attainment (%)", ylim=(0, 102)
    )
    axis.set_xlim(left=0)


def _by_rate(entry: ComparedSystem) -> dict[float, list[float]]:
    """Return attainments by rate over the seeds of the search at the first level, and of all at that rate."""
    found: dict[float, dict[int, float]] = {}
    for level in entry.levels:
        if level.chosen != entry.levels[0].chosen:
            continue
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
        error = [[found.goodput_rps - found.low_rps], [found.high_rps - found.goodput_rps]]
        axis.barh(index, found.goodput_rps, color=look[entry.system].colour, height=0.65)
        axis.errorbar(
            found.goodput_rps, index, xerr=np.maximum(error, 0.0), color="#222222", capsize=3, lw=1.2
        )
        share = "" if found.share_of_limit is None else f", {100 * found.share_of_limit:.0f} % of the limit"
        axis.annotate(
            f"{found.goodput_rps:.2f}{share}", (max(found.high_rps, found.goodput_rps), index),
            xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5,
        )  # fmt: skip
    if limit_rps:
        axis.axvline(limit_rps, color="#444444", lw=1, ls=":")
    axis.set_yticks(range(len(rows)), [_with_choice(entry, found.chosen) for entry, found in rows])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(
        title=f"{trace.title}, {100 * level:g} % attained",
        xlabel="goodput (requests/s)",
        xlim=(0, reach * 1.3),
    )


def _with_choice(entry: ComparedSystem, chosen: str) -> str:
    return f"{entry.system}\n({chosen})" if chosen else entry.system


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
        style = look[entry.system]
        answered = view.answered / view.offered if view.offered else 0.0
        shares = np.linspace(0.0, 100.0 * answered, len(values))
        axis.plot(
            1000 * np.maximum(values, 1e-6),
            shares,
            color=style.colour,
            ls=style.dash,
            lw=style.width,
            label=entry.title,
        )
    axis.axvline(1000 * target_s, color="#444444", lw=1, ls=(0, (4, 3)))
    axis.annotate(
        f"target {1000 * target_s:g} ms", (1000 * target_s, 0), xycoords=("data", "axes fraction"),
        fontsize=8, rotation=90, xytext=(-3, 4), textcoords="offset points", ha="right", va="bottom",
    )  # fmt: skip
    axis.set(
        title=f"{quantity.upper()}", xscale="log", xlabel=f"{quantity.upper()} (ms, log scale)",
        ylabel="requests (%)", ylim=(0, 101),
    )  # fmt: skip
    _plain_log_ticks(axis)


def _plain_log_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_xlim()
    few = np.log10(high / low) < 2.5
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=20))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


LEGEND_BELOW_IN = 0.5
"""From an axis to its legend: the room of its ticks and its label, however few bars it has."""


def draw_stages(axis: Any, trace: TraceComparison, stages: Sequence[str], title: str) -> None:
    """Mean seconds of an answered request by stage, a bar per system."""
    from matplotlib.transforms import ScaledTranslation

    rows = [entry for entry in trace.entries if entry.view is not None][:MOST_ROWS]
    used = [s for s in stages if any(e.view and e.view.stage_means_s.get(s, 0) > 0 for e in rows)]
    left = np.zeros(len(rows))
    for stage in used:
        widths = np.array([1000 * e.view.stage_means_s.get(stage, 0.0) if e.view else 0.0 for e in rows])
        axis.barh(
            range(len(rows)), widths, left=left, height=0.65, color=STAGE_COLOURS[stage],
            label=stage.replace("_", " "), edgecolor="white", lw=0.5,
        )  # fmt: skip
        left += widths
    axis.set_yticks(range(len(rows)), [entry.title for entry in rows])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(title=title, xlabel="mean time (ms)")
    if used:
        below = ScaledTranslation(0.0, -LEGEND_BELOW_IN, axis.figure.dpi_scale_trans)
        axis.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            bbox_transform=axis.transAxes + below,
            ncols=len(used),
        )

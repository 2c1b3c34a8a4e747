"""The charts of a comparison's report."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tidegate.core.slo import Slo
from tidegate.core.stages import LATER_STAGES, TTFT_STAGES
from tidegate.measure.run_view import RunView
from tidegate.reports.charts import (
    Bar,
    Bars,
    Chart,
    Curve,
    Mark,
    Panel,
    Part,
    Range,
    alike_text,
    distribution,
    told_apart,
)
from tidegate.reports.comparison import ComparedSystem, Comparison, LevelGoodput, TraceComparison
from tidegate.reports.looks import ROLE_TONES, STAGE_TONES, Look, looks

MOST_ROWS = 24
"""Bars of a chart at most; a comparison of every split of a large fleet has more, which the CSV has."""
MOST_ROLE_ROWS = 6
SMOOTH_WINDOWS = 5
GRID_POINTS = 160
ROOM = 1.3
"""Times the longest bar: the room that a chart of bars has."""
OVER_TIME = (
    ("prefill_queue_s", "Prefill work queued, all instances", "s", 1.0),
    ("decode_requests", "Running decodes", "requests", 1.0),
    ("kv_share", "KV in use, of all instances", "%", 100.0),
)
"""Series of a view, with title and unit, and the factor to that unit."""

Shown = list[tuple[ComparedSystem, RunView]]


def comparison_charts(comparison: Comparison) -> list[Chart]:
    """Return every chart of the report, in its order."""
    look = looks(comparison.systems)
    return [chart for trace in comparison.traces for chart in _of_trace(comparison, trace, look)]


def _of_trace(comparison: Comparison, trace: TraceComparison, look: Mapping[str, Look]) -> Iterator[Chart]:
    shown = [(entry, entry.view) for entry in trace.entries if entry.view is not None]
    if any(found.probes for entry in trace.entries for found in entry.levels):
        yield _attainment(comparison, trace, look)
    if comparison.levels:
        yield _goodput(comparison, trace, look)
    if shown:
        yield _attained(trace, shown, look)
        yield _latency(trace, shown, Slo.parse(comparison.slo), look)
        yield _stages(trace, shown)
        yield _roles(trace, shown)
        yield _over_time(trace, shown, look)


def _chart(
    trace: TraceComparison, kind: str, heading: str, caption: str, panels: Sequence[Panel | Bars]
) -> Chart:
    name = f"{re.sub(r'[^A-Za-z0-9]+', '-', trace.title).strip('-').lower()}-{kind}"
    return Chart(name, trace.title, heading, caption + alike_text(panels), tuple(panels))


def _common(trace: TraceComparison) -> str:
    if trace.common_rate_rps is None:
        return "one rate"
    return f"{trace.common_rate_rps:.2f} requests/s ({trace.common_rate_is})"


def _attainment(comparison: Comparison, trace: TraceComparison, look: Mapping[str, Look]) -> Chart:
    several = any(found.seeds > 1 for entry in trace.entries for found in entry.levels[:1])
    caption = f"Share of offered requests that met {comparison.slo}, over the offered rate: " + (
        "the mean of the seeds' own curves, and the band from the lowest to the highest of them. "
        "Every value has all seeds in it."
        if several
        else "the runs of the goodput search, one seed."
    )
    curves = told_apart(
        curve for entry in trace.entries if (curve := _rates(entry, look[entry.system])) is not None
    )
    marks = [Mark("y", 100 * level, f"{100 * level:g} %") for level in comparison.levels]
    limit_rps = next((f.limit_rps for e in trace.entries for f in e.levels[:1] if f.limit_rps), None)
    if limit_rps:
        marks.append(Mark("x", limit_rps, f"fluid limit {limit_rps:.1f} requests/s"))
        caption += (
            f" The fluid limit is {limit_rps:.1f} requests/s: no schedule on this hardware goes beyond."
        )
    panel = Panel(
        "",
        "offered rate (requests/s)",
        "SLO attainment (%)",
        curves,
        tuple(marks),
        _focus(trace, comparison.levels),
        (0.0, 101.0),
    )
    return _chart(trace, "attainment", "Attainment over rate", caption, [panel])


def _focus(trace: TraceComparison, levels: Sequence[float]) -> tuple[Range, Range] | None:
    """Return the rates and shares between which systems are decided; None where none has a goodput."""
    goodputs = [found.goodput_rps for e in trace.entries for found in e.levels if found.goodput_rps > 0]
    if not goodputs:
        return None
    most_missed = 100 * (1 - min(levels))
    below = max(0.0, 100 - 2.5 * most_missed)
    return (0.8 * min(goodputs), 1.12 * max(goodputs)), (below, 100 + 0.05 * (100 - below))


def _rates(entry: ComparedSystem, look: Look) -> Curve | None:
    """Return the mean over seeds of each seed's own curve, where all seeds have one."""
    by_seed: dict[int, dict[float, float]] = {}
    for level in entry.levels:
        if level.chosen == entry.levels[0].chosen:
            for run in level.probes:
                by_seed.setdefault(run.seed, {})[run.rate_rps] = 100 * run.attainment
    if not by_seed:
        return None
    most = max(len(runs) for runs in by_seed.values())
    used = [sorted(runs.items()) for runs in by_seed.values() if 2 * len(runs) >= most or len(by_seed) == 1]
    low, high = max(runs[0][0] for runs in used), min(runs[-1][0] for runs in used)
    rates = sorted({rate for runs in used for rate, _ in runs if low <= rate <= high})
    table = np.array([np.interp(rates, [r for r, _ in runs], [share for _, share in runs]) for runs in used])
    if len(used) == 1:
        return Curve(entry.title, look, rates, table[0].tolist(), dots=True)
    ends = table.min(axis=0).tolist(), table.max(axis=0).tolist()
    return Curve(entry.title, look, rates, table.mean(axis=0).tolist(), *ends)


def _goodput(comparison: Comparison, trace: TraceComparison, look: Mapping[str, Look]) -> Chart:
    caption = "The highest offered rate whose attainment is at least the level"
    found = [found for entry in trace.entries for found in entry.levels]
    several = any(each.seeds > 1 for each in found)
    caption += (
        ", with its 95 % interval over seeds." if several else "; from one seed, so without an interval."
    )
    reach = ROOM * max([each.high_rps for each in found] + [each.limit_rps or 0.0 for each in found])
    panels = [_goodput_bars(trace, level, look, reach or 1.0) for level in comparison.levels]
    return _chart(trace, "goodput", "Goodput", caption, panels)


def _goodput_bars(trace: TraceComparison, level: float, look: Mapping[str, Look], reach: float) -> Bars:
    rows = [(e, found) for e in trace.entries for found in e.levels if found.level == level][:MOST_ROWS]
    limit_rps = next((found.limit_rps for _, found in rows if found.limit_rps), None)
    mark = None if limit_rps is None else Mark("x", limit_rps, f"fluid limit {limit_rps:.1f}")
    bars = [
        Bar(
            f"{entry.system} ({found.chosen})" if found.chosen else entry.system,
            (Part("goodput", look[entry.system].tone, found.goodput_rps),),
            _goodput_text(found),
            (found.low_rps, found.high_rps) if found.seeds > 1 else None,
        )
        for entry, found in rows
    ]
    return Bars(f"{100 * level:g} % attained", "requests/s", tuple(bars), reach, mark)


def _goodput_text(found: LevelGoodput) -> str:
    share = "" if found.share_of_limit is None else f" · {100 * found.share_of_limit:.0f} % of limit"
    return f"{found.goodput_rps:.2f}{share}"


def _attained(trace: TraceComparison, shown: Shown, look: Mapping[str, Look]) -> Chart:
    caption = (
        f"Of what arrived at each time, the share that met its SLO, at {_common(trace)}, "
        f"averaged over {SMOOTH_WINDOWS} windows.{_real_time(trace)}"
    )
    curves = told_apart(
        Curve(entry.title, look[entry.system], _middles(view), _attained_share(view)) for entry, view in shown
    )
    panel = Panel("", "time (s)", "attained (%)", curves, y_range=(0.0, 101.0), also=_also(trace))
    return _chart(trace, "attained", "Attained, by arrival", caption, [panel])


def _also(trace: TraceComparison) -> tuple[float, str] | None:
    if not trace.common_rate_rps or not trace.own_rate_rps:
        return None
    factor = trace.common_rate_rps / trace.own_rate_rps
    return None if abs(factor - 1) < 0.005 else (factor, "s of the trace")


def _real_time(trace: TraceComparison) -> str:
    also = _also(trace)
    if also is None:
        return ""
    return f" The rate scales the trace's time: 1 s of a run is {also[0]:.3g} s of the trace."


def _latency(trace: TraceComparison, shown: Shown, slo: Slo, look: Mapping[str, Look]) -> Chart:
    """Distributions of TTFT and TPOT at the common rate, over offered requests."""
    caption = (
        f"Share of offered requests whose latency is at most this, at {_common(trace)}. "
        "A curve ends at the share that was answered."
    )
    panels = []
    for name, target_s in (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s)):
        values = [
            (entry, view, 1000 * np.maximum(found, 1e-6))
            for entry, view in shown
            if (found := getattr(view, f"{name.lower()}_quantiles_s"))
        ]
        if not values:
            continue
        low, high = min(v[1] for *_, v in values), max([v[-1] for *_, v in values] + [1500 * target_s])
        grid = np.geomspace(low, max(high, 1.01 * low), GRID_POINTS).tolist()
        curves = told_apart(
            distribution(e.title, look[e.system], v, view.answered / max(1, view.offered), grid)
            for e, view, v in values
        )
        marks = (Mark("x", 1000 * target_s, f"target {1000 * target_s:g} ms"),)
        x = f"{name} (ms, log scale)"
        panels.append(Panel(name, x, "requests (%)", curves, marks, y_range=(0.0, 101.0), log_x=True))
    return _chart(trace, "latency", "Latency distributions at one rate", caption, panels)


def _stages(trace: TraceComparison, shown: Shown) -> Chart:
    caption = f"Where the time of answered requests went, on average, at {_common(trace)}."
    views = [(entry.title, view.stage_means_s) for entry, view in shown[:MOST_ROWS]]
    return _chart(trace, "stages", "Time by stage", caption, stage_bars(views))


def stage_bars(rows: Sequence[tuple[str, Mapping[str, float]]]) -> list[Bars]:
    """Return bars of mean seconds by stage until the first token, and after it."""
    titles = ((TTFT_STAGES, "Until the first token"), (LATER_STAGES, "After the first token"))
    found = []
    for stages, title in titles:
        bars = []
        for label, means_s in rows:
            parts = [
                Part(stage.replace("_", " "), STAGE_TONES[stage], 1000 * means_s[stage])
                for stage in stages
                if means_s.get(stage, 0.0) > 0
            ]
            bars.append(Bar(label, tuple(parts), f"{sum(part.value for part in parts):,.1f}"))
        reach = max((sum(part.value for part in bar.parts) for bar in bars), default=0.0)
        found.append(Bars(title, "ms", tuple(bars), ROOM * reach or 1.0))
    return found


def _roles(trace: TraceComparison, shown: Shown) -> Chart:
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
        f"Labels of the instances over time at {_common(trace)}, under the offered rate "
        f"(thin: arrivals, thick: smoothed).{left_out}{_real_time(trace)}"
    )
    also = _also(trace)
    panels = [_rate_panel(shown[0][1], also)]
    for entry, view in moving:
        count = flips[entry.title]
        title = f"{entry.title}: {count} flip{'' if count == 1 else 's'}"
        panels.append(_roles_panel(title, view, also))
    return _chart(trace, "roles", "Roles over time", caption, panels)


def _rate_panel(view: RunView, also: tuple[float, str] | None) -> Panel:
    """The offered rate, as arrivals per window and smoothed."""
    rates = np.asarray(view.rate_rps)
    smooth = _around(rates) / _around(np.ones(len(rates))) if len(rates) >= SMOOTH_WINDOWS else rates
    at_s = _middles(view)
    curves = (
        Curve("arrivals", Look(7), at_s, view.rate_rps, width=1.0),
        Curve("smoothed", Look(6), at_s, smooth.tolist(), width=2.4),
    )
    return Panel("Offered rate", "time (s)", "requests/s", curves, also=also)


def _roles_panel(title: str, view: RunView, also: tuple[float, str] | None) -> Panel:
    """How many instances carry which label, stacked."""
    columns = {role: getattr(view, f"{role}_instances") for role in ROLE_TONES}
    used = {name: values for name, values in columns.items() if any(values)}
    curves = tuple(Curve(name, Look(ROLE_TONES[name]), view.at_s, values) for name, values in used.items())
    total = max((sum(row) for row in zip(*used.values(), strict=True)), default=1.0)
    return Panel(title, "time (s)", "instances", curves, y_range=(0.0, total), stacked=True, also=also)


def _over_time(trace: TraceComparison, shown: Shown, look: Mapping[str, Look]) -> Chart:
    caption = f"Queues, running decodes and KV use at {_common(trace)}.{_real_time(trace)}"
    panels = []
    for name, title, unit, scale in OVER_TIME:
        curves = told_apart(
            Curve(entry.title, look[entry.system], _middles(view), [scale * y for y in getattr(view, name)])
            for entry, view in shown
        )
        panels.append(Panel(title, "time (s)", unit, curves, also=_also(trace)))
    return _chart(trace, "over-time", "Queues and KV use", caption, panels)


def _middles(view: RunView) -> list[float]:
    return [at_s + view.window_s / 2 for at_s in view.at_s]


def _attained_share(view: RunView) -> list[float | None]:
    """Return the attained share (%) over SMOOTH_WINDOWS windows around each; None where nothing arrived."""
    arrived = _around(np.asarray(view.rate_rps))
    met = _around(np.array([value or 0.0 for value in view.attained]) * view.rate_rps)
    return [100 * m / a if a > 0 else None for m, a in zip(met.tolist(), arrived.tolist(), strict=True)]


def _around(values: np.ndarray) -> np.ndarray:
    """Return the sums over SMOOTH_WINDOWS windows around each, over all where there are fewer."""
    return np.convolve(values, np.ones(min(SMOOTH_WINDOWS, len(values))), "same")

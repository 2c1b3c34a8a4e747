"""One run, a journal or a bench result, as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

import numpy as np

from tidegate.core.slo import Slo
from tidegate.core.stages import LATER_STAGES, OTHER, TTFT_STAGES
from tidegate.journal.reader import Journal
from tidegate.journal.schema import FlipLine, InstanceLine
from tidegate.measure.attainment import Attainment, Goodput, Observation, class_title, too_short
from tidegate.measure.percentiles import Summary
from tidegate.reports.bench_report import BenchReport
from tidegate.reports.charts import Bars, Chart, Curve, Mark, Panel, distribution
from tidegate.reports.comparison_charts import GRID_POINTS, stage_bars
from tidegate.reports.html import answer_box, document, figure, note, part_names, part_rows, table, warning
from tidegate.reports.journal_report import RunReport
from tidegate.reports.looks import ROLE_TONES, Look

MOST_WINDOWS = 120
LEAST_IN_WINDOW = 10
"""Requests of a window, on average: a share of fewer jumps about."""
MOST_QUANTILES = 400
MOST_FLIPS = 200
ATTAINED, OFFERED, FIRST, LATER = Look(2), Look(7), Look(0), Look(1)


def journal_page(report: RunReport, journal: Journal, seen: Sequence[Observation]) -> str:
    """Return the page of a journal."""
    charts = [*_service_charts(seen, report.slo), _roles(journal), *_stages(report)]
    shown = [chart for chart in charts if chart is not None]
    latencies = {
        "TTFT": report.ttft_s,
        **{f"of it: {_words(name)}": found for name, found in report.stages_of_ttft_s.items()},
        "TPOT": report.tpot_s,
        **{f"later: {_words(name)}": found for name, found in report.stages_after_first_token_s.items()},
        "end to end": report.e2e_s,
    }
    happened = (
        f"Labels changed {len(report.flips)} times, decodes moved {report.migrations} times, and "
        f"{report.replayed_requests} requests were replayed."
    )
    title = report.system or "a run"
    parts = [
        *_top(title, report.attainment, report.goodput, report.slo, report.outcomes, seen, report.notes),
        note(escape(happened)),
        *map(_chart, shown),
        "<h3>Latencies of successful requests (ms)</h3>",
        _latencies(latencies),
        note(escape(f"other: {OTHER}.")) if report.stages_of_ttft_s else "",
        "<h3>Outcomes</h3>",
        _outcomes(report.outcomes),
        "<h3>Flips, and why</h3>" if report.flips else "",
        _flips(report) if report.flips else "",
        "<h3>Instances</h3>" if report.instances else "",
        _instances(report) if report.instances else "",
        "<h3>Decisions</h3>",
        table(["decision", "count"], [[escape(_words(k)), f"{n:,}"] for k, n in report.decisions.items()]),
    ]
    return document(title, parts, "report")


def bench_page(report: BenchReport, seen: Sequence[Observation]) -> str:
    """Return the page of a bench result."""
    itl = ("ITL", report.itl_s) if report.itl_s is not None else ("ITL, p99 of each", report.itl_p99_s)
    latencies = dict((("TTFT", report.ttft_s), ("TPOT", report.tpot_s), itl, ("end to end", report.e2e_s)))
    totals = [
        ["answered", f"{report.successful:,}"],
        ["failed", f"{report.failed:,}"],
        ["late sends", f"{report.late_sends:,}"],
        ["input tokens", f"{report.input_tokens:,}"],
        ["output tokens", f"{report.output_tokens:,}"],
        ["requests/s answered", _number(report.per_second(report.successful))],
        ["output tokens/s", _number(report.per_second(report.output_tokens))],
    ]
    notes = report.notes
    users = report.concurrency
    title = "a load run" if users is None else f"a closed loop, concurrency {users}"
    parts = [
        *_top(title, report.attainment, report.goodput, report.slo, report.outcomes, seen, notes),
        *(_chart(chart) for chart in _service_charts(seen, report.slo)),
        "<h3>Latencies of successful requests (ms)</h3>",
        _latencies(latencies),
        *_classes(report),
        "<h3>Outcomes</h3>",
        _outcomes(report.outcomes),
        "<h3>Totals</h3>",
        table(["", ""], totals),
    ]
    return document(title, parts, "report")


def _classes(report: BenchReport) -> list[str]:
    rows = [
        [
            escape(class_title(name, str(found.slo))),
            f"{found.attainment.offered:,}",
            *map(
                _percent, (found.attainment.share, found.attainment.ttft_share, found.attainment.tpot_share)
            ),
        ]
        for name, found in report.classes.items()
    ]
    head = ["SLO class", "requests", "attained", "TTFT", "TPOT"]
    return ["<h3>Attained, by SLO class</h3>", table(head, rows)] if rows else []


def _top(
    title: str,
    attainment: Attainment,
    goodput: Goodput,
    slo: Slo | None,
    outcomes: Mapping[str, int],
    seen: Sequence[Observation],
    notes: Sequence[str],
) -> list[str]:
    """Return the answer: whether the level was met, and what was missed."""
    targets = "their own SLO" if slo is None else str(slo)
    level = f"{100 * goodput.level:g} %"
    if not attainment.offered:
        return [f"<h1>{escape(title)}: no request has ended</h1>", *map(warning, notes)]
    met = "met" if goodput.level_met else "missed"
    share = _percent(attainment.share)
    head = f"{share} of {attainment.offered:,} requests attained {targets}: {level} is {met}"
    span_s = seen[-1].arrival_s - seen[0].arrival_s if seen else 0.0
    rate = "" if goodput.offered_rps is None else f", {goodput.offered_rps:.2f} requests/s offered"
    found = [
        f"TTFT was within target for {_percent(attainment.ttft_share)}, TPOT for "
        f"{_percent(attainment.tpot_share)} of the offered requests."
    ]
    failed = {label: count for label, count in outcomes.items() if label != "ok"}
    if failed:
        said = ", ".join(f"{count:,} {label}" for label, count in failed.items())
        found.append(f"Not answered in full, and counted as misses unless malformed: {said}.")
    if goodput.attained_rps is not None:
        found.append(f"Of the offered rate, {goodput.attained_rps:.2f} requests/s attained.")
    short = too_short(attainment.offered, span_s, goodput.level)
    return [
        f"<h1>{escape(head)}</h1>",
        f'<p class="lead">{escape(title)}, arrivals over {span_s:,.1f} s{rate}</p>',
        warning(f"This run is {short}." if short else ""),
        answer_box(found),
        *(warning(f"{text}.") for text in notes),
    ]


def _service_charts(seen: Sequence[Observation], slo: Slo | None) -> list[Chart]:
    if len(seen) < 2:
        return []
    arrivals_s = np.array([each.arrival_s for each in seen])
    windows = max(1, min(MOST_WINDOWS, len(seen) // LEAST_IN_WINDOW))
    offered, edges = np.histogram(arrivals_s, windows)
    met, _ = np.histogram(arrivals_s[[each.attained for each in seen]], edges)
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()
    share = [100 * m / n if n else None for m, n in zip(met.tolist(), offered.tolist(), strict=True)]
    rate = (offered / max(1e-9, float(edges[1] - edges[0]))).tolist()
    panels = (
        Panel(
            "", "time (s)", "attained (%)", (Curve("attained", ATTAINED, middles, share),), y_range=(0, 101)
        ),
        Panel("Offered rate", "time (s)", "requests/s", (Curve("offered", OFFERED, middles, rate),)),
    )
    by_arrival = Chart("run-attained", "", "Attained, by arrival", "Of what arrived in each window.", panels)
    found = [
        panel
        for name, look in (("TTFT", FIRST), ("TPOT", LATER))
        if (panel := _distribution(name, look, seen, slo)) is not None
    ]
    caption = (
        "Share of offered requests whose latency is at most this; a curve ends at the share that has one."
    )
    return [by_arrival, Chart("run-latency", "", "Latency distributions", caption, tuple(found))]


def _distribution(name: str, look: Look, seen: Sequence[Observation], slo: Slo | None) -> Panel | None:
    attribute = f"{name.lower()}_s"
    known = [value for each in seen if each.ok and (value := getattr(each, attribute)) is not None]
    if not known:
        return None
    values = 1000 * np.maximum(np.quantile(known, np.linspace(0, 1, MOST_QUANTILES + 1)), 1e-6)
    target_ms = None if slo is None else 1000 * float(getattr(slo, attribute))
    high = max(values[-1], 1.5 * (target_ms or 0.0), 1.01 * values[0])
    grid = np.geomspace(values[0], high, GRID_POINTS).tolist()
    curve = distribution(name, look, values.tolist(), len(known) / len(seen), grid)
    marks = () if target_ms is None else (Mark("x", target_ms, f"target {target_ms:g} ms"),)
    x = f"{name} (ms, log scale)"
    return Panel(name, x, "requests (%)", (curve,), marks, y_range=(0.0, 101.0), log_x=True)


def _roles(journal: Journal) -> Chart | None:
    """The labels over time: as the journal began, changed by flips and by instances that come and go."""
    if not journal.roles and not journal.instance_events:
        return None
    now = dict(journal.roles) if not any(e.event == "up" for e in journal.instance_events) else {}
    at_s, rows = [0.0], [_counts(now)]
    events: list[FlipLine | InstanceLine] = [*journal.flips, *journal.instance_events]
    for event in sorted(events, key=lambda event: event.t_s):
        if isinstance(event, FlipLine):
            now[event.instance] = event.to_role
        elif event.event == "up":
            now[event.instance] = event.role or journal.roles.get(event.instance, "mixed")
        elif event.event == "down":
            now.pop(event.instance, None)
        else:
            continue
        at_s.append(event.t_s)
        rows.append(_counts(now))
    at_s.append(max(journal.last_t_s, at_s[-1]))
    rows.append(rows[-1])
    used = [role for role in ROLE_TONES if any(row[role] for row in rows)]
    curves = tuple(Curve(r, Look(ROLE_TONES[r]), at_s, [float(row[r]) for row in rows]) for r in used)
    if not curves:
        return None
    most = max(sum(row.values()) for row in rows)
    panel = Panel("", "time (s)", "instances", curves, y_range=(0.0, float(most)), stacked=True)
    return Chart("run-roles", "", "Roles over time", "Instances that are up, by label.", (panel,))


def _counts(labels: Mapping[str, str]) -> dict[str, int]:
    return {role: sum(label == role for label in labels.values()) for role in ROLE_TONES}


def _stages(report: RunReport) -> Iterator[Chart]:
    found = {**report.stages_of_ttft_s, **report.stages_after_first_token_s}
    means_s = {name: found[name].mean for name in (*TTFT_STAGES, *LATER_STAGES) if name in found}
    if means_s:
        caption = "Where the time of the requests that had the stage went, on average."
        bars = stage_bars([(report.system or "this run", means_s)])
        yield Chart("run-stages", "", "Time by stage", caption, tuple(bars))


def _chart(chart: Chart) -> str:
    bars = [panel for panel in chart.panels if isinstance(panel, Bars)]
    numbers = table(["mean (ms)", *part_names(bars)], part_rows(bars)) if bars else ""
    return figure(chart) + numbers


def _latencies(named: Mapping[str, Summary | None]) -> str:
    rows = [
        [escape(name), f"{s.count:,}", *(f"{1000 * v:,.1f}" for v in (s.mean, s.p50, s.p90, s.p99, s.max))]
        for name, s in named.items()
        if s is not None
    ]
    return table(["", "count", "mean", "p50", "p90", "p99", "max"], rows)


def _outcomes(outcomes: Mapping[str, int]) -> str:
    ended = sum(outcomes.values()) or 1
    return table(
        ["outcome", "requests", "share"],
        [[escape(label), f"{count:,}", _percent(count / ended)] for label, count in outcomes.items()],
    )


def _flips(report: RunReport) -> str:
    rows = [
        [f"{f.t_s:.2f}", escape(f.instance), f"{f.from_role} to {f.to_role}", escape(f.why or f.reason)]
        for f in report.flips[:MOST_FLIPS]
    ]
    more = len(report.flips) - len(rows)
    found = table(["t (s)", "instance", "flip", "why"], rows, text=(3,))
    return found + (note(f"And {more} more.") if more else "")


def _instances(report: RunReport) -> str:
    head = ["instance", "first role", "prefills", "decodes", "prompt", "cached", "generated", "busy"]
    rows = [
        [
            escape(work.instance),
            work.first_role or "?",
            *(f"{n:,}" for n in (work.prefills, work.decodes)),
            *(f"{n:,}" for n in (work.prompt_tokens, work.cached_tokens, work.generated_tokens)),
            "n/a" if work.busy_share is None else _percent(work.busy_share),
        ]
        for work in report.instances
    ]
    return table(head, rows) + note("prompt, cached and generated in tokens.")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:,.2f}"

"""The report of a journal: outcomes, latencies by stage, and decisions, as data and as Rich tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from msgspec import UNSET, structs
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tidegate.core.slo import Slo
from tidegate.core.stages import LATER_STAGES, OTHER, TTFT_STAGES, parts_of_ttft
from tidegate.journal.reader import Journal
from tidegate.journal.schema import ControlLine, FlipLine, InstanceLine, OutcomeLine
from tidegate.measure.attainment import DEFAULT_LEVEL, Attainment, Goodput, Observation, goodput, score
from tidegate.measure.instance_time import up_s
from tidegate.measure.percentiles import Summary, summarize
from tidegate.reports.forecast_errors import ForecastErrors, forecast_errors, forecast_rows
from tidegate.reports.length_errors import LengthErrors, length_errors, length_rows

MOST_FLIPS = 20
"""Rows of the table of flips."""


@dataclass(frozen=True, slots=True)
class InstanceWork:
    """What one instance did. ``busy_share`` is the share of the run in which requests prefilled or decoded on
    it, by the outcomes' stages; None without stage times."""

    instance: str
    first_role: str
    prefills: int
    decodes: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    busy_share: float | None


@dataclass(frozen=True, slots=True)
class PrefillPrediction:
    """Relative error of the predicted prefill time, (predicted - observed)/observed; ``bias`` is its median,
    positive when predictions are too long."""

    count: int
    median_abs_error: float
    p90_abs_error: float
    bias: float


@dataclass(frozen=True, slots=True)
class ControllerWork:
    """How often a controller gave another reason, the flips it asked for with them, and the last reason."""

    controller: str
    reasons: int
    flips: int
    last_reason: str


@dataclass(frozen=True, slots=True)
class RunReport:
    """A journal in numbers; times in seconds. ``start_s`` is from asked for to up, by label."""

    system: str
    version: str
    slo: Slo | None
    duration_s: float
    outcomes: dict[str, int]
    unfinished: int
    attainment: Attainment
    goodput: Goodput
    ttft_s: Summary | None
    tpot_s: Summary | None
    e2e_s: Summary | None
    stages_of_ttft_s: dict[str, Summary]
    stages_after_first_token_s: dict[str, Summary]
    decisions: dict[str, int]
    flips: tuple[FlipLine, ...]
    flip_counts: dict[str, int]
    controllers: tuple[ControllerWork, ...]
    instance_events: tuple[InstanceLine, ...]
    instance_hours: float
    start_s: dict[str, Summary]
    forecasts: tuple[ForecastErrors, ...]
    replays: int
    replayed_requests: int
    migrations: int
    instances: tuple[InstanceWork, ...]
    prediction: PrefillPrediction | None
    lengths: tuple[LengthErrors, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the whole report as one JSON object."""
        value = asdict(self)
        value["flips"] = [structs.asdict(flip) for flip in self.flips]
        value["instance_events"] = [
            {name: each for name, each in structs.asdict(event).items() if each is not UNSET}
            for event in self.instance_events
        ]
        value["attainment"] |= attainment_shares(self.attainment)
        return value


def attainment_shares(attainment: Attainment) -> dict[str, float]:
    """Return the shares that a report's JSON has beside the counts."""
    return {name: getattr(attainment, name) for name in ("share", "ttft_share", "tpot_share")}


def build_report(journal: Journal, *, slo: Slo | None = None, level: float = DEFAULT_LEVEL) -> RunReport:
    """Score a journal. ``slo`` overrides the SLOs on record (each request's own, else the header's).

    Without either, Slo's defaults apply and a note says so. Every outcome counts as offered except
    those of requests that were wrong in themselves (``REFUSALS``); a client that left counts as a miss.
    """
    outcomes = _scored(journal)
    flip_kinds = Counter(f"{f.from_role} to {f.to_role}, {f.reason or 'no reason'}" for f in journal.flips)
    good = [o for o in outcomes if o.ok]
    fallback = slo or journal.slo or Slo()
    attainment = score(observations(journal, slo))
    own = {o.slo for o in outcomes if o.slo is not None}
    return RunReport(
        system=journal.system,
        version=journal.version,
        slo=slo or (next(iter(own)) if len(own) == 1 else None if own else fallback),
        duration_s=journal.last_t_s,
        outcomes=dict(Counter(o.outcome for o in journal.outcomes).most_common()),
        unfinished=journal.unfinished,
        attainment=attainment,
        goodput=goodput(attainment, [o.arrival_s for o in outcomes], level),
        ttft_s=summarize(o.ttft_s for o in good),
        tpot_s=summarize(o.tpot_s for o in good),
        e2e_s=summarize(o.e2e_s for o in good),
        stages_of_ttft_s=_stages(map(_divided, good), TTFT_STAGES),
        stages_after_first_token_s=_stages([o.stages_s for o in good], LATER_STAGES),
        decisions=dict(journal.decisions.most_common()),
        flips=tuple(journal.flips),
        flip_counts=dict(flip_kinds.most_common()),
        controllers=tuple(_controllers(journal.controls)),
        instance_events=tuple(journal.instance_events),
        instance_hours=up_s(journal.instance_events, journal.last_t_s) / 3600.0,
        start_s=_start_times(journal.instance_events),
        forecasts=forecast_errors(journal.forecasts),
        replays=sum(o.replays for o in outcomes),
        replayed_requests=sum(o.replays > 0 for o in outcomes),
        migrations=sum(o.migrations for o in outcomes),
        instances=_instance_use(journal),
        prediction=_prediction(good),
        lengths=length_errors(good),
        notes=_notes(journal, slo, own),
    )


def _scored(journal: Journal) -> list[OutcomeLine]:
    return sorted((o for o in journal.outcomes if not o.refused), key=lambda o: o.arrival_s)


def observations(journal: Journal, slo: Slo | None) -> list[Observation]:
    """Return what is scored of a journal, by arrival."""
    fallback = journal.slo or Slo()
    return [
        Observation(o.arrival_s, o.ok, o.ttft_s, o.tpot_s, slo or o.slo or fallback) for o in _scored(journal)
    ]


def _notes(journal: Journal, slo: Slo | None, own: set[Slo]) -> tuple[str, ...]:
    notes = []
    if journal.truncated:
        notes.append("the last line is cut off: the writer was stopped in the middle of it")
    if journal.unfinished:
        notes.append(
            f"requests with a decision but no outcome: {journal.unfinished} (still running, or the gateway "
            "was stopped); they are not scored"
        )
    refused = sum(o.refused for o in journal.outcomes)
    if refused:
        notes.append(f"requests refused as malformed: {refused}; they are counted by outcome, not scored")
    if slo is None and not own and journal.slo is None:
        notes.append(f"the journal names no SLO; scored against the default {Slo()}")
    return tuple(notes)


def _controllers(lines: Sequence[ControlLine]) -> Iterator[ControllerWork]:
    by_name: dict[str, list[ControlLine]] = {}
    for line in lines:
        by_name.setdefault(line.controller, []).append(line)
    for name, own in by_name.items():
        yield ControllerWork(name, len(own), sum(line.flips for line in own), own[-1].reason)


def _start_times(events: Iterable[InstanceLine]) -> dict[str, Summary]:
    by_role: dict[str, list[float]] = {}
    for event in events:
        if event.start_s is not UNSET:
            by_role.setdefault(event.role, []).append(event.start_s)
    found = {role: summarize(times_s) for role, times_s in by_role.items()}
    return {role: summary for role, summary in found.items() if summary is not None}


def _divided(outcome: OutcomeLine) -> Mapping[str, float]:
    """Return the stages of a request's TTFT. Journals of version 0.1.0 did not name what is left of it."""
    known = outcome.ttft_s is not None and "prefill" in outcome.stages_s
    return parts_of_ttft(outcome.ttft_s or 0.0, outcome.stages_s) if known else {}


def _stages(found_s: Iterable[Mapping[str, float]], names: Sequence[str]) -> dict[str, Summary]:
    by_request = list(found_s)
    found = {stage: summarize(stages_s.get(stage) for stages_s in by_request) for stage in names}
    return {stage: summary for stage, summary in found.items() if summary is not None}


def _prediction(good: Sequence[OutcomeLine]) -> PrefillPrediction | None:
    errors = np.array(
        [
            (o.predicted_prefill_s - o.observed_prefill_s) / o.observed_prefill_s
            for o in good
            if o.predicted_prefill_s is not None and o.observed_prefill_s
        ]
    )
    if errors.size == 0:
        return None
    median, p90 = np.percentile(np.abs(errors), (50, 90)).tolist()
    return PrefillPrediction(errors.size, median, p90, float(np.median(errors)))


def _instance_use(journal: Journal) -> tuple[InstanceWork, ...]:
    roles = dict(journal.roles)
    for event in journal.instance_events:
        roles.setdefault(event.instance, event.role)
    for outcome in journal.outcomes:
        for name in (outcome.prefill_on, outcome.decoded_on):
            if name:
                roles.setdefault(name, "")
    return tuple(_work_of(name, role, journal) for name, role in sorted(roles.items()))


def _work_of(name: str, role: str, journal: Journal) -> InstanceWork:
    prefilled = [o for o in journal.outcomes if o.prefill_on == name]
    decoded = [o for o in journal.outcomes if o.decoded_on == name and o.output_tokens > 0]
    intervals = [*_prefill_intervals(prefilled), *_decode_intervals(decoded)]
    return InstanceWork(
        instance=name,
        first_role=role,
        prefills=len(prefilled),
        decodes=len(decoded),
        prompt_tokens=sum(o.input_tokens for o in prefilled),
        cached_tokens=sum(o.cached_tokens for o in prefilled),
        generated_tokens=sum(o.output_tokens for o in decoded),
        busy_share=_union_s(intervals) / journal.last_t_s if intervals and journal.last_t_s > 0 else None,
    )


def _prefill_intervals(outcomes: Iterable[OutcomeLine]) -> Iterator[tuple[float, float]]:
    for outcome in outcomes:
        if outcome.e2e_s is not None and "prefill" in outcome.stages_s:
            start_s = outcome.end_s - outcome.e2e_s + outcome.stages_s.get("queue", 0.0)
            yield start_s, start_s + outcome.stages_s["prefill"]


def _decode_intervals(outcomes: Iterable[OutcomeLine]) -> Iterator[tuple[float, float]]:
    for outcome in outcomes:
        if "decode" in outcome.stages_s:
            length_s = outcome.stages_s["decode"] + outcome.stages_s.get("first_step", 0.0)
            yield outcome.end_s - length_s, outcome.end_s


def _union_s(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the total time covered by possibly overlapping intervals."""
    total_s, reach_s = 0.0, float("-inf")
    for start_s, end_s in sorted(intervals):
        total_s += max(0.0, end_s - max(start_s, reach_s))
        reach_s = max(reach_s, end_s)
    return total_s


def render_report(report: RunReport) -> Group:
    """Return the report for a terminal; latencies in milliseconds."""
    spaced = [part for table in _parts(report) for part in (table, Text())]
    return Group(*spaced[:-1])


def _parts(report: RunReport) -> Iterator[RenderableType]:
    offered = report.attainment.offered
    title = f"{report.system or 'unnamed system'}, {offered} requests in {report.duration_s:.1f} s"
    yield Text(title, style="bold")
    if report.notes:
        yield Text("\n".join(f"Note: {note}." for note in report.notes), style="yellow")
    if offered == 0:
        yield Text("No request has ended, so there is nothing to score.")
        return
    slo = "each request's own" if report.slo is None else str(report.slo)
    yield _table(f"SLO attainment ({slo})", ("", "share", "requests"), _service_rows(report))
    ended = sum(report.outcomes.values())
    outcomes = (
        (escape(label), str(count), _percent(count / ended, 2)) for label, count in report.outcomes.items()
    )
    yield _table("Requests by final outcome", ("outcome", "requests", "share"), outcomes)
    yield _latencies(report)
    if report.instances:
        columns = ("first role", "prefills", "decodes", "prompt tok", "cached tok", "generated tok", "busy")
        yield _table("Instances", ("instance", *columns), map(_instance_row, report.instances))
    yield _table("Decisions", ("", "count"), _decision_rows(report))
    if report.controllers:
        said = ("controller", "reasons", "flips asked for", "last reason")
        yield _table("Controllers", said, map(_controller_row, report.controllers))
    if report.flips:
        yield _flips(report.flips)
    if report.prediction is not None:
        rows = (
            ("median", _percent(report.prediction.median_abs_error)),
            ("p90", _percent(report.prediction.p90_abs_error)),
            ("bias (median, + is too long)", f"{100 * report.prediction.bias:+.1f} %"),
            ("requests", str(report.prediction.count)),
        )
        yield _table("Predicted against observed prefill time", ("", "relative error"), rows)
    if report.forecasts:
        heads = ("series", "periods", "MAPE", "in 80 %", "by", "because")
        yield _table("Expected against observed load, a period ahead", heads, forecast_rows(report.forecasts))
    if report.lengths:
        heads = ("source", "predicted", "count", "MAE", "bias", "left")
        yield _table("Predicted against observed tokens left", heads, length_rows(report.lengths))


def _service_rows(report: RunReport) -> Iterator[tuple[str, ...]]:
    seen, rates = report.attainment, report.goodput
    for name, share, count in (
        ("attained", seen.share, seen.attained),
        ("TTFT attained", seen.ttft_share, seen.ttft_attained),
        ("TPOT attained", seen.tpot_share, seen.tpot_attained),
    ):
        yield name, _percent(share, 2), f"{count} of {seen.offered}"
    if rates.offered_rps is not None and rates.attained_rps is not None:
        yield "offered rate", f"{rates.offered_rps:.3f} req/s", ""
        yield "goodput (attained rate)", f"{rates.attained_rps:.3f} req/s", ""
    verdict = "[green]met[/]" if rates.level_met else "[red]missed[/]"
    yield f"level {100 * rates.level:g} %", verdict, ""


def _latencies(report: RunReport) -> Table:
    columns = ("", "mean", "p50", "p90", "p99", "max")
    table = _table("Latency of successful requests (ms)", columns, _latency_rows({"TTFT": report.ttft_s}))
    for title, stages_s in (
        ("of TTFT", report.stages_of_ttft_s),
        ("after the first token", report.stages_after_first_token_s),
    ):
        if stages_s:
            table.add_row(f"  {title}", style="dim")
        named = {f"    {stage.replace('_', ' ')}": seconds for stage, seconds in stages_s.items()}
        for row in _latency_rows(named):
            table.add_row(*row)
    for row in _latency_rows({"TPOT": report.tpot_s, "end to end": report.e2e_s}):
        table.add_row(*row)
    if "other" in report.stages_of_ttft_s:
        table.caption, table.caption_justify = f"other: {OTHER}", "left"
    return table


def _latency_rows(named: Mapping[str, Summary | None]) -> Iterator[tuple[str, ...]]:
    for name, seconds in named.items():
        if seconds is not None:
            values = (seconds.mean, seconds.p50, seconds.p90, seconds.p99, seconds.max)
            yield name, *(f"{value * 1000:.1f}" for value in values)


def _instance_row(work: InstanceWork) -> tuple[str, ...]:
    counts = (work.prefills, work.decodes, work.prompt_tokens, work.cached_tokens, work.generated_tokens)
    busy = "n/a" if work.busy_share is None else _percent(work.busy_share)
    return escape(work.instance), work.first_role or "?", *map(str, counts), busy


def _controller_row(work: ControllerWork) -> tuple[str, ...]:
    return escape(work.controller or "unnamed"), str(work.reasons), str(work.flips), escape(work.last_reason)


def _decision_rows(report: RunReport) -> Iterator[tuple[str, str]]:
    for label, count in report.decisions.items():
        yield escape(label.replace("_", " ")), str(count)
    yield "flips", str(len(report.flips))
    for label, count in report.flip_counts.items():
        yield f"  {escape(label)}", str(count)
    yield "replays", f"{report.replays} (in {report.replayed_requests} requests)"
    yield "migrations", str(report.migrations)
    for event in report.instance_events:
        if event.event != "up":
            name = event.instance or f"one more {event.role}"
            yield f"{escape(name)} {escape(event.event.replace('_', ' '))}", f"at {event.t_s:.1f} s"
    if report.instance_hours:
        yield "instance-hours", f"{report.instance_hours:.3f}"
    for role, times_s in report.start_s.items():
        yield f"  starts for {role}", f"{times_s.p50:.1f} s, {times_s.max:.1f} s at most"


def _flips(flips: Sequence[FlipLine]) -> Table:
    rows = (
        (
            f"{flip.t_s:.2f}",
            escape(flip.instance),
            f"{flip.from_role} to {flip.to_role}",
            escape(flip.why or flip.reason),
        )
        for flip in flips[:MOST_FLIPS]
    )
    table = _table("Flips over time", ("t (s)", "instance", "flip", "why"), rows)
    table.columns[-1].justify = "left"
    if len(flips) > MOST_FLIPS:
        table.caption = f"and {len(flips) - MOST_FLIPS} more; --json lists all"
    return table


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"

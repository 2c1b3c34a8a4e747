"""A run report as Rich tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tidegate.measure.percentiles import Summary
from tidegate.reports.journal_report import RunReport

TIMELINE_ROWS = 20


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
    yield _service(report)
    yield _outcomes(report)
    yield _latencies(report)
    if report.instances:
        yield _instances(report)
    yield _adaptation(report)
    if report.flips:
        yield _timeline(report)
    if report.prediction is not None:
        yield _prediction(report)


def _service(report: RunReport) -> Table:
    seen, rates = report.attainment, report.goodput
    slo = "each request's own" if report.slo is None else str(report.slo)
    table = _table(f"SLO attainment ({slo})", "", "share", "requests")
    for name, share, count in (
        ("attained", seen.share, seen.attained),
        ("TTFT attained", seen.ttft_share, seen.ttft_attained),
        ("TPOT attained", seen.tpot_share, seen.tpot_attained),
    ):
        table.add_row(name, f"{100 * share:.2f} %", f"{count} of {seen.offered}")
    if rates.offered_rps is not None and rates.attained_rps is not None:
        table.add_row("offered rate", f"{rates.offered_rps:.3f} req/s", "")
        table.add_row("goodput (attained rate)", f"{rates.attained_rps:.3f} req/s", "")
    verdict = "met" if rates.level_met else "missed"
    table.add_row(
        f"level {100 * rates.level:g} %", f"[{'green' if rates.level_met else 'red'}]{verdict}[/]", ""
    )
    return table


def _outcomes(report: RunReport) -> Table:
    table = _table("Requests by final outcome", "outcome", "requests", "share")
    ended = sum(report.outcomes.values())
    for label, count in report.outcomes.items():
        table.add_row(escape(label), str(count), f"{100 * count / ended:.2f} %")
    return table


def _latencies(report: RunReport) -> Table:
    table = _table("Latency of successful requests (ms)", "", "mean", "p50", "p90", "p99", "max")
    _summary_row(table, "TTFT", report.ttft_s)
    _stage_rows(table, "of TTFT", report.stages_of_ttft_s)
    _stage_rows(table, "after the first token", report.stages_after_first_token_s)
    _summary_row(table, "TPOT", report.tpot_s)
    _summary_row(table, "end to end", report.e2e_s)
    return table


def _stage_rows(table: Table, title: str, stages_s: dict[str, Summary]) -> None:
    if stages_s:
        table.add_row(f"  {title}", style="dim")
    for stage, seconds in stages_s.items():
        _summary_row(table, f"    {stage.replace('_', ' ')}", seconds)


def _summary_row(table: Table, name: str, seconds: Summary | None) -> None:
    if seconds is not None:
        values = (seconds.mean, seconds.p50, seconds.p90, seconds.p99, seconds.max)
        table.add_row(name, *(f"{value * 1000:.1f}" for value in values))


def _instances(report: RunReport) -> Table:
    columns = ("first role", "prefills", "decodes", "prompt tok", "cached tok", "generated tok", "busy")
    table = _table("Instances", "instance", *columns)
    for use in report.instances:
        table.add_row(
            escape(use.instance),
            use.first_role or "?",
            str(use.prefills),
            str(use.decodes),
            str(use.prompt_tokens),
            str(use.cached_tokens),
            str(use.generated_tokens),
            "n/a" if use.busy_share is None else f"{100 * use.busy_share:.1f} %",
        )
    return table


def _adaptation(report: RunReport) -> Table:
    table = _table("Decisions", "", "count")
    for label, count in report.decisions.items():
        table.add_row(escape(label.replace("_", " ")), str(count))
    table.add_row("flips", str(len(report.flips)))
    for label, count in report.flip_counts.items():
        table.add_row(f"  {escape(label)}", str(count))
    table.add_row("replays", f"{report.replays} (in {report.replayed_requests} requests)")
    table.add_row("migrations", str(report.migrations))
    for event in report.instance_events:
        if event.event != "up":
            table.add_row(f"{escape(event.instance)} {escape(event.event)}", f"at {event.t_s:.1f} s")
    return table


def _timeline(report: RunReport) -> Table:
    table = _table("Flips over time", "t (s)", "instance", "flip", "reason")
    for flip in report.flips[:TIMELINE_ROWS]:
        flipped = f"{flip.from_role} to {flip.to_role}"
        table.add_row(f"{flip.t_s:.2f}", escape(flip.instance), flipped, escape(flip.reason))
    left = len(report.flips) - TIMELINE_ROWS
    if left > 0:
        table.caption = f"and {left} more; --json lists all"
    return table


def _prediction(report: RunReport) -> Table:
    table = _table("Predicted against observed prefill time", "", "relative error")
    if report.prediction is not None:
        table.add_row("median", f"{100 * report.prediction.median_abs_error:.1f} %")
        table.add_row("p90", f"{100 * report.prediction.p90_abs_error:.1f} %")
        table.add_row("bias (median, + is too long)", f"{100 * report.prediction.bias:+.1f} %")
        table.add_row("requests", str(report.prediction.count))
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table

"""Several load runs side by side: a row for each, and a page of curves over the load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tidegate.measure.percentiles import Summary
from tidegate.reports.bench_report import BenchReport
from tidegate.reports.charts import Chart, Curve, Mark, Panel, told_apart
from tidegate.reports.html import document, figure, note, table, warning
from tidegate.reports.looks import Look

LATENCIES = ("TTFT", "TPOT", "ITL")
STATS = {"p50": Look(0), "p90": Look(4), "p99": Look(1)}
ATTAINED, OFFERED, ANSWERED = Look(2), Look(7), Look(0)
WIDE = 16.0
"""Times the smallest load from which on the largest needs a logarithmic axis."""
NEAR = 4.0
"""Times the largest latency up to which a target is shown beside it."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Reports of runs that differ in their load, in its order."""

    reports: tuple[BenchReport, ...]

    @classmethod
    def of(cls, reports: Sequence[BenchReport]) -> Sweep:
        """Put reports in order: closed loops by users, others by offered rate."""
        return cls(tuple(sorted(reports, key=lambda report: (report.concurrency or 0, _rate(report)))))

    @property
    def closed(self) -> bool:
        """Tell whether the load is a number of users."""
        return all(report.concurrency is not None for report in self.reports)

    @property
    def unit(self) -> str:
        return "users" if self.closed else "requests/s offered"

    def load(self, report: BenchReport) -> float:
        """Return the load of one of the reports: users, or requests/s offered."""
        return float(report.concurrency or 0) if self.closed else _rate(report)

    def to_json(self) -> dict[str, Any]:
        """Return all as one JSON object."""
        return {"load": self.unit, "points": [report.to_json() for report in self.reports]}

    def answer(self) -> str:
        """Return in a sentence up to which load the level is met."""
        level = f"{100 * self.reports[0].goodput.level:g} %"
        met = 0
        while met < len(self.reports) and self.reports[met].goodput.level_met:
            met += 1
        slo = self.reports[0].slo
        if not met:
            first = self.reports[0]
            return f"{self.named(first)}, the least load, {_share(first)} attained {slo}: {level} is missed"
        last = self.reports[met - 1]
        best = f"{level} attained {slo} up to {self.named(last)}"
        rate = last.per_second(last.successful)
        best += f" ({rate:.2f} answered per second)" if self.closed and rate is not None else ""
        if met == len(self.reports):
            return f"{best}, the highest load"
        missed = self.reports[met]
        return f"{best}; at {self.named(missed)} it was {_share(missed)}"

    def named(self, report: BenchReport) -> str:
        """Return the load of one of the reports in words."""
        load = self.load(report)
        return f"{load:g} user{'' if load == 1 else 's'}" if self.closed else f"{load:.2f} requests/s"


def _rate(report: BenchReport) -> float:
    return report.goodput.offered_rps or 0.0


def _share(report: BenchReport) -> str:
    return f"{100 * report.attainment.share:.1f} %"


def _latency(report: BenchReport, name: str) -> Summary | None:
    found: Summary | None = getattr(report, f"{name.lower()}_s")
    return report.itl_p99_s if name == "ITL" and found is None else found


def _head(sweep: Sweep) -> list[str]:
    timed = [f"{name} {stat}" if stat == "p50" else stat for name in LATENCIES for stat in STATS]
    load = "users" if sweep.closed else "req/s"
    return [load, "requests", "failed", "attained", *timed, "answered/s", "tokens/s"]


def _rows(sweep: Sweep) -> list[list[str]]:
    return [
        [
            f"{sweep.load(report):g}" if sweep.closed else f"{sweep.load(report):.2f}",
            f"{report.attainment.offered:,}",
            f"{report.failed:,}",
            _share(report),
            *(
                "-" if (found := _latency(report, name)) is None else f"{1000 * getattr(found, stat):,.1f}"
                for name in LATENCIES
                for stat in STATS
            ),
            _per_second(report, report.successful, 2),
            _per_second(report, report.output_tokens, 0),
        ]
        for report in sweep.reports
    ]


def _per_second(report: BenchReport, count: int, digits: int) -> str:
    rate = report.per_second(count)
    return "-" if rate is None else f"{rate:,.{digits}f}"


def render_sweep(sweep: Sweep) -> str:
    """Return a row per load as text; latencies in ms."""
    rows = [_head(sweep), *_rows(sweep)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, f"{sweep.answer()}.", *(f"Note: {text}." for text in _notes(sweep))])


def _notes(sweep: Sweep) -> list[str]:
    loads: dict[str, list[str]] = {}
    for report in sweep.reports:
        for text in report.notes:
            loads.setdefault(text, []).append(sweep.named(report))
    return [f"{', '.join(names)}: {text}" for text, names in loads.items()]


def sweep_page(sweep: Sweep) -> str:
    """Return the page of a sweep."""
    loads = "closed loops" if sweep.closed else "rates"
    first, last = sweep.reports[0], sweep.reports[-1]
    span = f"from {sweep.named(first)} to {sweep.named(last)}"
    parts = [
        f"<h1>{escape(sweep.answer())}</h1>",
        f'<p class="lead">{len(sweep.reports)} {loads}, {span}</p>',
        *(warning(f"{text}.") for text in _notes(sweep)),
        *map(figure, _charts(sweep)),
        "<h3>All loads</h3>",
        table(_head(sweep), _rows(sweep)),
        note("TTFT, TPOT and ITL in ms. Attainment is over offered requests; failed ones are misses."),
    ]
    return document("a sweep of loads", parts, "report")


def _charts(sweep: Sweep) -> list[Chart]:
    if len(sweep.reports) < 2:
        return []
    slo, level = sweep.reports[0].slo, 100 * sweep.reports[0].goodput.level
    shares = _curve(sweep, "attained", ATTAINED, lambda report: 100 * report.attainment.share)
    ttft = _curve(sweep, "TTFT", OFFERED, lambda report: 100 * report.attainment.ttft_share)
    tpot = _curve(sweep, "TPOT", ANSWERED, lambda report: 100 * report.attainment.tpot_share)
    mark = (Mark("y", level, f"{level:g} %"),)
    attained = _panel(sweep, "", "attained (%)", told_apart((shares, ttft, tpot)), mark, (0.0, 101.0))
    latencies = [
        _latency_panel(sweep, "TTFT", 1000 * slo.ttft_s),
        _latency_panel(sweep, "TPOT", 1000 * slo.tpot_s),
        _latency_panel(sweep, "ITL", None),
    ]
    answered = _curve(sweep, "answered", ANSWERED, lambda report: report.per_second(report.successful))
    good = _curve(sweep, "attained", ATTAINED, lambda report: report.per_second(report.attainment.attained))
    tokens = _curve(sweep, "tokens", ANSWERED, lambda report: report.per_second(report.output_tokens))
    served = (
        _panel(sweep, "Requests", "requests/s", (answered, good)),
        _panel(sweep, "Output tokens", "tokens/s", (tokens,)),
    )
    return [
        Chart(
            "sweep-attained",
            "",
            "Attained, by load",
            "Of the offered requests: both, TTFT, TPOT.",
            (attained,),
        ),
        Chart("sweep-latency", "", "Latency, by load", "Of the answered requests.", tuple(latencies)),
        Chart("sweep-served", "", "Throughput, by load", "Per second of the whole run.", served),
    ]


def _latency_panel(sweep: Sweep, name: str, target_ms: float | None) -> Panel:
    """Return the percentiles over the load, with the target where that is not far above them."""
    curves = tuple(_curve(sweep, stat, look, _milliseconds(name, stat)) for stat, look in STATS.items())
    most = max((y for curve in curves for y in curve.ys if y is not None), default=0.0)
    if target_ms is None or target_ms > NEAR * most:
        return _panel(sweep, name, f"{name} (ms)", curves)
    mark = Mark("y", target_ms, f"target {target_ms:g} ms")
    return _panel(sweep, name, f"{name} (ms)", curves, (mark,), (0.0, 1.1 * max(most, target_ms)))


def _milliseconds(name: str, stat: str) -> Callable[[BenchReport], float | None]:
    def of(report: BenchReport) -> float | None:
        found = _latency(report, name)
        return None if found is None else 1000 * float(getattr(found, stat))

    return of


def _curve(sweep: Sweep, label: str, look: Look, of: Callable[[BenchReport], float | None]) -> Curve:
    loads = [sweep.load(report) for report in sweep.reports]
    return Curve(label, look, loads, [of(report) for report in sweep.reports], dots=True)


def _panel(
    sweep: Sweep,
    title: str,
    y: str,
    curves: tuple[Curve, ...],
    marks: tuple[Mark, ...] = (),
    y_range: tuple[float, float] | None = None,
) -> Panel:
    loads = curves[0].xs
    log_x = loads[0] > 0 and loads[-1] >= WIDE * loads[0]
    return Panel(title, sweep.unit, y, curves, marks, y_range=y_range, log_x=log_x)

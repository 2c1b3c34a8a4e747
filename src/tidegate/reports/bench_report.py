"""The report of a load run: the block that ``vllm bench serve`` users know, and the same as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tidegate.core.slo import Slo
from tidegate.measure.attainment import (
    DEFAULT_LEVEL,
    Attainment,
    ClassAttainment,
    Goodput,
    Observation,
    class_title,
    goodput,
    score,
)
from tidegate.measure.percentiles import Summary, summarize
from tidegate.measure.results import RequestResult, ResultFile, Targets
from tidegate.reports.journal_report import attainment_shares

WIDTH = 50
LATE_S = 0.010
"""A send this long after its scheduled time counts as late (asyncio's timers are good to about 1 ms)."""

SEVERAL = 1.05
"""Tokens per event above which gaps between events are not those between tokens."""
LATE_SHARE = 0.01
"""Above this share of late sends the load was not the load that was asked for."""


@dataclass(frozen=True, slots=True)
class BenchReport:
    """A load run in numbers; latencies in seconds. Interrupted requests are counted, not scored.

    ``concurrency`` is the number of users of a closed loop, None for an open one.
    """

    slo: Slo
    attainment: Attainment
    classes: dict[str, ClassAttainment]
    goodput: Goodput
    outcomes: dict[str, int]
    interrupted: int
    duration_s: float
    input_tokens: int
    output_tokens: int
    short_answers: int
    ttft_s: Summary | None
    tpot_s: Summary | None
    itl_s: Summary | None
    itl_p99_s: Summary | None
    e2e_s: Summary | None
    late_sends: int
    send_lag_s: Summary | None
    concurrency: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def successful(self) -> int:
        return self.outcomes.get("ok", 0)

    @property
    def failed(self) -> int:
        return self.attainment.offered - self.successful

    def to_json(self) -> dict[str, Any]:
        """Return the whole report as one JSON object; keys carry units."""
        value = asdict(self)
        value["classes"] = {name: found.to_json() for name, found in self.classes.items()}
        value["attainment"] |= attainment_shares(self.attainment)
        value |= {"successful": self.successful, "failed": self.failed}
        value["throughput"] = {
            "requests_rps": self.per_second(self.successful),
            "output_tokens_per_s": self.per_second(self.output_tokens),
        }
        return value

    def per_second(self, count: int) -> float | None:
        """Return a count per second of the whole run; None for a run without a length."""
        return count / self.duration_s if self.duration_s > 0 else None


def build_bench_report(
    results: Sequence[RequestResult],
    targets: Targets | Slo,
    *,
    level: float = DEFAULT_LEVEL,
    itl_s: Summary | None = None,
    concurrency: int | None = None,
    notes: Sequence[str] = (),
) -> BenchReport:
    """Score a run by its targets, or all by one SLO.

    ``itl_s`` is over all token gaps, which the result lines do not keep.
    """
    offered = [r for r in results if r.status != "interrupted"]
    good = [r for r in offered if r.ok]
    targets = Targets(targets) if isinstance(targets, Slo) else targets
    attainment = score(observations(results, targets))
    lags_s = [r.sent_s - r.arrival_s for r in results]
    late = sum(lag_s > LATE_S for lag_s in lags_s)
    short = sum(r.output_tokens < r.max_tokens for r in good)
    return BenchReport(
        slo=targets.slo,
        attainment=attainment,
        classes=_classes(offered, targets),
        goodput=goodput(attainment, [r.arrival_s for r in offered], level),
        outcomes=dict(Counter(r.outcome for r in offered).most_common()),
        interrupted=len(results) - len(offered),
        duration_s=max((r.arrival_s + (r.e2e_s or 0.0) for r in offered), default=0.0)
        - min((r.arrival_s for r in offered), default=0.0),
        input_tokens=sum(r.input_tokens if r.prompt_tokens is None else r.prompt_tokens for r in good),
        output_tokens=sum(r.output_tokens for r in good),
        short_answers=short,
        ttft_s=summarize(r.ttft_s for r in good),
        tpot_s=summarize(r.tpot_s for r in good),
        itl_s=itl_s,
        itl_p99_s=summarize(r.itl_p99_s for r in good),
        e2e_s=summarize(r.e2e_s for r in good),
        late_sends=late,
        send_lag_s=summarize(lags_s),
        concurrency=concurrency,
        notes=(*notes, *_warnings(results, good, late, short)),
    )


def recorded_report(recorded: ResultFile, targets: Targets | None, level: float) -> BenchReport:
    """Score a result file by its own targets, or by those given."""
    notes = []
    if recorded.truncated:
        notes.append("the last line is cut off: the client was stopped in the middle of it")
    if recorded.summary is None:
        notes.append("the file has no summary line: the client was killed before its end")
    gaps = (recorded.summary or {}).get("itl_s")
    return build_bench_report(
        recorded.results,
        targets or Targets.recorded(recorded.header),
        level=level,
        itl_s=Summary(**gaps) if isinstance(gaps, dict) else None,
        concurrency=recorded.header.get("concurrency"),
        notes=notes,
    )


def _classes(offered: Sequence[RequestResult], targets: Targets) -> dict[str, ClassAttainment]:
    """Score each SLO class; empty where no request has one."""
    by_class: dict[str, list[RequestResult]] = {}
    for result in offered:
        by_class.setdefault(result.slo_class, []).append(result)
    if not any(by_class):
        return {}
    return {
        name: ClassAttainment(targets.of(of_class[0]), score(observations(of_class, targets)))
        for name, of_class in sorted(by_class.items())
    }


def observations(results: Sequence[RequestResult], targets: Targets) -> list[Observation]:
    """Return what is scored of a run: all but interrupted requests."""
    offered = (r for r in results if r.status != "interrupted")
    return [Observation(r.arrival_s, r.ok, r.ttft_s, r.tpot_s, targets.of(r)) for r in offered]


def _warnings(
    results: Sequence[RequestResult], good: Sequence[RequestResult], late: int, short: int
) -> list[str]:
    notes = []
    if late > LATE_SHARE * len(results):
        notes.append(
            f"the client could not keep up: {late} of {len(results)} requests left more than "
            f"{LATE_S * 1000:g} ms late; TTFT counts from the scheduled time. Offer less, or run the client "
            "on another machine"
        )
    if short:
        notes.append(
            f"{short} of {len(good)} answers were shorter than asked; does the server honour ignore_eos?"
        )
    counted = sum(r.counted_tokens for r in good)
    told = sum(r.output_tokens for r in good if r.counted_tokens)
    if told > SEVERAL * counted:
        notes.append(
            f"an event of the stream holds {told / counted:.1f} tokens on average and does not say how many: "
            "ITL is the time between events, not tokens"
        )
    off = sum(r.prompt_tokens is not None and _differs(r.prompt_tokens, r.input_tokens) for r in good)
    if off:
        notes.append(
            f"{off} of {len(good)} prompts differ from the asked length by more than 1 % and 2 tokens"
        )
    return notes


def _differs(counted: int, asked: int) -> bool:
    return abs(counted - asked) > max(2, asked // 100)


def render_block(report: BenchReport) -> str:
    """Return the report as text, in the shape of vLLM's "Serving Benchmark Result".

    Throughputs and "Request goodput" are per second of the whole run, as vLLM defines them, so the
    wait for the last answers lowers them; the rates under the SLO are per second of arrivals.
    """
    seen, rates, per_second = report.attainment, report.goodput, report.per_second
    tokens = report.input_tokens + report.output_tokens
    failures = {f"  {label}:": n for label, n in report.outcomes.items() if label != "ok"}
    interrupted = {"Interrupted (not scored):": report.interrupted} if report.interrupted else {}
    users = {} if report.concurrency is None else {"Maximum request concurrency:": report.concurrency}
    run = {
        **users,
        "Offered requests:": seen.offered,
        "Successful requests:": report.successful,
        "Failed requests:": report.failed,
        **failures,
        **interrupted,
        "Late sends:": report.late_sends,
        "Benchmark duration (s):": report.duration_s,
        "Total input tokens:": report.input_tokens,
        "Total generated tokens:": report.output_tokens,
        "Request throughput (req/s):": per_second(report.successful),
        "Request goodput (req/s):": per_second(seen.attained),
        "Output token throughput (tok/s):": per_second(report.output_tokens),
        "Total token throughput (tok/s):": per_second(tokens),
    }
    scored = {
        "Attained (% of offered):": 100 * seen.share,
        "TTFT attained (%):": 100 * seen.ttft_share,
        "TPOT attained (%):": 100 * seen.tpot_share,
        **{
            f"  {class_title(name, str(found.slo))} (%):": 100 * found.attainment.share
            for name, found in report.classes.items()
        },
        "Offered rate (req/s):": rates.offered_rps,
        "Attained part of it (req/s):": rates.attained_rps,
        f"At least {100 * rates.level:g} % attained:": "yes" if rates.level_met else "no",
    }
    gaps = ("Inter-token Latency", report.itl_s)
    if report.itl_s is None:
        gaps = ("Inter-token Latency, p99 of each request", report.itl_p99_s)
    lines = [
        *_section(" Serving Benchmark Result ", run, "="),
        *_section(f" SLO {report.slo} ", scored),
        *_latency("Time to First Token", "TTFT", report.ttft_s),
        *_latency("Time per Output Token (excl. 1st token)", "TPOT", report.tpot_s),
        *_latency(gaps[0], "ITL", gaps[1]),
        *_latency("End-to-end Latency", "E2EL", report.e2e_s),
        "=" * WIDTH,
    ]
    return "\n".join([*lines, *(f"Note: {note}." for note in report.notes)])


def _latency(title: str, name: str, seconds: Summary | None) -> list[str]:
    if seconds is None:
        return _section(f" {title} ", {f"{name} (ms):": None})
    names = {"mean": "Mean", "p50": "Median", "p90": "P90", "p99": "P99", "max": "Max"}
    values = {f"{shown} {name} (ms):": getattr(seconds, stat) * 1000 for stat, shown in names.items()}
    return _section(title, values)


def _section(title: str, rows: Mapping[str, float | str | None], fill: str = "-") -> list[str]:
    return [f"{title:{fill}^{WIDTH}}", *(f"{label:<40} {_shown(value)}" for label, value in rows.items())]


def _shown(value: float | str | None) -> str:
    return "n/a" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

"""The report of a load run: the block that ``vllm bench serve`` users know, and the same as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tidegate.core.slo import Slo
from tidegate.measure.attainment import DEFAULT_LEVEL, Attainment, Goodput, Observation, goodput, score
from tidegate.measure.percentiles import Summary, summarize
from tidegate.measure.results import RequestResult

WIDTH = 50
LATE_S = 0.010
"""A send this long after its scheduled time counts as late (asyncio's timers are good to about 1 ms)."""

LATE_SHARE = 0.01
"""Above this share of late sends the load was not the load that was asked for."""


@dataclass(frozen=True, slots=True)
class BenchReport:
    """A load run in numbers; latencies in seconds. Interrupted requests are counted, not scored."""

    slo: Slo
    attainment: Attainment
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
        value["attainment"] |= {
            "share": self.attainment.share,
            "ttft_share": self.attainment.ttft_share,
            "tpot_share": self.attainment.tpot_share,
        }
        value |= {"successful": self.successful, "failed": self.failed}
        value["throughput"] = {
            "requests_rps": self.successful / self.duration_s if self.duration_s > 0 else None,
            "output_tokens_per_s": self.output_tokens / self.duration_s if self.duration_s > 0 else None,
        }
        value["notes"] = list(self.notes)
        return value


def build_bench_report(
    results: Sequence[RequestResult],
    slo: Slo,
    *,
    level: float = DEFAULT_LEVEL,
    itl_s: Summary | None = None,
    notes: Sequence[str] = (),
) -> BenchReport:
    """Score a run. ``itl_s`` is over all token gaps, which the result lines do not keep."""
    offered = [r for r in results if r.status != "interrupted"]
    good = [r for r in offered if r.ok]
    attainment = score(Observation(r.arrival_s, r.ok, r.ttft_s, r.tpot_s, slo) for r in offered)
    lags_s = [r.sent_s - r.arrival_s for r in results]
    late = sum(lag_s > LATE_S for lag_s in lags_s)
    short = sum(r.output_tokens < r.max_tokens for r in good)
    return BenchReport(
        slo=slo,
        attainment=attainment,
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
        notes=(*notes, *_warnings(results, good, late, short)),
    )


def _warnings(
    results: Sequence[RequestResult], good: Sequence[RequestResult], late: int, short: int
) -> list[str]:
    notes = []
    if late > LATE_SHARE * len(results):
        notes.append(
            f"the client could not keep up: {late} of {len(results)} requests left more than "
            f"{LATE_S * 1000:g} ms late; TTFT counts from the scheduled time. Lower the rate or run the "
            "client on another machine"
        )
    if short:
        notes.append(
            f"{short} of {len(good)} answers were shorter than asked; does the server honour ignore_eos?"
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
    seen, rates = report.attainment, report.goodput
    lines = [_rule(" Serving Benchmark Result ", "=")]
    lines += [_row("Offered requests:", seen.offered), _row("Successful requests:", report.successful)]
    lines.append(_row("Failed requests:", report.failed))
    lines += [_row(f"  {label}:", n) for label, n in report.outcomes.items() if label != "ok"]
    if report.interrupted:
        lines.append(_row("Interrupted (not scored):", report.interrupted))
    lines += [_row("Late sends:", report.late_sends)]
    lines += [
        _row("Benchmark duration (s):", report.duration_s),
        _row("Total input tokens:", report.input_tokens),
        _row("Total generated tokens:", report.output_tokens),
        _row("Request throughput (req/s):", _per_second(report.successful, report.duration_s)),
        _row("Request goodput (req/s):", _per_second(seen.attained, report.duration_s)),
        _row("Output token throughput (tok/s):", _per_second(report.output_tokens, report.duration_s)),
        _row(
            "Total token throughput (tok/s):",
            _per_second(report.input_tokens + report.output_tokens, report.duration_s),
        ),
        _rule(f" SLO {report.slo} ", "-"),
        _row("Attained (% of offered):", 100 * seen.share),
        _row("TTFT attained (%):", 100 * seen.ttft_share),
        _row("TPOT attained (%):", 100 * seen.tpot_share),
        _row("Offered rate (req/s):", rates.offered_rps),
        _row("Attained part of it (req/s):", rates.attained_rps),
        _row(f"At least {100 * rates.level:g} % attained:", "yes" if rates.level_met else "no"),
    ]
    lines += _latency("Time to First Token", "TTFT", report.ttft_s)
    lines += _latency("Time per Output Token (excl. 1st token)", "TPOT", report.tpot_s)
    if report.itl_s is not None:
        lines += _latency("Inter-token Latency", "ITL", report.itl_s)
    else:
        lines += _latency("Inter-token Latency, p99 of each request", "ITL", report.itl_p99_s)
    lines += _latency("End-to-end Latency", "E2EL", report.e2e_s)
    lines.append("=" * WIDTH)
    lines += [f"Note: {note}." for note in report.notes]
    return "\n".join(lines)


def _latency(title: str, name: str, seconds: Summary | None) -> list[str]:
    if seconds is None:
        return [_rule(f" {title} ", "-"), _row(f"{name} (ms):", None)]
    rows = {
        "Mean": seconds.mean,
        "Median": seconds.p50,
        "P90": seconds.p90,
        "P99": seconds.p99,
        "Max": seconds.max,
    }
    return [_rule(title, "-"), *(_row(f"{stat} {name} (ms):", value * 1000) for stat, value in rows.items())]


def _row(label: str, value: float | str | None) -> str:
    shown = "n/a" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<40} {shown:<10}".rstrip()


def _rule(title: str, fill: str) -> str:
    return f"{title:{fill}^{WIDTH}}"


def _per_second(count: int, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None

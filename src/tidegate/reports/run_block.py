"""One simulated run as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tidegate.core.stages import OTHER
from tidegate.measure.attainment import NO_CLASS, score_table
from tidegate.measure.percentiles import PERCENTILES
from tidegate.measure.run_view import RunView, view_of
from tidegate.measure.summary import Run
from tidegate.reports.comparison import LevelGoodput

WIDTH = 58


def render_run(run: Run, summary: Mapping[str, Any], *, slo: str, searched: LevelGoodput) -> str:
    """Return the block of a run. ``summary`` is its object of the ``--json`` contract; latencies in ms.

    Where a goodput was ``searched``, the run is its first draw, at the highest rate of that draw.
    """
    count = summary["instances"]
    return "\n".join(
        [
            _rule(f" {summary['system']} on {count} instance{'' if count == 1 else 's'} ", "="),
            *_service(run, summary, slo, searched),
            *_latency(summary),
            *_cluster(view_of(run), summary),
            "=" * WIDTH,
        ]
    )


def _service(run: Run, summary: Mapping[str, Any], slo: str, searched: LevelGoodput) -> Iterator[str]:
    seen = score_table(run.requests)
    failed = seen.offered - int(np.count_nonzero(run.requests.ok))
    yield _row("Trace", summary["trace"])
    yield _row("Requests", f"{seen.offered:,}" + (f", {failed:,} not answered" if failed else ""))
    highest = f"Highest rate at {100 * searched.level:g} %"
    found = bool(searched.by_seed and searched.shown_rps)
    yield _row(highest if found else "Offered rate", _rate(summary["rate_rps"]))
    yield _rule(f" SLO {slo} ")
    yield _row("Attained", _percent(seen.share) if seen.offered else "n/a")
    if seen.offered:
        yield _row("  TTFT attained", _percent(seen.ttft_share))
        yield _row("  TPOT attained", _percent(seen.tpot_share))
    for name, found in summary["classes"].items():
        share = f"{_percent(found['attainment'])} of {found['requests']:,} at {found['slo']}"
        yield _row(f"  {name or NO_CLASS}", share)
    if summary["goodput_rps"] is not None:
        draws = f", mean of {searched.seeds} draws" if searched.seeds > 1 else ""
        yield _row(f"Goodput{draws}", _rate(summary["goodput_rps"]))
    if summary["limit_rps"] is not None:
        yield _row("Fluid limit", _rate(summary["limit_rps"]))
        if summary["share_of_limit"] is not None:
            yield _row("Goodput is of the limit", _percent(summary["share_of_limit"]))
        elif summary["rate_rps"] is not None and summary["limit_rps"] > 0:
            yield _row("Offered rate is of the limit", _percent(summary["rate_rps"] / summary["limit_rps"]))
    if summary["achievable_rps"] is not None:
        yield _row("Achievable", _rate(summary["achievable_rps"]))
        if summary["share_of_achievable"] is not None:
            yield _row("Goodput is of the achievable", _percent(summary["share_of_achievable"]))


def _latency(summary: Mapping[str, Any]) -> Iterator[str]:
    stages = {f"  {stage.replace('_', ' ')}": found for stage, found in summary["stages"].items()}
    used = {label: found for label, found in stages.items() if any(found.values())}
    yield _rule(" Latency of answered requests (ms) ")
    yield f"{'':<16}" + "".join(f"{f'p{p}':>10}" for p in PERCENTILES)
    for label, found in {"TTFT": summary["ttft_s"], **used, "TPOT": summary["tpot_s"]}.items():
        cells = "".join(f"{'n/a' if v is None else format(1000 * v, ',.1f'):>10}" for v in found.values())
        yield f"{label:<16}{cells}"
    if "  other" in used:
        yield f"other: {OTHER}"


def _cluster(view: RunView, summary: Mapping[str, Any]) -> Iterator[str]:
    yield _rule(" Cluster ")
    if view.missed_ttft_p99_s is not None:
        yield _row("p99 TTFT of misses", _seconds(view.missed_ttft_p99_s))
    if view.missed_tpot_p99_s is not None:
        yield _row("p99 TPOT of misses", _seconds(view.missed_tpot_p99_s))
    scaled = {name: summary[name] for name in ("adds", "drains", "reversals")}
    for name in ("flips", *(scaled if any(scaled.values()) else ()), "migrations", "preemptions"):
        yield _row(name.capitalize(), summary[name])
    used = f"{_percent(float(np.mean(view.kv_share)))}, {_percent(max(view.kv_share))}"
    yield _row("KV in use, mean and peak", used)
    yield _row("KV moved between instances", f"{summary['kv_transfer_bytes'] / 1e9:,.2f} GB")
    yield _row("Instance-hours", f"{summary['instance_hours']:,.3f}")
    speed = summary["requests_per_cpu_s"]
    per_s = "" if speed is None else f" ({speed:,.0f} requests per CPU second)"
    yield _row("Simulated in", f"{summary['wall_s']:.2f} s{per_s}")


def _row(label: str, value: object) -> str:
    return f"{label + ':':<30}{value}"


def _rule(title: str, fill: str = "-") -> str:
    return f"{title:{fill}^{WIDTH}}"


def _rate(value: float | None) -> str:
    return "n/a" if value is None else f"{value:,.2f} requests/s"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _seconds(value: float) -> str:
    return f"{1000 * value:,.1f} ms" if value < 10 else f"{value:,.1f} s"

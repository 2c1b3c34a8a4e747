"""What charts show of one run: few hundred numbers, however long it was. Plain data that JSON can carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tidegate.core.instance import Role
from tidegate.core.stages import STAGES
from tidegate.measure.percentiles import p50_p90_p99
from tidegate.measure.request_table import RequestTable, Seconds
from tidegate.measure.summary import Run
from tidegate.measure.timeline import Timeline

QUANTILE_STEPS = 400
MOST_WINDOWS = 240
ROLES = ("prefill_instances", "decode_instances", "mixed_instances")
Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RunView:
    """A run for charts.

    ``ttft_quantiles_s`` and ``tpot_quantiles_s`` are at equal steps from 0 to 1 over requests answered in
    full, empty without any. ``missed_*`` are 99th percentiles over the requests that missed an SLO, as far as
    they got. ``stage_means_s`` are means over answered requests, a stage that one skipped counting as 0.
    The other lists have one value per window of the timeline, starting at ``at_s``: the offered rate, the
    attained share of what arrived in it (None where nothing did), mean numbers of instances by role, of
    requests and seconds of prefill in queues, of running decodes, and the used share of the KV.
    """

    offered: int
    answered: int
    ttft_quantiles_s: list[float]
    tpot_quantiles_s: list[float]
    missed_ttft_p99_s: float | None
    missed_tpot_p99_s: float | None
    stage_means_s: dict[str, float]
    output_tokens: int
    window_s: float
    at_s: list[float]
    rate_rps: list[float]
    attained: list[float | None]
    prefill_instances: list[float]
    decode_instances: list[float]
    mixed_instances: list[float]
    prefill_requests: list[float]
    prefill_queue_s: list[float]
    decode_requests: list[float]
    kv_share: list[float]


def view_of(run: Run) -> RunView:
    """Return the view of a finished run."""
    requests = run.requests
    ok = requests.ok
    missed = ~requests.attained
    return RunView(
        offered=len(requests),
        answered=int(np.count_nonzero(ok)),
        ttft_quantiles_s=_quantiles(requests.ttft_s[ok]),
        tpot_quantiles_s=_quantiles(requests.tpot_s[ok]),
        missed_ttft_p99_s=_p99(requests.ttft_s[missed]),
        missed_tpot_p99_s=_p99(requests.tpot_s[missed]),
        stage_means_s=_stage_means(requests),
        output_tokens=int(requests.output_tokens[ok].sum()),
        **_windows(requests, run.timeline),
    )


def _quantiles(values: Seconds) -> list[float]:
    known = values[np.isfinite(values)]
    if known.size == 0:
        return []
    found: list[float] = np.quantile(known, np.linspace(0.0, 1.0, QUANTILE_STEPS + 1)).tolist()
    return found


def _p99(values: Seconds) -> float | None:
    found = p50_p90_p99(values)
    return None if found is None else found[2]


def _stage_means(requests: RequestTable) -> dict[str, float]:
    ok = requests.ok
    answered = int(np.count_nonzero(ok))
    if not answered:
        return {}
    means = {
        s: float(np.nansum(requests.stages_s[s][ok])) / answered for s in STAGES if s in requests.stages_s
    }
    return {stage: mean for stage, mean in means.items() if mean > 0}


def _windows(requests: RequestTable, timeline: Timeline) -> dict[str, Any]:
    """Average the timeline's samples over at most MOST_WINDOWS equal windows of the run."""
    at_s = timeline.at_s
    end_s = max(
        float(at_s[-1]) if at_s.size else 0.0,
        float(requests.arrival_s[-1]) if len(requests) else 0.0,
    )
    windows = max(1, min(MOST_WINDOWS, at_s.size))
    edges = np.linspace(0.0, max(end_s, 1e-9), windows + 1)
    of = np.clip(np.searchsorted(edges, at_s, side="right") - 1, 0, windows - 1)
    arrivals, _ = np.histogram(requests.arrival_s, edges)
    attained, _ = np.histogram(requests.arrival_s[requests.attained], edges)
    window_s = float(edges[1])
    capacity = np.where(timeline.kv_capacity_tokens > 0, timeline.kv_capacity_tokens, np.nan)
    series = {
        "prefill_instances": (timeline.roles == Role.PREFILL).sum(axis=1),
        "decode_instances": (timeline.roles == Role.DECODE).sum(axis=1),
        "mixed_instances": (timeline.roles == Role.MIXED).sum(axis=1),
        "prefill_requests": timeline.prefill_requests,
        "prefill_queue_s": timeline.prefill_queue_s,
        "decode_requests": timeline.decode_requests,
        "kv_share": np.nan_to_num(timeline.kv_tokens / capacity),
    }
    return {
        "window_s": window_s,
        "at_s": edges[:-1].tolist(),
        "rate_rps": (arrivals / window_s).tolist(),
        "attained": [a / n if n else None for a, n in zip(attained.tolist(), arrivals.tolist(), strict=True)],
        **{
            # A run begins idle, but with its labels.
            name: _mean_by_window(
                values, of, windows, float(values[0]) if name in ROLES and values.size else 0.0
            )
            for name, values in series.items()
        },
    }


def _mean_by_window(values: Numbers, of: NDArray[np.int64], windows: int, before: float) -> list[float]:
    """Return the mean of the samples of each window; one without repeats the window before, if any, else
    ``before``."""
    counts = np.bincount(of, minlength=windows)
    sums = np.bincount(of, weights=values, minlength=windows)
    means: list[float] = []
    for total, count in zip(sums.tolist(), counts.tolist(), strict=True):
        means.append(total / count if count else (means[-1] if means else before))
    return means

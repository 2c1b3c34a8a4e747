"""What a trace looks like: rates, burstiness, lengths, the drift of their ratio, sessions, prefix reuse."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tidegate.core.errors import ConfigError
from tidegate.workloads.trace import Floats, Integers, Workload

MINUTE_S = 60.0
WINDOW_S = 300.0
MOST_WINDOWS = 5_000_000
FEWEST_IN_WINDOW = 20
"""Windows with fewer requests say nothing of a ratio and are left out of its range."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and percentiles (smallest value with at least that share at or below it) of one quantity."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: NDArray[Any]) -> Spread:
        """Summarise at least one value."""
        numbers = values.astype(np.float64)
        p50, p90, p99 = np.quantile(numbers, (0.5, 0.9, 0.99), method="inverted_cdf").tolist()
        return cls(float(numbers.mean()), p50, p90, p99, float(numbers.max()))


@dataclass(frozen=True, slots=True)
class ArrivalStatistics:
    """Of a timed trace. ``cv`` is the coefficient of variation of the gaps between arrivals.

    ``idc60`` is variance over mean of the requests per minute, 1 for Poisson arrivals; None below two
    minutes. ``cv`` is None below three requests or when all arrive at once.
    """

    duration_s: float
    rate_rps: float
    busiest_minute_rps: float
    peak_to_mean: float
    cv: float | None
    idc60: float | None


@dataclass(frozen=True, slots=True)
class Window:
    """The requests of one stretch of time; ``ratio`` is input over output tokens, None when too few."""

    start_s: float
    length_s: float
    requests: int
    rate_rps: float
    ratio: float | None


@dataclass(frozen=True, slots=True)
class SessionStatistics:
    """Conversations: their number, agents and rounds, and the clients' pauses in seconds."""

    count: int
    agents: int
    rounds: Spread
    think_s: Spread | None


@dataclass(frozen=True, slots=True)
class Reuse:
    """Shares of prompt tokens, and of prompt blocks, that an unbounded prefix cache would hold."""

    tokens: float
    blocks: float


@dataclass(frozen=True, slots=True)
class Statistics:
    """All of it; what does not apply to a trace is None."""

    requests: int
    arrivals: ArrivalStatistics | None
    input_tokens: Spread
    output_tokens: Spread
    ratio: float
    ratio_range: tuple[float, float] | None
    windows: tuple[Window, ...]
    sessions: SessionStatistics | None
    reuse: Reuse | None

    def to_json(self) -> dict[str, Any]:
        """Return plain data without NaN."""
        return asdict(self)


def statistics(workload: Workload, *, timed: bool, window_s: float = WINDOW_S) -> Statistics:
    """Describe a trace; ``timed`` says whether ``arrival_s`` is the time of the trace.

    Raises ConfigError for an empty trace or a window that is not positive.
    """
    if not workload:
        raise ConfigError("the trace holds no requests")
    if not 0 < window_s < float("inf"):
        raise ConfigError(f"the window must be a positive number of seconds, got {window_s}")
    inputs = workload.input_tokens.astype(np.float64)
    outputs = workload.output_tokens.astype(np.float64)
    times_s = workload.arrival_s
    if timed and (times_s[-1] - times_s[0]) / min(window_s, MINUTE_S) > MOST_WINDOWS:
        raise ConfigError(
            f"the trace lasts {times_s[-1] - times_s[0]:g} s: more than {MOST_WINDOWS:,} windows; are its "
            "times seconds, and the window wide enough?"
        )
    windows = _windows(times_s, inputs, outputs, window_s) if timed else ()
    ratios = [w.ratio for w in windows if w.ratio is not None]
    return Statistics(
        requests=len(workload),
        arrivals=_arrivals(times_s) if timed else None,
        input_tokens=Spread.of(inputs),
        output_tokens=Spread.of(outputs),
        ratio=float(inputs.sum() / outputs.sum()),
        ratio_range=(min(ratios), max(ratios)) if ratios else None,
        windows=windows,
        sessions=_sessions(workload),
        reuse=_reuse(workload),
    )


def cached_tokens(workload: Workload) -> Integers:
    """Return for each prompt how many leading tokens an unbounded cache holds when it comes.

    A block is cached once a request before it in the trace had it, answer included; what is still being
    computed counts as there.
    """
    known: Integers = _blocks(workload)[0] * workload.column("block_tokens")
    return np.minimum(workload.input_tokens, known)


def _blocks(workload: Workload) -> tuple[Integers, Integers]:
    """Return for each prompt its leading blocks that requests before it had, and all its named blocks."""
    known = np.zeros_like(workload.input_tokens)
    if workload.hash_ids is None:
        return known, known
    seen: set[int] = set()
    blocks = -(-workload.input_tokens // workload.column("block_tokens"))
    blocks = np.minimum(blocks, np.fromiter(map(len, workload.hash_ids), np.int64, len(workload)))
    for row, (ids, count) in enumerate(zip(workload.hash_ids, blocks.tolist(), strict=True)):
        known[row] = next((k for k in range(count) if ids[k] not in seen), count)
        seen.update(ids)
    return known, blocks


def _reuse(workload: Workload) -> Reuse | None:
    known, blocks = _blocks(workload)
    if not blocks.any():
        return None
    tokens = np.minimum(workload.input_tokens, known * workload.column("block_tokens"))
    return Reuse(float(tokens.sum() / workload.input_tokens.sum()), float(known.sum() / blocks.sum()))


def _arrivals(times_s: Floats) -> ArrivalStatistics:
    since_s = times_s - times_s[0]
    duration_s = float(since_s[-1])
    gaps_s = np.diff(times_s)
    minutes = np.bincount((since_s // MINUTE_S).astype(np.int64))
    whole = minutes[: int(duration_s // MINUTE_S)]
    busiest = float(minutes.max()) / min(MINUTE_S, duration_s or MINUTE_S)
    rate_rps = len(times_s) / duration_s if duration_s > 0 else busiest
    return ArrivalStatistics(
        duration_s=duration_s,
        rate_rps=rate_rps,
        busiest_minute_rps=busiest,
        peak_to_mean=busiest / rate_rps,
        cv=float(gaps_s.std() / gaps_s.mean()) if len(gaps_s) > 1 and duration_s > 0 else None,
        idc60=float(whole.var() / whole.mean()) if len(whole) > 1 and whole.any() else None,
    )


def _windows(times_s: Floats, inputs: Floats, outputs: Floats, window_s: float) -> tuple[Window, ...]:
    since_s = times_s - times_s[0]
    index = (since_s // window_s).astype(np.int64)
    counts = np.bincount(index).tolist()
    sums_in = np.bincount(index, weights=inputs).tolist()
    sums_out = np.bincount(index, weights=outputs).tolist()
    last_s = float(since_s[-1]) - (len(counts) - 1) * window_s
    return tuple(
        Window(
            start_s=k * window_s,
            length_s=(length_s := window_s if k < len(counts) - 1 else last_s or window_s),
            requests=count,
            rate_rps=count / length_s,
            ratio=sums_in[k] / sums_out[k] if count >= FEWEST_IN_WINDOW else None,
        )
        for k, count in enumerate(counts)
    )


def _sessions(workload: Workload) -> SessionStatistics | None:
    if workload.session_id is None:
        return None
    named = workload[workload.session_id != ""]
    rounds = np.bincount(named.units())
    pauses_s = workload.column("delay_s")[workload.column("turn") > 0]
    pauses_s = pauses_s[~np.isnan(pauses_s)]
    return SessionStatistics(
        count=len(rounds),
        agents=len(set(named.column("session_id"))),
        rounds=Spread.of(rounds),
        think_s=Spread.of(pauses_s) if len(pauses_s) else None,
    )

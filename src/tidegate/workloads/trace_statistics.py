"""What a trace looks like: rates, burstiness, lengths, the drift of their ratio, sessions, prefix reuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tidegate.core.errors import ConfigError
from tidegate.workloads.trace import TraceRecord, session_of

MINUTE_S = 60.0
WINDOW_S = 300.0
MOST_WINDOWS = 5_000_000
FEWEST_IN_WINDOW = 20
"""Windows with fewer requests say nothing of a ratio and are left out of its range."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and percentiles (smallest value with at least that share at or below it) of one quantity."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarise at least one value."""
        numbers = np.fromiter(values, dtype=np.float64)
        p50, p90, p99 = np.quantile(numbers, (0.5, 0.9, 0.99), method="inverted_cdf").tolist()
        return cls(float(numbers.mean()), p50, p90, p99, float(numbers.max()))


@dataclass(frozen=True, slots=True)
class Arrivals:
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
class Sessions:
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
    arrivals: Arrivals | None
    input_tokens: Spread
    output_tokens: Spread
    ratio: float
    ratio_range: tuple[float, float] | None
    windows: tuple[Window, ...]
    sessions: Sessions | None
    reuse: Reuse | None

    def to_json(self) -> dict[str, Any]:
        """Return plain data without NaN."""
        return asdict(self)


def statistics(records: Sequence[TraceRecord], *, timed: bool, window_s: float = WINDOW_S) -> Statistics:
    """Describe a trace; ``timed`` says whether ``arrival_s`` is the time of the trace.

    Raises ConfigError for an empty trace or a window that is not positive.
    """
    if not records:
        raise ConfigError("the trace holds no requests")
    if not 0 < window_s < float("inf"):
        raise ConfigError(f"the window must be a positive number of seconds, got {window_s}")
    inputs = np.array([r.input_tokens for r in records], dtype=np.float64)
    outputs = np.array([r.output_tokens for r in records], dtype=np.float64)
    times_s = np.array([r.arrival_s for r in records], dtype=np.float64)
    if timed and (times_s[-1] - times_s[0]) / min(window_s, MINUTE_S) > MOST_WINDOWS:
        raise ConfigError(
            f"the trace lasts {times_s[-1] - times_s[0]:g} s: more than {MOST_WINDOWS:,} windows; are its "
            "times seconds, and the window wide enough?"
        )
    windows = _windows(times_s, inputs, outputs, window_s) if timed else ()
    ratios = [w.ratio for w in windows if w.ratio is not None]
    return Statistics(
        requests=len(records),
        arrivals=_arrivals(times_s) if timed else None,
        input_tokens=Spread.of(inputs),
        output_tokens=Spread.of(outputs),
        ratio=float(inputs.sum() / outputs.sum()),
        ratio_range=(min(ratios), max(ratios)) if ratios else None,
        windows=windows,
        sessions=_sessions(records),
        reuse=_reuse(records),
    )


def cached_tokens(records: Iterable[TraceRecord]) -> list[int]:
    """Return for each prompt how many leading tokens an unbounded cache holds when it comes.

    A block is cached once a request before it in the trace had it, answer included; what is still being
    computed counts as there.
    """
    seen: set[int] = set()
    return [min(r.input_tokens, _known(r, seen) * r.block_tokens) for r in records]


def _known(record: TraceRecord, seen: set[int]) -> int:
    """Return the leading prompt blocks among ``seen``, then add all of the record's."""
    known = 0
    for block in record.hash_ids[: _prompt_blocks(record)]:
        if block not in seen:
            break
        known += 1
    seen.update(record.hash_ids)
    return known


def _prompt_blocks(record: TraceRecord) -> int:
    return min(len(record.hash_ids), -(-record.input_tokens // record.block_tokens))


def _reuse(records: Sequence[TraceRecord]) -> Reuse | None:
    blocks = sum(map(_prompt_blocks, records))
    if not blocks:
        return None
    seen: set[int] = set()
    known = [_known(r, seen) for r in records]
    tokens = sum(min(r.input_tokens, n * r.block_tokens) for r, n in zip(records, known, strict=True))
    return Reuse(tokens / sum(r.input_tokens for r in records), sum(known) / blocks)


def _arrivals(times_s: Numbers) -> Arrivals:
    since_s = times_s - times_s[0]
    duration_s = float(since_s[-1])
    gaps_s = np.diff(times_s)
    minutes = np.bincount((since_s // MINUTE_S).astype(np.int64))
    whole = minutes[: int(duration_s // MINUTE_S)]
    busiest = float(minutes.max()) / min(MINUTE_S, duration_s or MINUTE_S)
    rate_rps = len(times_s) / duration_s if duration_s > 0 else busiest
    return Arrivals(
        duration_s=duration_s,
        rate_rps=rate_rps,
        busiest_minute_rps=busiest,
        peak_to_mean=busiest / rate_rps,
        cv=float(gaps_s.std() / gaps_s.mean()) if len(gaps_s) > 1 and duration_s > 0 else None,
        idc60=float(whole.var() / whole.mean()) if len(whole) > 1 and whole.any() else None,
    )


def _windows(times_s: Numbers, inputs: Numbers, outputs: Numbers, window_s: float) -> tuple[Window, ...]:
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


def _sessions(records: Sequence[TraceRecord]) -> Sessions | None:
    rounds = Counter(session_of(r) for r in records if r.session_id)
    if not rounds:
        return None
    pauses_s = [r.delay_s for r in records if r.turn > 0 and r.delay_s is not None]
    return Sessions(
        count=len(rounds),
        agents=len({r.session_id for r in records if r.session_id}),
        rounds=Spread.of(rounds.values()),
        think_s=Spread.of(pauses_s) if pauses_s else None,
    )

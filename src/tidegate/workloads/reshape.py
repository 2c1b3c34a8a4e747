"""More or fewer requests on the same wall clock: thinning, copies and spikes.

Unlike ``scale_rate``, which compresses time, these keep the day's shape. They decide per session (a
request without one is its own): every turn of a session is kept, copied or dropped with its first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.workloads.copies import Renaming
from tidegate.workloads.trace import TraceRecord, session_of

DEFAULT_JITTER_S = 2.0
"""Longest delay of a copy: short beside a minute's rate, long beside the gaps inside a burst."""


@dataclass(frozen=True, slots=True)
class Spike:
    """Rate times ``factor`` in ``[start_s, start_s + duration_s)``, again every ``period_s`` if given.

    A factor below 1 is a dip. Raises ConfigError for values that make no spike.
    """

    factor: float
    start_s: float
    duration_s: float
    period_s: float | None = None

    def __post_init__(self) -> None:
        sizes_ok = 0 <= self.factor < math.inf and 0 <= self.start_s < math.inf and self.duration_s > 0
        if not (sizes_ok and (self.period_s is None or self.duration_s <= self.period_s < math.inf)):
            raise ConfigError(
                "a spike needs FACTOR >= 0, START >= 0, DURATION > 0 and PERIOD >= DURATION, got "
                f"{self.factor}:{self.start_s}:{self.duration_s}:{self.period_s}"
            )

    @classmethod
    def parse(cls, text: str) -> Spike:
        """Read ``FACTOR:START:DURATION[:PERIOD]`` (seconds); raises ConfigError."""
        try:
            factor, start_s, duration_s, *period_s = map(float, text.split(":"))
            (period,) = period_s or (None,)
        except ValueError:
            raise ConfigError(
                f"spike {text!r}: expected FACTOR:START_S:DURATION_S[:PERIOD_S] as in '4:600:60:1800'"
            ) from None
        return cls(factor, start_s, duration_s, period)

    def end_s(self, at_s: float) -> float | None:
        """Return when the spike that is on at ``at_s`` ends, or None outside of one."""
        since_s = at_s - self.start_s
        if since_s < 0:
            return None
        begun_s = since_s if self.period_s is None else since_s % self.period_s
        return at_s + self.duration_s - begun_s if begun_s < self.duration_s else None


def thin(records: Iterable[TraceRecord], share: float, *, seed: int) -> Iterator[TraceRecord]:
    """Keep each session with probability ``share``, independently; raises ConfigError outside (0, 1].

    For any one seed, a larger share keeps everything that a smaller one keeps.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"the share to keep must be above 0 and at most 1, got {share}")
    return _multiplied(records, lambda _: (share, math.inf), 0.0, seed)


def replicate(
    records: Iterable[TraceRecord], factor: float, *, seed: int, jitter_s: float = DEFAULT_JITTER_S
) -> Iterator[TraceRecord]:
    """Multiply the rate by ``factor`` on the same clock.

    Below 1 this is ``thin``. Above, every session stays, and ``factor - 1`` copies of it on average come
    up to ``jitter_s`` later. Copy k of all sessions is a population of its own: it shares prefixes within
    itself exactly as the original does, and none with the original. Steps that follow one another
    need different seeds to keep their copies apart.
    """
    if not 0 < factor < math.inf:
        raise ConfigError(f"the rate factor must be positive, got {factor}")
    _check_jitter(jitter_s)
    return _multiplied(records, lambda _: (factor, math.inf), jitter_s, seed)


def spikes(
    records: Iterable[TraceRecord], spike: Spike, *, seed: int, jitter_s: float = DEFAULT_JITTER_S
) -> Iterator[TraceRecord]:
    """Multiply the rate of sessions that start within the spike, as ``replicate`` does; leave the rest.

    A copy starts before its spike ends; its later turns may come after.
    """
    _check_jitter(jitter_s)

    def rate(at_s: float) -> tuple[float, float]:
        end_s = spike.end_s(at_s)
        return (1.0, math.inf) if end_s is None else (spike.factor, end_s)

    return _multiplied(records, rate, jitter_s, seed)


def _multiplied(
    records: Iterable[TraceRecord],
    rate: Callable[[float], tuple[float, float]],
    jitter_s: float,
    seed: int,
) -> Iterator[TraceRecord]:
    """Emit each session as often as ``rate(start) -> (factor, copies start before)`` says on average."""
    rng = np.random.default_rng(seed)
    shifts_of: dict[str, list[float]] = {}
    renamings: list[Renaming] = []
    waiting: list[tuple[float, int, TraceRecord]] = []
    serial = 0
    for record in records:
        session = session_of(record)
        shifts = shifts_of.get(session) if session else None
        if shifts is None:
            factor, before_s = rate(record.arrival_s)
            shifts = _shifts(rng, factor, min(jitter_s, before_s - record.arrival_s))
            if session:
                shifts_of[session] = shifts
        while waiting and waiting[0][0] <= record.arrival_s:
            yield heappop(waiting)[2]
        for copy, shift_s in enumerate(shifts):
            serial += 1
            if copy > len(renamings):
                renamings.append(Renaming(f"{seed}.{copy}"))
            named = renamings[copy - 1](record) if copy else record
            at_s = record.arrival_s + shift_s
            heappush(waiting, (at_s, serial, replace(named, arrival_s=at_s) if shift_s else named))
    while waiting:
        yield heappop(waiting)[2]


def _shifts(rng: np.random.Generator, factor: float, jitter_s: float) -> list[float]:
    """Return a delay for each appearance of a session; the original is undelayed."""
    count = int(factor) + (1 if rng.random() < factor % 1.0 else 0)
    return [0.0, *rng.uniform(0.0, jitter_s, max(0, count - 1)).tolist()][:count]


def _check_jitter(jitter_s: float) -> None:
    if not 0 <= jitter_s < math.inf:
        raise ConfigError(f"the jitter must be 0 s or more, got {jitter_s}")

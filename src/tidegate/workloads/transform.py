"""Lazy changes to a stream of records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from heapq import heappop, heappush
from itertools import groupby, islice

from tidegate.core.errors import ConfigError
from tidegate.workloads.trace import TraceRecord


def scale_rate(records: Iterable[TraceRecord], factor: float) -> Iterator[TraceRecord]:
    """Divide arrival times by ``factor``: 2 doubles the rate. Think times are the clients' and stay."""
    _positive("the rate factor", factor)
    return (replace(r, arrival_s=r.arrival_s / factor) for r in records)


def scale_tokens(records: Iterable[TraceRecord], factor: float) -> Iterator[TraceRecord]:
    """Multiply input and output lengths by ``factor``, at least 1 token each.

    The prefix block scales too, so that the shared share of a prompt stays what it was.
    """
    _positive("the token factor", factor)

    def scaled(tokens: int) -> int:
        return max(1, round(tokens * factor))

    return (
        replace(
            r,
            input_tokens=scaled(r.input_tokens),
            output_tokens=scaled(r.output_tokens),
            block_tokens=scaled(r.block_tokens),
        )
        for r in records
    )


def limit(records: Iterable[TraceRecord], count: int) -> Iterator[TraceRecord]:
    """Keep the first ``count`` records."""
    if count < 1:
        raise ConfigError(f"the number of requests must be at least 1, got {count}")
    return islice(records, count)


def window(
    records: Iterable[TraceRecord], start_s: float = 0.0, duration_s: float = float("inf")
) -> Iterator[TraceRecord]:
    """Keep arrivals in ``[start_s, start_s + duration_s)`` and count their time from ``start_s``.

    Stops reading at the first later arrival, so the input must be in order of arrival.
    """
    _positive("the duration", duration_s)
    if start_s < 0:
        raise ConfigError(f"the window starts at {start_s} s, expected 0 or more")
    return _window(records, start_s, start_s + duration_s)


def _window(records: Iterable[TraceRecord], start_s: float, end_s: float) -> Iterator[TraceRecord]:
    for record in records:
        if record.arrival_s >= end_s:
            return
        if record.arrival_s >= start_s:
            yield replace(record, arrival_s=record.arrival_s - start_s) if start_s else record


def retime(records: Iterable[TraceRecord], times_s: Iterable[float]) -> Iterator[TraceRecord]:
    """Give each record, in order, the next arrival time; sessions are not kept together."""
    return (replace(r, arrival_s=t) for r, t in zip(records, times_s, strict=False))


def schedule_sessions(
    records: Iterable[TraceRecord], starts_s: Iterable[float], turn_gap_s: float | None = None
) -> Iterator[TraceRecord]:
    """Start each session at the next arrival time and merge the sessions by arrival.

    Within a session a record keeps its ``arrival_s`` as the time since the session's start; with
    ``turn_gap_s`` turn ``k`` comes ``k * turn_gap_s`` after it instead. A record without a session
    is a session of its own. A session's records must be adjacent and the starts in order. Raises
    ConfigError when a session has several turns at the same instant and no gap is given.
    """
    waiting: list[tuple[float, int, TraceRecord]] = []
    serial = 0
    sessions = groupby(enumerate(records), key=lambda pair: _session_key(*pair))
    for start_s, (_, turns) in zip(starts_s, sessions, strict=False):
        while waiting and waiting[0][0] <= start_s:
            yield heappop(waiting)[2]
        for turn, (_, record) in enumerate(turns):
            offset_s = record.arrival_s if turn_gap_s is None else turn * turn_gap_s
            if turn_gap_s is None and turn == 1 and record.arrival_s == 0.0:
                raise ConfigError(
                    f"session {record.session_id!r} has several turns and no times within the session; "
                    "give the seconds between turns (--turn-gap)"
                )
            serial += 1
            arrival_s = start_s + offset_s
            heappush(waiting, (arrival_s, serial, replace(record, arrival_s=arrival_s)))
    while waiting:
        yield heappop(waiting)[2]


def _session_key(index: int, record: TraceRecord) -> str | int:
    # Sub-agents of one session ("7/agent_001") run on the session's clock and start with it.
    return record.session_id.partition("/")[0] or index


def _positive(what: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{what} must be positive, got {value}")

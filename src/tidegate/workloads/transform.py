"""Lazy changes to a stream of records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from heapq import heappop, heappush
from itertools import groupby, islice

from tidegate.core.errors import ConfigError
from tidegate.workloads.trace import TraceRecord, session_of

SMALLEST_BLOCK = 16
"""Tokens of the smallest prefix block that scaling makes: rounding one to a whole number then costs 3 %."""


def scale_rate(records: Iterable[TraceRecord], factor: float) -> Iterator[TraceRecord]:
    """Divide arrival times by ``factor``: 2 doubles the rate. Think times are the clients' and stay."""
    _positive("the rate factor", factor)
    return (replace(r, arrival_s=r.arrival_s / factor) for r in records)


def scale_tokens(records: Iterable[TraceRecord], factor: float) -> Iterator[TraceRecord]:
    """Multiply input and output lengths by ``factor``, at least 1 token each.

    The prefix block scales too, so that the shared share of a prompt stays what it was. Blocks that would
    become smaller than ``SMALLEST_BLOCK`` are first joined, each group named by its last block.
    """
    _positive("the token factor", factor)

    def scaled(tokens: float) -> int:
        return max(1, round(tokens * factor))

    def change(record: TraceRecord) -> TraceRecord:
        joined = 1
        if record.hash_ids and factor < 1.0:
            joined = max(
                1, math.ceil(min(SMALLEST_BLOCK, record.block_tokens) / (record.block_tokens * factor))
            )
        return replace(
            record,
            input_tokens=scaled(record.input_tokens),
            output_tokens=scaled(record.output_tokens),
            hash_ids=record.hash_ids if joined == 1 else record.hash_ids[joined - 1 :: joined],
            block_tokens=scaled(record.block_tokens * joined),
        )

    return map(change, records)


def limit(records: Iterable[TraceRecord], count: int) -> Iterator[TraceRecord]:
    """Keep the first ``count`` records."""
    if count < 1:
        raise ConfigError(f"the number of requests must be at least 1, got {count}")
    return islice(records, count)


def window(
    records: Iterable[TraceRecord], start_s: float = 0.0, duration_s: float = float("inf")
) -> Iterator[TraceRecord]:
    """Keep arrivals in ``[start_s, start_s + duration_s)`` and count their time from ``start_s``.

    Stops reading at the first later arrival, so the input must be in order of arrival. A session's turn
    whose earlier turns fall before the window loses its pause: there is no answer for it to wait for.
    """
    _positive("the duration", duration_s)
    if start_s < 0:
        raise ConfigError(f"the window starts at {start_s} s, expected 0 or more")
    return _window(records, start_s, start_s + duration_s)


def _window(records: Iterable[TraceRecord], start_s: float, end_s: float) -> Iterator[TraceRecord]:
    cut_off: set[str] = set()
    for record in records:
        if record.arrival_s >= end_s:
            return
        if record.arrival_s < start_s:
            cut_off.add(record.session_id)
            continue
        if record.session_id in cut_off and record.session_id:
            cut_off.discard(record.session_id)
            record = replace(record, delay_s=None)
        yield replace(record, arrival_s=record.arrival_s - start_s) if start_s else record


def retime(records: Iterable[TraceRecord], times_s: Iterable[float]) -> Iterator[TraceRecord]:
    """Give each record, in order, the next arrival time; sessions are not kept together."""
    return (replace(r, arrival_s=t) for r, t in zip(records, times_s, strict=False))


def schedule_sessions(
    records: Iterable[TraceRecord], starts_s: Iterable[float], turn_gap_s: float | None = None
) -> Iterator[TraceRecord]:
    """Start each session at the next arrival time and merge the sessions by arrival.

    Within a session a record keeps its ``arrival_s`` as the time since the session's start; with
    ``turn_gap_s`` turn ``k`` comes ``k * turn_gap_s`` after it instead, and every turn but the first of its
    agent has that as its pause (``delay_s``). Agents of one session share its start and run beside each
    other: each waits for its own answers only, and a sub-agent's first turn comes at its own time. A
    record without a session is a session of its own. A session's records must be adjacent and the starts
    in order. Raises ConfigError when a session has several turns at the same instant and no gap is given.
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
            delay_s = turn_gap_s if turn_gap_s is not None and record.turn else record.delay_s
            heappush(waiting, (arrival_s, serial, replace(record, arrival_s=arrival_s, delay_s=delay_s)))
    while waiting:
        yield heappop(waiting)[2]


def by_session(records: Iterable[TraceRecord]) -> Iterator[TraceRecord]:
    """Take a timed trace apart into sessions: the input that ``schedule_sessions`` wants.

    Sessions come in the order of their first request, each with its records adjacent and timed since that
    request. The trace is read whole.
    """
    sessions: dict[str | int, list[TraceRecord]] = {}
    for index, record in enumerate(records):
        sessions.setdefault(_session_key(index, record), []).append(record)
    for turns in sessions.values():
        start_s = turns[0].arrival_s
        yield from (replace(record, arrival_s=record.arrival_s - start_s) for record in turns)


def _session_key(index: int, record: TraceRecord) -> str | int:
    return session_of(record) or index


def _positive(what: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{what} must be positive, got {value}")

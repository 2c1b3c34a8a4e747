"""When each request of a workload arrives."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.dataplane.events import EventKind, EventQueue
from tidegate.workloads.sessions import followed
from tidegate.workloads.trace import Integers, TraceRecord, Workload

INFINITE = float("inf")
RECORDS_AT_ONCE = 500
"""Requests between two calls of ``watch``, and records made at once."""


class TraceArrivals:
    """Announces the requests of a workload, by their row, as ARRIVAL events; each exactly once.

    In an open loop records are made as their time comes. In a closed loop a request with a turn above 0 and
    a ``delay_s`` arrives that long after the end of its session's previous request, however that ended, and
    its own ``arrival_s`` is ignored; one without a previous request keeps it. ``watch`` is told now and then
    how many requests have been announced. Raises ConfigError for a workload that cannot be.

    ``coming`` holds the records that are announced; others may follow the end of one that is served.
    """

    def __init__(
        self,
        workload: Workload,
        events: EventQueue,
        *,
        closed_loop: bool,
        watch: Callable[[int], None] | None = None,
    ) -> None:
        self._events = events
        self._announced = -1
        self.coming: dict[int, TraceRecord] = {}
        self._after: dict[int, tuple[int, TraceRecord]] = {}
        self._watch = watch
        follows = followed(workload) if closed_loop else {}
        rows = np.setdiff1d(np.arange(len(workload)), list(follows.values()), assume_unique=True)
        _check(workload, rows)
        for before, row in follows.items():
            record = workload[row]
            if record.delay_s is None or not 0 <= record.delay_s < INFINITE:
                raise ConfigError(f"request {row}: its delay is {record.delay_s} s; give one of 0 or more")
            self._after[before] = (row, record)
        self._source = self._records(workload, rows)
        self._announce()

    def take(self, number: int) -> TraceRecord:
        """Return the record that an event announced."""
        record = self.coming.pop(number)
        if number == self._announced:
            self._announce()
        return record

    def ended(self, number: int, now: float) -> None:
        """Announce the turn that waited for the end of request ``number``, if one does."""
        following = self._after.pop(number, None) if self._after else None
        if following is not None:
            later, record = following
            assert record.delay_s is not None
            self.coming[later] = record
            self._events.push(now + record.delay_s, EventKind.ARRIVAL, later)

    def _announce(self) -> None:
        self._announced, record = next(self._source, (-1, None))
        if record is not None:
            self.coming[self._announced] = record
            self._events.push(record.arrival_s, EventKind.ARRIVAL, self._announced)

    def _records(self, workload: Workload, rows: Integers) -> Iterator[tuple[int, TraceRecord]]:
        for start in range(0, len(rows), RECORDS_AT_ONCE):
            if self._watch is not None:
                self._watch(start)
            chosen = rows[start : start + RECORDS_AT_ONCE]
            yield from zip(chosen.tolist(), workload[chosen], strict=True)


def _check(workload: Workload, rows: Integers) -> None:
    """Raise ConfigError for empty requests and for ``rows`` out of order."""
    arrival_s = workload.arrival_s[rows]
    last_s = np.concatenate(([0.0], arrival_s[:-1]))
    wrong = np.flatnonzero(~((last_s <= arrival_s) & (arrival_s < INFINITE)))
    if len(wrong):
        at = int(wrong[0])
        raise ConfigError(
            f"request {rows[at]}: it arrives at {arrival_s[at]} s, after one at {last_s[at]} s; "
            "sort the trace by arrival"
        )
    for row in np.flatnonzero(np.minimum(workload.input_tokens, workload.output_tokens) < 1)[:1]:
        raise ConfigError(
            f"request {row}: {workload.input_tokens[row]} input and {workload.output_tokens[row]} output "
            "tokens; each must be at least 1"
        )

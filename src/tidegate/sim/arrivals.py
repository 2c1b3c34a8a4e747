"""When each request of a trace arrives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tidegate.core.errors import ConfigError
from tidegate.dataplane.events import EventQueue, Kind
from tidegate.workloads.trace import TraceRecord

INFINITE = float("inf")


class Arrivals:
    """Announces the records of a trace, by their place in it, as ARRIVAL events; each exactly once.

    An open loop reads the trace as its time comes. In a closed loop a record with a turn above 0 and a
    ``delay_s`` arrives that long after the end of its session's previous record, however that ended, and its
    own ``arrival_s`` is ignored; a record without a previous one keeps it. A later turn may arrive earlier
    than its ``arrival_s``, so the trace is then read whole, and waits in memory.

    ``coming`` holds the records that are announced; others may follow the end of one that is served.
    """

    def __init__(self, trace: Iterable[TraceRecord], events: EventQueue, *, closed_loop: bool) -> None:
        self._events = events
        self._announced = -1
        self.coming: dict[int, TraceRecord] = {}
        self._after: dict[int, tuple[int, TraceRecord]] = {}
        self._last_s = 0.0
        numbered = enumerate(trace)
        self._source: Iterator[tuple[int, TraceRecord]] = (
            iter(self._chained(numbered)) if closed_loop else numbered
        )
        self._announce()

    def take(self, number: int) -> TraceRecord:
        """Return the record that an event announced. Raises ConfigError for a next one that cannot be."""
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
            self._events.push(now + record.delay_s, Kind.ARRIVAL, later)

    def _announce(self) -> None:
        following = next(self._source, None)
        if following is None:
            self._announced = -1
            return
        number, record = following
        if not self._last_s <= record.arrival_s < INFINITE:
            raise ConfigError(
                f"request {number}: it arrives at {record.arrival_s} s, after one at {self._last_s} s; "
                "sort the trace by arrival"
            )
        _check_tokens(number, record)
        self._last_s = record.arrival_s
        self._announced = number
        self.coming[number] = record
        self._events.push(record.arrival_s, Kind.ARRIVAL, number)

    def _chained(self, numbered: Iterable[tuple[int, TraceRecord]]) -> list[tuple[int, TraceRecord]]:
        """Take out the records that follow another one; return the rest."""
        independent = []
        last_of: dict[str, int] = {}
        for number, record in numbered:
            session = record.session_id
            before = last_of.get(session) if session and record.turn > 0 else None
            if before is None or record.delay_s is None:
                independent.append((number, record))
            else:
                if not 0 <= record.delay_s < INFINITE:
                    raise ConfigError(
                        f"request {number}: its delay is {record.delay_s} s; give one of 0 or more"
                    )
                _check_tokens(number, record)
                self._after[before] = (number, record)
            if session:
                last_of[session] = number
        return independent


def _check_tokens(number: int, record: TraceRecord) -> None:
    if not (1 <= record.input_tokens < INFINITE and 1 <= record.output_tokens < INFINITE):
        raise ConfigError(
            f"request {number}: {record.input_tokens} input and {record.output_tokens} output tokens; "
            "each must be at least 1"
        )

"""Several traces as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from heapq import merge

from tidegate.core.errors import ConfigError
from tidegate.workloads.copies import apart
from tidegate.workloads.trace import TraceRecord


def superpose(*traces: Iterable[TraceRecord]) -> Iterator[TraceRecord]:
    """Merge traces by arrival, each on its own clock from 0; their sessions and prefixes stay distinct.

    Every input must be in order of arrival; the output is.
    """
    return merge(*apart(traces), key=lambda record: record.arrival_s)


def concatenate(*traces: Iterable[TraceRecord], gap_s: float = 0.0) -> Iterator[TraceRecord]:
    """Put traces one after the other: each starts ``gap_s`` after the last arrival of the one before.

    Sessions and prefixes of different traces stay distinct. Raises ConfigError for a negative gap.
    """
    if not gap_s >= 0:
        raise ConfigError(f"the gap between traces must be 0 s or more, got {gap_s}")
    return _in_turn(apart(traces), gap_s)


def _in_turn(traces: list[Iterator[TraceRecord]], gap_s: float) -> Iterator[TraceRecord]:
    start_s, last_s = 0.0, 0.0
    for trace in traces:
        for record in trace:
            last_s = record.arrival_s + start_s
            yield replace(record, arrival_s=last_s) if start_s else record
        start_s = last_s + gap_s

"""Other draws of the same trace, for confidence intervals over seeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.workloads.trace import TraceRecord, session_of

PERMUTED_WITHIN_S = 60.0


def reseeded(records: Iterable[TraceRecord], seed: int) -> list[TraceRecord]:
    """Return the trace as another day might have had it: who asks what is permuted within each minute.

    Seed 0 is the trace itself. Another seed permutes the requests among the arrival times of their
    minute: lengths, prefixes and clients move together, arrivals stay as they are. A session moves as a
    whole: its turns keep their offsets from its first. Same seed, same result. Raises ConfigError for
    a negative seed.
    """
    if seed < 0:
        raise ConfigError(f"a seed must be 0 or more, got {seed}")
    trace = list(records)
    if seed == 0:
        return trace
    units: dict[str | int, list[TraceRecord]] = {}
    for index, record in enumerate(trace):
        units.setdefault(session_of(record) or index, []).append(record)
    sessions = list(units.values())
    starts_s = np.array([turns[0].arrival_s for turns in sessions])
    moved = [
        replace(record, arrival_s=start_s + (record.arrival_s - turns[0].arrival_s))
        for turns, start_s in zip(sessions, _permuted(starts_s, seed).tolist(), strict=True)
        for record in turns
    ]
    return sorted(moved, key=lambda record: record.arrival_s)


def _permuted(
    starts_s: np.ndarray[tuple[int], np.dtype[np.float64]], seed: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the starts with those of one minute permuted among each other."""
    rng = np.random.default_rng(seed)
    minutes = np.floor(starts_s / PERMUTED_WITHIN_S)
    # Sorted by minute, in the original and in a random order: rank for rank, one takes the other's start.
    ordered = np.argsort(minutes, kind="stable")
    shuffled = rng.permutation(len(starts_s))
    shuffled = shuffled[np.argsort(minutes[shuffled], kind="stable")]
    result = np.empty_like(starts_s)
    result[ordered] = starts_s[shuffled]
    return result

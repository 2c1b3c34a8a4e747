"""Synthetic workloads: an arrival process with lengths drawn for each request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.workloads.arrivals import ArrivalProcess
from tidegate.workloads.token_counts import TokenCounts
from tidegate.workloads.trace import TraceRecord


def generate(
    arrivals: ArrivalProcess, inputs: TokenCounts, outputs: TokenCounts, *, seed: int
) -> Iterator[TraceRecord]:
    """Yield requests without end, input and output lengths independent; same seed, same requests.

    Arrivals and lengths draw from separate streams of the seed, so changing one leaves the other.
    """
    arrival_rng, length_rng = _streams(seed)
    for arrival_s in arrivals.times_s(arrival_rng):
        yield TraceRecord(arrival_s, inputs.draw(length_rng), outputs.draw(length_rng))


def resample(arrivals: ArrivalProcess, pool: Sequence[TraceRecord], *, seed: int) -> Iterator[TraceRecord]:
    """Yield requests without end whose (input, output) pairs are drawn from ``pool`` with replacement.

    Pairs stay together; prefixes and sessions are dropped, for they mean nothing out of order.
    Raises ConfigError for an empty pool.
    """
    if not pool:
        raise ConfigError("there are no requests to draw lengths from")
    arrival_rng, length_rng = _streams(seed)
    bare = [replace(r, hash_ids=(), session_id="", turn=0, delay_s=None, client_id="") for r in pool]
    for arrival_s in arrivals.times_s(arrival_rng):
        yield replace(bare[int(length_rng.integers(len(bare)))], arrival_s=arrival_s)


def arrival_times_s(arrivals: ArrivalProcess, *, seed: int) -> Iterator[float]:
    """Yield the arrival times that ``generate`` would use with the same seed."""
    return arrivals.times_s(_streams(seed)[0])


def _streams(seed: int) -> tuple[np.random.Generator, np.random.Generator]:
    arrival_seed, length_seed = np.random.SeedSequence(seed).spawn(2)
    return np.random.default_rng(arrival_seed), np.random.default_rng(length_seed)

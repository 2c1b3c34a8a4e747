"""Workloads from arrival times and length distributions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.workloads.arrivals import ArrivalProcess
from tidegate.workloads.token_counts import TokenCounts
from tidegate.workloads.trace import Workload


def generate(times_s: Iterable[float], inputs: TokenCounts, outputs: TokenCounts, *, seed: int) -> Workload:
    """Return a request for each arrival time, its input and output lengths independent.

    Same seed, same lengths. They draw from another stream of the seed than ``arrival_times_s`` does, so
    changing one leaves the other.
    """
    arrival_s = np.fromiter(times_s, np.float64)
    rng = _streams(seed)[1]
    lengths = np.array(
        [(inputs.draw(rng), outputs.draw(rng)) for _ in range(len(arrival_s))], np.int64
    ).reshape(-1, 2)
    return Workload(arrival_s, lengths[:, 0], lengths[:, 1])


def resample(times_s: Iterable[float], pool: Workload, *, seed: int) -> Workload:
    """Return a request for each arrival time, its (input, output) pair drawn from ``pool`` with replacement.

    Pairs stay together; prefixes and sessions are dropped, for they mean nothing out of order.
    Raises ConfigError for an empty pool.
    """
    if not pool:
        raise ConfigError("there are no requests to draw lengths from")
    arrival_s = np.fromiter(times_s, np.float64)
    drawn = pool[_streams(seed)[1].integers(len(pool), size=len(arrival_s))]
    return replace(
        drawn, arrival_s=arrival_s, hash_ids=None, session_id=None, turn=None, delay_s=None, client_id=None
    )


def arrival_times_s(arrivals: ArrivalProcess, *, seed: int) -> Iterator[float]:
    """Yield the arrival times of a process without end; same seed, same times."""
    return arrivals.times_s(_streams(seed)[0])


def _streams(seed: int) -> tuple[np.random.Generator, np.random.Generator]:
    arrival_seed, length_seed = np.random.SeedSequence(seed).spawn(2)
    return np.random.default_rng(arrival_seed), np.random.default_rng(length_seed)

"""Other draws of the same trace, for confidence intervals over seeds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.workloads.trace import Floats, Workload

PERMUTED_WITHIN_S = 60.0


def reseeded(workload: Workload, seed: int) -> Workload:
    """Return the trace as another day might have had it: who asks what is permuted within each minute.

    Seed 0 is the trace itself. Another seed permutes the requests among the arrival times of their
    minute: lengths, prefixes and clients move together, arrivals stay as they are. A session moves as a
    whole: its turns keep their offsets from its first. Same seed, same result. Raises ConfigError for
    a negative seed.
    """
    if seed < 0:
        raise ConfigError(f"a seed must be 0 or more, got {seed}")
    if seed == 0:
        return workload
    units = workload.units()
    first = np.unique(units, return_index=True)[1]
    starts_s = workload.arrival_s[first]
    arrival_s = _permuted(starts_s, seed)[units] + (workload.arrival_s - starts_s[units])
    # At one instant, earlier sessions come first.
    order = np.lexsort((units, arrival_s))
    return replace(workload, arrival_s=arrival_s)[order]


def _permuted(starts_s: Floats, seed: int) -> Floats:
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

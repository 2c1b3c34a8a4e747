"""Several traces as one."""

from __future__ import annotations

from dataclasses import replace

from tidegate.core.errors import ConfigError
from tidegate.workloads.copies import apart
from tidegate.workloads.trace import Workload


def superpose(*workloads: Workload) -> Workload:
    """Merge workloads by arrival, each on its own clock from 0; their sessions and prefixes stay distinct.

    Every input must be in order of arrival; the output is.
    """
    together = Workload.joined(apart(workloads))
    return together[together.arrival_s.argsort(kind="stable")]


def concatenate(*workloads: Workload, gap_s: float = 0.0) -> Workload:
    """Put workloads one after the other: each starts ``gap_s`` after the last arrival of the one before.

    Sessions and prefixes of different workloads stay distinct. Raises ConfigError for a negative gap.
    """
    if not gap_s >= 0:
        raise ConfigError(f"the gap between traces must be 0 s or more, got {gap_s}")
    start_s, last_s = 0.0, 0.0
    parts = []
    for one in apart(workloads):
        parts.append(replace(one, arrival_s=one.arrival_s + start_s))
        if one:
            last_s = float(parts[-1].arrival_s[-1])
        start_s = last_s + gap_s
    return Workload.joined(parts)

"""What a simulation answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tidegate.measure.request_table import RequestTable
from tidegate.measure.timeline import Timeline


@dataclass(frozen=True, slots=True)
class InstanceUse:
    """One instance over the run, with its labels at both ends; empty labels if it never came up.

    ``most_kv_blocks`` of ``kv_blocks`` were in use at once; ``steps`` are engine steps, however many of them
    were jumped over at a time; it was up for ``up_s``.
    """

    id: str
    first_role: str
    last_role: str
    steps: int
    kv_blocks: int
    most_kv_blocks: int
    up_s: float


@dataclass(frozen=True, slots=True, eq=False)
class SimRun:
    """A finished simulation. ``instance_hours`` sums the time that instances were up until ``end_s``, when
    the last request ended; ``migrations`` counts those that were carried through; ``events`` counts what the
    loop handled. ``warnings`` say what made the run pointless in part."""

    requests: RequestTable
    instances: Sequence[InstanceUse]
    timeline: Timeline
    flips: int
    migrations: int
    preemptions: int
    kv_transfer_bytes: int
    instance_hours: float
    end_s: float
    events: int
    warnings: Sequence[str]

    @property
    def outcomes(self) -> Counter[str]:
        """How many requests ended in each way."""
        counts = np.bincount(self.requests.outcome, minlength=len(self.requests.outcomes)).tolist()
        return Counter({name: n for name, n in zip(self.requests.outcomes, counts, strict=True) if n})

    @property
    def attained(self) -> int:
        """How many requests were answered within their SLO."""
        return int(np.count_nonzero(self.requests.attained))

"""What a simulation answers, and what makes one pointless, told in words instead of in a table of misses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tidegate.core.slo import Slo
from tidegate.dataplane.replica import Replica
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
    the last request ended; ``adds`` counts instances that were started and drains that were called off,
    ``reversals`` the flips, adds and drains that were soon taken back, ``migrations`` those that were carried
    through; ``events`` counts what the loop handled. ``warnings`` say what made the run pointless in part."""

    requests: RequestTable
    instances: Sequence[InstanceUse]
    timeline: Timeline
    flips: int
    adds: int
    drains: int
    reversals: int
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


def slo_warnings(replicas: Sequence[Replica], slo: Slo) -> list[str]:
    """Return a warning per target that no instance can meet even on an empty cluster.

    The least that counts: the prefill of a one-token prompt, and a decode step of one request.
    """
    if not replicas:
        return []
    prefill_s = min(r.profile.prefill_s(1, 0) + r.engine.host_s for r in replicas)
    step_s = min(float(r.profile.step.seconds(1.0, 1.0)) + r.engine.host_s for r in replicas)
    warnings = []
    if prefill_s > slo.ttft_s:
        warnings.append(
            f"no instance can meet the TTFT target of {slo.ttft_s * 1e3:g} ms: the prefill of a single token "
            f"takes {prefill_s * 1e3:.3g} ms"
        )
    if step_s > slo.tpot_s:
        warnings.append(
            f"no instance can meet the TPOT target of {slo.tpot_s * 1e3:g} ms: a step of a single request "
            f"takes {step_s * 1e3:.3g} ms"
        )
    return warnings


def unstarted_warnings(asked: Sequence[tuple[float, str]]) -> list[str]:
    """Return what there is to say of starts that no spare was there for, each as (time, reason)."""
    if not asked:
        return []
    at_s, reason = asked[0]
    return [
        f"a controller asked for one more instance at {at_s:.1f} s ({reason or 'without a reason'}), "
        f"{len(asked)} in all, and there was no spare: `--spares N` gives some"
    ]


def oversize_warnings(oversize: Sequence[tuple[int, int]], context: int) -> list[str]:
    """Return what there is to say of requests that no instance could hold, each as (tokens, number)."""
    if not oversize:
        return []
    largest, number = max(oversize, key=lambda each: each[0])
    return [
        f"{len(oversize)} requests were refused: they need more tokens than the longest context of any "
        f"instance, {context}; the largest is request {number} with {largest}"
    ]

"""A goodput that no policy exceeds on a deployment: the work of the cheapest requests over the time there is.

Of a run's requests a share ``level`` has to attain; the least work that many of them can be is counted, each
step's fixed cost shared by as many as it has room for. A request that attains is prefilled by its arrival
plus the TTFT target, and done within TPOT target times steps of that. Where roles never change, each phase
has its own replicas' time; otherwise both share all of it. Loose (queues, whole steps and targets of single
requests are not in it), but a deployment that it excludes cannot be the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tidegate.bound.demand import Demand, demand_of
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.dataplane.replica import EngineSettings
from tidegate.planner.deployment import Deployment, PoolOf, ReplicaKind
from tidegate.planner.trial import TrialLength, drawn
from tidegate.workloads.choice import WorkloadChoice
from tidegate.workloads.sessions import in_rounds

Values = NDArray[np.float64]
Mask = NDArray[np.bool_]
LENGTHS = (0.5, 0.65, 0.8, 0.9, 1.0)
"""Quantiles of answers at which a bound is computed; the least counts."""
FIXED_ROLES = ("minimal-load", "static", "round-robin")
"""Systems that never change a label: only there has each phase its own time."""


@dataclass
class Bounds:
    """Bounds on the goodput of trials of one workload (``planner.trial``), first seed."""

    choice: WorkloadChoice
    slo: Slo
    level: float
    engine: EngineSettings
    _demands: dict[TrialLength, Demand] = field(default_factory=dict)
    _works: dict[tuple[TrialLength, ReplicaKind, int], tuple[Values, Values]] = field(default_factory=dict)

    def rps(self, chosen: Deployment, length: TrialLength) -> float:
        """Return a rate above which a deployment attains less than the level; infinite where none is known.

        None is known where rounds wait for answers, for their arrivals are the system's, and for an excerpt,
        which does not see answers end.
        """
        if length.excerpt or in_rounds(drawn(self.choice, length.requests, 0)):
            return float("inf")
        if chosen.system in FIXED_ROLES and chosen.family == "disaggregated":
            prefill = [pool for pool in chosen.pools if pool.role is Role.PREFILL]
            decode = [pool for pool in chosen.pools if pool.role is Role.DECODE]
            return min(self._prefill(prefill, length, 0), self._answers(decode, length, 1, 0))
        # Of any budget that a replica has, the largest is the cheapest.
        chunk = max(pool.chunk_tokens for pool in chosen.pools)
        return min(self._prefill(chosen.pools, length, chunk), self._answers(chosen.pools, length, 2, chunk))

    def _prefill(self, pools: Sequence[PoolOf], length: TrialLength, chunk: int) -> float:
        """Bound the rate by prefills, which end within the TTFT target after the last arrival."""
        everybody = np.ones(len(self._demand(length)), dtype=bool)
        return self._rate(self._speed(pools, length, 0, chunk), everybody, self.slo.ttft_s, length)

    def _answers(self, pools: Sequence[PoolOf], length: TrialLength, phase: int, chunk: int) -> float:
        """Bound the rate by answers: those up to any length end within the targets of that length.

        Of the requests that attain, at most as many as are longer need not be counted.
        """
        decodes, speed = self._demand(length).decodes, self._speed(pools, length, phase, chunk)
        bounds = []
        for longest in np.quantile(decodes, LENGTHS):
            slack_s = self.slo.ttft_s + self.slo.tpot_s * float(longest)
            bounds.append(self._rate(speed, decodes <= longest, slack_s, length))
        return min(bounds)

    def _speed(
        self, pools: Sequence[PoolOf], length: TrialLength, phase: int, chunk: int
    ) -> tuple[Values, float]:
        """Return the seconds that each request takes a replica of the first pool, and how many such replicas
        the pools are at best. ``phase`` is 0 for prefills, 1 for decodes and 2 for both."""
        works = []
        for pool in pools:
            prefill, decode = self._work(length, pool.kind, chunk or pool.chunk_tokens)
            works.append((pool.count, (prefill, decode, prefill + decode)[phase]))
        reference = works[0][1]
        replicas = 0.0
        for count, work in works:
            ratios = np.divide(work, reference, out=np.ones_like(work), where=reference > 0)
            replicas += count / max(1e-12, float(ratios.min()))
        return reference, replicas

    def _rate(self, speed: tuple[Values, float], counted: Mask, slack_s: float, length: TrialLength) -> float:
        """Return the rate at which the least work of those ``counted`` that have to attain just fits between
        the first arrival and ``slack_s`` after the last."""
        work, replicas = speed
        needed = int(np.ceil(self.level * len(work) - 1e-9)) - int(np.count_nonzero(~counted))
        busy_s = float(np.sort(work[counted])[: max(0, needed)].sum()) / replicas
        span_s = busy_s - slack_s
        if span_s <= 0:
            return float("inf")
        return (len(drawn(self.choice, length.requests, 0)) - 1) / span_s

    def _demand(self, length: TrialLength) -> Demand:
        if length not in self._demands:
            self._demands[length] = demand_of(drawn(self.choice, length.requests, 0))
        return self._demands[length]

    def _work(self, length: TrialLength, kind: ReplicaKind, chunk: int) -> tuple[Values, Values]:
        """Return the least seconds of a replica that each request's prefill and decode take."""
        key = length, kind, chunk
        if key not in self._works:
            self._works[key] = self._least(self._demand(length), kind, chunk)
        return self._works[key]

    def _least(self, demand: Demand, kind: ReplicaKind, chunk: int) -> tuple[Values, Values]:
        profile, engine = kind.profile.profile, self.engine
        pure, mixed, step = profile.prefill, profile.mixed, profile.step
        cached = engine.prefix_cache
        new = demand.new_tokens if cached else demand.prompt_tokens
        shared = demand.shared_tokens if cached else np.zeros_like(new)

        def per_token_s(a: float, b: float, n0: float) -> float:
            # Least of (a + b max(0, N - n0)) / N over N up to the budget: at n0, or at the budget.
            sizes = {min(max(n0, 1.0), float(chunk)), float(chunk)}
            return min((engine.host_s + a + b * max(0.0, n - n0)) / n for n in sizes)

        pure_s = per_token_s(float(pure.a_s), float(pure.b_s), float(pure.n0))
        mixed_s = per_token_s(float(mixed.a_s), float(mixed.b_s), float(mixed.n0))
        token_s, pair_s = min(pure_s, mixed_s), float(min(pure.c_s, mixed.c_s))
        # The trial caches at best all that some request before it had: what is new once is computed once.
        prefill = np.maximum(new, 1.0) * token_s + pair_s * 0.5 * new * new
        held = np.maximum(demand.prompt_tokens + 0.5 * (demand.decodes + 1.0) - shared, 0.0)
        fixed_s = float(step.a_s) + engine.host_s
        room = np.maximum(1.0 / engine.max_num_seqs, held / kind.profile.kv_capacity_tokens)
        alone = fixed_s * room + float(step.b_s) + float(step.c_s) * held
        beside = mixed_s + float(mixed.d_s) * held
        return prefill, demand.decodes * np.minimum(alone, beside)

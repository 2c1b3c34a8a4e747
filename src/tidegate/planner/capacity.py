"""What a pool serves in closed form: where a search begins, and the coefficients of its program.

A phase has to keep its own target for the square root of the level, so that both together keep the level
(``policies.dopd.ratio``, whose queues these are), or for what it can at best where that is less. Prefill
sees only the tokens of a prompt that no cache holds; decode sees the whole context. Simulations correct the
figures by a factor per role.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.dataplane.replica import EngineSettings
from tidegate.planner.deployment import Deployment, ReplicaKind
from tidegate.policies.dopd.plan import REACHED
from tidegate.policies.dopd.ratio import Sizing
from tidegate.policies.dopd.service import ServingModel, Traffic
from tidegate.workloads.trace import Workload
from tidegate.workloads.trace_statistics import cached_tokens

SAMPLE = 160
"""Requests that stand for all of a workload's lengths."""
MANY = 8
"""Replicas of a pool that tell what one more serves."""
_ROUNDS = 14
"""Of the bisection for a rate: to 1 part in 16,000 of the bracket."""


@dataclass(frozen=True, slots=True)
class Affine:
    """What ``count`` replicas serve: ``each_rps * count - lost_rps``; the first has nobody to share with."""

    each_rps: float
    lost_rps: float

    def rps(self, count: int) -> float:
        return max(0.0, self.each_rps * count - self.lost_rps) if count else 0.0

    def times(self, factor: float) -> Affine:
        return Affine(factor * self.each_rps, factor * self.lost_rps)


@dataclass(frozen=True)
class Lengths:
    """A workload's lengths: whole prompts, and what of them is new where a cache holds all the rest."""

    whole: Traffic
    fresh: Traffic

    @classmethod
    def of(cls, workload: Workload, prefix_cache: bool) -> Lengths:
        """Take ``SAMPLE`` requests, spread evenly over the workload in the order of their lengths."""
        inputs = workload.input_tokens.astype(np.float64)
        outputs = np.maximum(1.0, workload.output_tokens.astype(np.float64))
        cached = np.minimum(cached_tokens(workload), inputs - 1.0) if prefix_cache else np.zeros_like(inputs)
        order = np.lexsort((outputs, inputs))
        at = order[np.linspace(0, len(order) - 1, min(SAMPLE, len(order))).astype(np.intp)]
        gaps_s = np.diff(workload.arrival_s)
        mean_s = float(gaps_s.mean()) if len(gaps_s) else 0.0
        scv = float(gaps_s.var() / mean_s**2) if mean_s > 0 else 1.0
        whole = Traffic.of(1.0, inputs[at], outputs[at], scv)
        fresh = Traffic.of(1.0, np.maximum(1.0, (inputs - cached)[at]), outputs[at], scv)
        return cls(whole, fresh)


@dataclass
class Capacities:
    """The capacities of every kind of replica for one workload and SLO.

    ``factors`` correct them by role: what simulations served over what was predicted.
    """

    workload: Workload
    slo: Slo
    level: float
    engine: EngineSettings
    factors: dict[Role, float] = field(default_factory=lambda: dict.fromkeys(Role, 1.0))
    _found: dict[tuple[Role, ReplicaKind, int], Affine] = field(default_factory=dict)

    @cached_property
    def lengths(self) -> Lengths:
        return Lengths.of(self.workload, self.engine.prefix_cache)

    def of(self, role: Role, kind: ReplicaKind, chunk_tokens: int) -> Affine:
        """Return what replicas of a kind serve in a role, corrected; nothing where they cannot."""
        key = role, kind, 0 if role is Role.DECODE else chunk_tokens
        if key not in self._found:
            self._found[key] = self._affine(*key)
        plain, factor = self._found[key], self.factors[role]
        return plain.times(factor)

    def by_role(self, chosen: Deployment) -> Mapping[Role, float]:
        """Return what a deployment's pools of each role serve, in requests/s."""
        found: dict[Role, float] = {}
        for pool in chosen.pools:
            rps = self.of(pool.role, pool.kind, pool.chunk_tokens).rps(pool.count)
            found[pool.role] = found.get(pool.role, 0.0) + rps
        return found

    def sizing(self, role: Role, kind: ReplicaKind, chunk_tokens: int) -> Sizing:
        """Return the queues of a kind in a role: of fresh prompts, of whole ones where it decodes only."""
        traffic = self.lengths.whole if role is Role.DECODE else self.lengths.fresh
        packaged = kind.profile
        model = ServingModel(
            packaged.profile,
            packaged.kv_capacity_tokens,
            packaged.kv_bytes_per_token,
            max_batch_tokens=chunk_tokens or self.engine.max_batch_tokens,
            max_num_seqs=self.engine.max_num_seqs,
            reserve=self.engine.reserve,
            host_s=self.engine.host_s,
        )
        return Sizing(traffic, model, self.slo)

    def _affine(self, role: Role, kind: ReplicaKind, chunk_tokens: int) -> Affine:
        sizing = self.sizing(role, kind, chunk_tokens)
        attained: Mapping[Role, Callable[[float, int], float]] = {
            Role.PREFILL: sizing.ttft_share,
            Role.DECODE: sizing.tpot_share,
            Role.MIXED: lambda rps, count: math.sqrt(sizing.mixed_attains(rps, count).both),
        }
        try:
            at_best = attained[role](1e-6, 1)
            wanted = min(math.sqrt(self.level), REACHED * at_best)
            if at_best < self.level**1.5:
                return Affine(0.0, 0.0)
            one = _highest_rps(lambda rps: attained[role](rps, 1), wanted, sizing)
            many = _highest_rps(lambda rps: attained[role](rps, MANY), wanted, sizing, MANY)
        except ConfigError:
            return Affine(0.0, 0.0)  # not even one request of mean context fits its KV
        each = (many - one) / (MANY - 1)
        return Affine(each, each - one)


def _highest_rps(share: Callable[[float], float], wanted: float, sizing: Sizing, count: int = 1) -> float:
    """Return the highest rate at which ``share`` is as wanted."""
    low, high = 0.0, count * 2.0 / min(sizing.work_s, max(sizing.decode_work_s, 1e-6))
    for _ in range(_ROUNDS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if share(middle) >= wanted else (low, middle)
    return low

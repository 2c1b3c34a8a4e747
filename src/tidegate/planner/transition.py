"""What it costs to go from one deployment to another, and after which time that pays back.

In GPU-seconds, for replicas may differ in size before and after: those for which GPUs do not serve. Replicas
are replaced one after the other, so that the rest goes on serving.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tidegate.core.instance import Role
from tidegate.planner.deployment import Deployment, ReplicaKind


@dataclass(frozen=True, slots=True)
class MovePrices:
    """Seconds that a change takes.

    A server takes ``start_s`` to load its model. Before it stops, and before a decoding one changes its role,
    its answers end: ``drain_s``, in which it does half of its work. ``cached`` is the share of prompts'
    tokens that come from prefix caches, all of which a server that stops loses.
    """

    start_s: float
    drain_s: float
    cached: float = 0.0


@dataclass(frozen=True, slots=True)
class Transition:
    """``kept`` replicas stay as they are, ``flips`` change their role and go on running, ``stops`` give up
    their GPUs to ``starts``. ``cost_gpu_s`` is all of it, of which ``kv_gpu_s`` recompute lost KV."""

    kept: int
    flips: int
    stops: int
    starts: int
    cost_gpu_s: float
    kv_gpu_s: float

    @property
    def title(self) -> str:
        """What happens, in words."""
        return f"{self.flips} change roles, {self.stops} stop, {self.starts} start, {self.kept} stay"


def transition(old: Deployment, new: Deployment, prices: MovePrices) -> Transition:
    """Return the cheapest way from ``old`` to ``new``: as many replicas as can be go on running.

    A running server has a kind and a budget of a step for good; its role is the gateway's to change.
    """
    have, want = _counts(old), _counts(new)
    same = have & want
    have, want = have - same, want - same
    flips = 0
    cost_s = 0.0
    for role, kind, chunk in list(have):
        for other in Role:
            many = min(have[role, kind, chunk], want[other, kind, chunk])
            if many > 0:
                have[role, kind, chunk] -= many
                want[other, kind, chunk] -= many
                flips += many
                drained = role is not Role.PREFILL and other is Role.PREFILL
                cost_s += many * kind.tp * 0.5 * prices.drain_s * drained
    stops, starts = +have, +want
    cost_s += sum(count * kind.tp * 0.5 * prices.drain_s for (_, kind, _), count in stops.items())
    cost_s += sum(count * kind.tp * prices.start_s for (_, kind, _), count in starts.items())
    kv_s = sum(
        count * kind.tp * _refill_s(kind)
        for (role, kind, _), count in stops.items()
        if role is not Role.DECODE
    )
    kv_s *= prices.cached
    return Transition(same.total(), flips, stops.total(), starts.total(), cost_s + kv_s, kv_s)


def payback_s(cost_gpu_s: float, gpus: int, deployed_rps: float, best_rps: float) -> float:
    """Return after how many seconds a move has gained what it cost; infinite where it gains nothing.

    What the better deployment serves more is counted in GPUs of the present one, which would have to be added
    for it.
    """
    gained = gpus * (best_rps / deployed_rps - 1.0) if deployed_rps > 0 else float("inf")
    return cost_gpu_s / gained if gained > 0 else float("inf")


def _counts(chosen: Deployment) -> Counter[tuple[Role, ReplicaKind, int]]:
    return Counter({(pool.role, pool.kind, pool.chunk_tokens): pool.count for pool in chosen.pools})


def _refill_s(kind: ReplicaKind) -> float:
    """Return how long a replica computes a whole KV memory of prompts: the most that its caches can lose."""
    profile, tokens = kind.profile.profile, 8192
    return kind.profile.kv_capacity_tokens / tokens * float(profile.prefill_s(tokens))

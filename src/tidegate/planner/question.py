"""What a plan is asked for, and the same question for a part of a large fleet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tidegate.core.instance import Role
from tidegate.experiments.setting import Setting
from tidegate.planner.deployment import Offer, ReplicaKind
from tidegate.workloads.trace import Workload
from tidegate.workloads.trace_statistics import cached_tokens

CHUNKS_TOKENS = {
    Role.PREFILL: (2048, 8192, 16384),
    Role.MIXED: (512, 1024, 2048, 4096, 8192),
    Role.DECODE: (2048, 8192),
}
"""Budgets of a step to choose from. A decode pool has one for the prefills that a system lends it."""
MODELLED_CHUNKS = {Role.PREFILL: (2048, 8192), Role.MIXED: (2048, 8192), Role.DECODE: (8192,)}
"""Those that the program chooses from; the search steps to the others."""
LARGEST, CELLS, SMALL_CELLS = 16, (6, 8), (3, 4)
"""Instances up to which a fleet is simulated whole, and of the part that stands for a larger one: a smaller
one where runs are long."""
SYSTEMS: Mapping[str, tuple[str, ...]] = {
    "disaggregated": ("arrow-lending",),
    "colocated": ("colocated",),
    "mixed": ("minimal-load",),
    "adaptive": ("tidegate",),
}
"""Who decides in each family of deployments."""
IN_ROUNDS: Mapping[str, tuple[str, ...]] = {
    "disaggregated": ("ampd-cost",),
    "colocated": ("colocated-sticky",),
}
"""Who else is tried where prompts go on with what caches hold."""
CACHE_SHARE = 0.05
"""Of the prompts' tokens: from so many that a cache would hold, caching and conversations are asked about."""


def cached_share(workload: Workload) -> float:
    """Return the share of the prompts' tokens that an unbounded cache would hold."""
    return float(cached_tokens(workload).sum()) / max(1.0, float(workload.input_tokens.sum()))


def systems_for(workload: Workload, system: str | None = None) -> dict[str, tuple[str, ...]]:
    """Return who is tried in each family; ``system`` alone where fleets are split, if given."""
    more = IN_ROUNDS if cached_share(workload) >= CACHE_SHARE else {}
    found = {family: names + more.get(family, ()) for family, names in SYSTEMS.items()}
    return found if system is None else found | {"disaggregated": (system,)}


@dataclass(frozen=True, slots=True)
class Question:
    """The best use of ``offers`` for the traffic of ``setting``, whose system and fleet are the plan's to
    choose.

    Best is the highest goodput at ``level``, or with ``rate_rps`` the lowest price that serves that rate.
    ``systems`` are by family those that may decide.
    """

    setting: Setting
    offers: tuple[Offer, ...]
    kinds: tuple[ReplicaKind, ...]
    level: float
    rate_rps: float | None = None
    systems: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(SYSTEMS))
    top: int = 3
    seeds: int = 3

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(self.systems)

    @property
    def most_instances(self) -> int:
        """How many instances the offers have room for, at most."""
        least = {
            offer.gpu: min(kind.tp for kind in self.kinds if kind.gpu == offer.gpu)
            for offer in self.offers
            if any(kind.gpu == offer.gpu for kind in self.kinds)
        }
        return sum(offer.count // least[offer.gpu] for offer in self.offers if offer.gpu in least)

    def part(self, instances: int, cells: tuple[int, int] = CELLS) -> tuple[Question, int]:
        """Return the question for one of several equal parts of the fleet, and how many parts there are.

        A fleet of up to ``LARGEST`` instances is one part. A larger one is cut where the fewest GPUs are left
        over; of equal cuts, the one into the largest parts is taken.
        """
        if instances <= LARGEST:
            return self, 1

        def left(parts: int) -> tuple[int, int]:
            return sum(offer.count % parts for offer in self.offers), parts

        low, high = (math.ceil(instances / cell) for cell in reversed(cells))
        fewest = min(offer.count for offer in self.offers)
        parts = min((count for count in range(low, high + 1) if count <= fewest), key=left, default=fewest)
        offers = tuple(replace(offer, count=offer.count // parts) for offer in self.offers)
        kinds = tuple(k for k in self.kinds if any(k.gpu == o.gpu and k.tp <= o.count for o in offers))
        if not kinds:
            return self, 1
        rate_rps = None if self.rate_rps is None else self.rate_rps / parts
        return replace(self, offers=offers, kinds=kinds, rate_rps=rate_rps), parts

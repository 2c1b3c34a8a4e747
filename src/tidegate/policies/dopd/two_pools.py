"""Which pools a fleet that is sized has. DOPD has two: one prefills, the other decodes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tidegate.core.decision import Action, SetTarget
from tidegate.core.errors import ConfigError
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.dopd.plan import Rates, attains, smallest_fleet
from tidegate.policies.dopd.pool_loads import Emergency, PoolLoads
from tidegate.policies.dopd.ratio import Sizing

Counts = tuple[int, ...]
"""Instances of each pool."""
Split = tuple[int, int]
"""Prefill and decode instances."""


class Shortage(NamedTuple):
    """What is short now, in ``loads`` that are to keep ``slo``. An instance starts within ``start_delay_s``;
    there may be ``most``."""

    emergency: Emergency
    loads: PoolLoads
    slo: Slo
    start_delay_s: float
    most: int

    @property
    def prefills(self) -> int:
        """How many instances for prefill it takes: what is queued is to be gone in the time that an instance
        takes to start."""
        waiting = self.loads.queue_s * self.loads.prefill / max(1.0, self.start_delay_s)
        return max(self.loads.prefill + 1, math.ceil(self.loads.demand + waiting))

    @property
    def lasts(self) -> bool:
        """Whether an instance that starts would still find work."""
        return self.emergency.lasts(self.loads, self.start_delay_s, self.slo)


class SizedPools(Protocol):
    """The pools of a fleet, and how many instances each needs. Pure."""

    @property
    def roles(self) -> tuple[Role, Role]:
        """The labels under which instances join that prefill, and that decode."""
        ...

    def check(self, fleet: tuple[int, int] | None) -> None:
        """Raise ConfigError for a least and a most number of instances between which the pools do not fit."""
        ...

    def have(self, fleet: Snapshot) -> Counts:
        """Return how many instances each pool has."""
        ...

    def first(self, have: Counts) -> Counts:
        """Return the first target of a fleet that has so many."""
        ...

    def least(self, least: int, target: Counts) -> Counts:
        """Return ``least`` instances in the proportions of a target."""
        ...

    def smallest(
        self, sizing: Sizing, rates_rps: Rates, level: float, fleet: tuple[int, int]
    ) -> tuple[Counts, str]:
        """Return the fewest within ``fleet`` of which the share ``level`` attains, with why; ``sizing`` has
        the first of the two rates."""
        ...

    def relieved(self, target: Counts, shortage: Shortage) -> tuple[Counts, bool]:
        """Return the target that relieves a shortage, or the same where none does, and whether one pool lends
        an instance to the other."""
        ...

    def asked(self, target: Counts, why: str) -> Action:
        """Return the action that asks for a target."""
        ...


@dataclass(frozen=True, slots=True)
class TwoPools:
    """A pool that prefills and one that decodes: always a split."""

    roles: tuple[Role, Role] = (Role.PREFILL, Role.DECODE)

    def check(self, fleet: tuple[int, int] | None) -> None:
        check_two_pools(fleet)

    def have(self, fleet: Snapshot) -> Counts:
        return tuple(int(fleet.labelled(role).sum()) for role in self.roles)

    def first(self, have: Counts) -> Counts:
        prefill, decode = have
        return max(1, prefill - (not decode)), max(1, decode - (not prefill))

    def least(self, least: int, target: Counts) -> Counts:
        decode = max(1, round(least * target[1] / sum(target)))
        return max(1, least - decode), min(decode, least - 1)

    def smallest(
        self, sizing: Sizing, rates_rps: Rates, level: float, fleet: tuple[int, int]
    ) -> tuple[Counts, str]:
        """See ``SizedPools.smallest``; what a least fleet has beyond them goes where it attains most."""
        plan = smallest_fleet(sizing, level, budget=fleet[1], mixed=False, decode_rate_rps=rates_rps[1])
        split = (plan.prefill, plan.decode)
        while sum(split) < fleet[0]:
            more = ((split[0] + 1, split[1]), (split[0], split[1] + 1))
            split = max(more, key=lambda each: attains(sizing, rates_rps, *each).both)
        return split, plan.reason

    def relieved(self, target: Counts, shortage: Shortage) -> tuple[Counts, bool]:
        """See ``SizedPools.relieved``; one that starts already counts."""
        emergency, loads = shortage.emergency, shortage.loads
        prefill, decode = target
        if emergency.lends(loads, shortage.slo):
            step = 1 if emergency.prefill else -1
            return (prefill + step, decode - step), True
        if emergency.prefill:
            prefill = max(prefill, shortage.prefills)
        if emergency.decode:
            decode = max(decode, loads.decode + 1)
        fits = prefill + decode <= shortage.most and shortage.lasts
        return (prefill, decode) if fits else target, False

    def asked(self, target: Counts, why: str) -> Action:
        prefill, decode = target
        return SetTarget(prefill, decode, why)


def check_two_pools(fleet: tuple[int, int] | None) -> None:
    """Raise ConfigError for a least and a most number of instances between which no two pools fit."""
    if fleet is None:
        return
    least, most = fleet
    if most < 2:
        raise ConfigError(f"a budget of {most} instances has no room for a prefill and a decode pool")
    if not 2 <= least <= most:
        raise ConfigError(f"a fleet of {least}..{most} instances: two pools take at least 2")

"""How many instances serve: DOPD's controller with one pool, whose labels another controller owns (ours)."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.core.decision import Action, SetSize
from tidegate.core.errors import ConfigError
from tidegate.core.instance import Role
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.dopd.plan import Rates, smallest_mixed
from tidegate.policies.dopd.ratio import Sizing
from tidegate.policies.dopd.two_pools import Counts, Shortage


@dataclass(frozen=True, slots=True)
class OnePool:
    """All instances, whatever their labels: as many as do with both phases everywhere.

    Labels are another's, so nothing is lent: only the sum is decided.
    """

    roles: tuple[Role, Role] = (Role.MIXED, Role.MIXED)

    def check(self, fleet: tuple[int, int] | None) -> None:
        if fleet is not None and not 1 <= fleet[0] <= fleet[1]:
            raise ConfigError(f"a fleet of {fleet[0]}..{fleet[1]} instances: at least 1, and the most last")

    def have(self, fleet: Snapshot) -> Counts:
        return (len(fleet),)

    def first(self, have: Counts) -> Counts:
        return have

    def least(self, least: int, target: Counts) -> Counts:
        return (least,)

    def smallest(
        self, sizing: Sizing, rates_rps: Rates, level: float, fleet: tuple[int, int]
    ) -> tuple[Counts, str]:
        """See ``SizedPools.smallest``."""
        least, most = fleet
        count, reason = smallest_mixed(sizing, max(rates_rps), level, most)
        return (max(least, count),), reason

    def relieved(self, target: Counts, shortage: Shortage) -> tuple[Counts, bool]:
        """See ``SizedPools.relieved``; one that starts already counts."""
        (have,), loads = target, shortage.loads
        wanted = max(have, shortage.prefills if shortage.emergency.prefill else loads.decode + 1)
        return (wanted if wanted <= shortage.most and shortage.lasts else have,), False

    def asked(self, target: Counts, why: str) -> Action:
        return SetSize(target[0], why)

"""How a fleet is labelled at start-up, and how an instance that joins later is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.core.instance import Role
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.protocols import StartingRoles


def even_roles(instances: int) -> tuple[Role, ...]:
    """Label half of the fleet for prefill, the odd one for decode (ours): P, D, D, P, D, P, ...

    The odd one decodes because moving it to prefill is immediate and moving it back is damped (Arrow
    v2, section 5.5). Every prefix of the sequence is the even labelling of that many instances. A
    single instance is labelled for prefill; placement falls back to it for decode.
    """
    _need(instances, 1)
    after_two = (Role.DECODE, Role.PREFILL)
    first_two = (Role.PREFILL, Role.DECODE)
    return tuple(first_two[i] if i < 2 else after_two[i % 2] for i in range(instances))


def mixed_roles(instances: int) -> tuple[Role, ...]:
    """Label every instance for both phases."""
    _need(instances, 1)
    return (Role.MIXED,) * instances


@dataclass(frozen=True, slots=True)
class SplitRoles:
    """A fixed split: the first ``prefill`` instances prefill, the other ``decode`` decode.

    Raises ConfigError when either count is below one.
    """

    prefill: int
    decode: int

    def __post_init__(self) -> None:
        if self.prefill < 1 or self.decode < 1:
            raise ConfigError(f"split {self.prefill}:{self.decode}: each side needs at least one instance")

    def __call__(self, instances: int) -> tuple[Role, ...]:
        """Return the labels. Raises ConfigError when the fleet is not of the split's size."""
        if instances != self.prefill + self.decode:
            raise ConfigError(
                f"split {self.prefill}:{self.decode} needs {self.prefill + self.decode} instances, "
                f"the fleet has {instances}"
            )
        return (Role.PREFILL,) * self.prefill + (Role.DECODE,) * self.decode


def joining_role(
    roles: StartingRoles,
    snapshot: Snapshot,
    fleet_size: int,
    last: Role | None = None,
    starting: Iterable[Role] = (),
) -> Role:
    """Return the label for an instance that joins the fleet in ``snapshot`` (a restart, a new replica).

    It is the one that the start-up labelling of the grown fleet has most more of than there are. ``starting``
    are the labels of instances that will join before this one, and count as members. A split that does not
    fit the grown fleet is taken for that of ``fleet_size`` instances, those that are down included; where
    that has no answer either, the label with the fewest members is taken. At a tie a label that nobody has
    wins, then ``last``, the one that the instance had.
    """
    present = Counter(starting)
    for role in Role:
        present[role] += int(np.count_nonzero(snapshot.labelled(role)))
    for size in (present.total() + 1, fleet_size):
        try:
            wanted = Counter(roles(size))
        except ConfigError:
            continue
        lacking = {role: count - present[role] for role, count in wanted.items()}
        most = max(lacking, key=lambda role: (lacking[role], not present[role], role is last))
        if lacking[most] > 0:
            return most
    return min((Role.PREFILL, Role.DECODE), key=lambda role: (present[role], role is not last))


def _need(instances: int, at_least: int) -> None:
    if instances < at_least:
        raise ConfigError(f"the fleet has {instances} instances; at least {at_least} needed")

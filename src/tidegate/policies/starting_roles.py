"""How a fleet is labelled at start-up, how an instance that joins later is, and how a target is reached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from tidegate.core.decision import AddInstance, Drain, Flip, SetSize, SetTarget, Undrain
from tidegate.core.errors import ConfigError
from tidegate.core.instance import Role
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.protocols import StartingRoles

TARGET = "target"
"""Why a flip is made that a target asks for."""


def even_roles(instances: int) -> tuple[Role, ...]:
    """Label half of the fleet for prefill, the odd one for decode (ours): P, D, D, P, D, P, ...

    The odd one decodes because moving it to prefill is immediate and moving it back is damped (Arrow
    v2, section 5.5). Every prefix of the sequence is the even labelling of that many instances. A
    single instance is labelled for prefill; placement falls back to it for decode.
    """
    _need_one(instances)
    first_two, after_them = (Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)
    return (first_two + after_them * instances)[:instances]


def mixed_roles(instances: int) -> tuple[Role, ...]:
    """Label every instance for both phases."""
    _need_one(instances)
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


@dataclass(frozen=True, slots=True)
class GivenRoles:
    """A label for each instance, in order. Raises ConfigError unless both phases have somebody."""

    labels: tuple[Role, ...]

    def __post_init__(self) -> None:
        for role in (Role.PREFILL, Role.DECODE):
            if not {role, Role.MIXED} & set(self.labels):
                raise ConfigError(f"no instance is labelled to {role.label}")

    def __call__(self, instances: int) -> tuple[Role, ...]:
        """Return the labels. Raises ConfigError when the fleet is of another size."""
        if instances != len(self.labels):
            raise ConfigError(f"{len(self.labels)} labels do not fit a fleet of {instances} instances")
        return self.labels


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


def _need_one(instances: int) -> None:
    if instances < 1:
        raise ConfigError(f"the fleet has {instances} instances; at least 1 needed")


def steps_to_target(
    snapshot: Snapshot, target: SetTarget, starting: Mapping[Role, int], released: Mapping[str, Role]
) -> tuple[Flip | AddInstance | Drain | Undrain, ...]:
    """Return the actions after which the fleet has ``target``'s split; none where it has.

    ``starting`` counts the instances that are on their way, by the label they will have; ``released`` are
    those that an earlier target drains, which are not stopped yet. Flips come first: they cost nothing. What
    a flip cannot make up for is taken back from the released ones, or added. Surplus is drained, and removed
    once it is empty; what only starts is no surplus yet. Of the instances that could change, the one goes
    first that still holds work of the role it changes to, then the one with the least work of the role it
    gives up (Arrow v2, Algorithm 3). MIXED instances stay.
    """
    wanted = {Role.PREFILL: target.n_prefill, Role.DECODE: target.n_decode}
    cheapest = {role: _cheapest_first(snapshot, role) for role in wanted}
    surplus = {role: int(np.count_nonzero(snapshot.labelled(role))) - count for role, count in wanted.items()}
    why = f"the target is {target.n_prefill} for prefill and {target.n_decode} for decode"
    why += f": {target.reason}" if target.reason else ""
    steps: list[Flip | AddInstance | Drain | Undrain] = []
    for to, source in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
        while surplus[to] + starting.get(to, 0) < 0 < surplus[source] and cheapest[source]:
            steps.append(Flip(cheapest[source].pop(0), to, TARGET, why))
            surplus[to] += 1
            surplus[source] -= 1
    for role, count in surplus.items():
        lacking = max(0, -count - starting.get(role, 0))
        back = [name for name, label in released.items() if label is role][:lacking]
        steps += [Undrain(name, target.reason) for name in back]
        steps += [AddInstance(role, target.reason)] * (lacking - len(back))
        steps += [Drain(name, True, target.reason) for name in cheapest[role][: max(0, count)]]
    return tuple(steps)


def steps_to_size(
    snapshot: Snapshot, size: SetSize, starting: int, released: Iterable[str]
) -> tuple[AddInstance | Drain | Undrain, ...]:
    """Return the actions after which ``size`` instances serve; none where they do.

    ``starting`` instances are on their way, and ``released`` are those that an earlier target drains. What is
    lacking is taken back from these, or added to do both. Surplus is drained, of the label that most have
    each time (at a tie, of those that do both), so that labels keep their proportions: the one with the least
    KV, which is to move, goes first.
    """
    lacking = max(0, size.instances - len(snapshot) - starting)
    back = list(released)[:lacking]
    steps: list[AddInstance | Drain | Undrain] = [Undrain(name, size.reason) for name in back]
    steps += [AddInstance(Role.MIXED, size.reason)] * (lacking - len(back))
    held = snapshot.decode_tokens + snapshot.handoff_tokens
    left = {role: np.nonzero(snapshot.labelled(role))[0].tolist() for role in reversed(Role)}
    for _ in range(len(snapshot) - max(1, size.instances)):
        among = max(left.values(), key=len)
        least = min(among, key=lambda column: (held[column], snapshot.prefill_queue_s[column]))
        among.remove(least)
        steps.append(Drain(snapshot.ids[least], True, size.reason))
    return tuple(steps)


def _cheapest_first(snapshot: Snapshot, role: Role) -> list[str]:
    """Return the flippable instances of a label, the one that is cheapest to take away first."""
    if role is Role.PREFILL:
        other, work = snapshot.decode_requests, snapshot.prefill_queue_s
    else:
        other, work = snapshot.prefill_requests, snapshot.decode_tokens
    among = np.nonzero(snapshot.labelled(role) & snapshot.flippable)[0]
    order = np.lexsort((work[among], other[among] == 0))
    return [snapshot.ids[column] for column in among[order]]

"""Which instances are up, under which label they join, and which of them placements may use."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple

from tidegate.core.decision import Flip
from tidegate.core.instance import Role
from tidegate.ledger.ledger import Ledger
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.protocols import StartingRoles
from tidegate.policies.starting_roles import joining_role

STARTS = 3
"""The newest starts of a label, the longest of which tells how long the next one takes (ours)."""


class AwaitedStart(NamedTuple):
    """An instance that the fleet was told to start at ``asked_s``, to join under ``role``."""

    role: Role
    asked_s: float


class Joining(NamedTuple):
    """The label of an instance that comes up, flips that keep the split, and the seconds since it was asked
    for, None where nobody asked."""

    role: Role
    flips: tuple[Flip, ...] = ()
    start_s: float | None = None


class Membership:
    """The labels of instances that are or were up, and who is cordoned or avoided.

    ``ids`` are the instances that the fleet starts with; the system's start-up labels go to them in order.
    ``draining`` are those that get nothing new, with whether they are to be removed once empty; ``stopping``
    those that the fleet was told to stop; ``awaited`` those that it was told to start, the first one first.
    How long such starts take is told to the ledger, for controllers.
    """

    def __init__(self, ids: Sequence[str], roles: StartingRoles, ledger: Ledger) -> None:
        self.labels: dict[str, Role] = dict(zip(ids, roles(len(ids)), strict=True))
        self.draining: dict[str, bool] = {}
        self.stopping: set[str] = set()
        self.awaited: list[AwaitedStart] = []
        self._roles = roles
        self._ledger = ledger
        self._fixed: dict[str, Role] = {}
        self._joined: set[str] = set()
        self._avoided_until_s: dict[str, float] = {}
        self._took_s: defaultdict[Role, deque[float]] = defaultdict(lambda: deque(maxlen=STARTS))

    @property
    def starting(self) -> Counter[Role]:
        """How many instances are to come under each label."""
        return Counter(start.role for start in self.awaited)

    def joins(self, instance_id: str, fixed_role: Role | None, now: float) -> Joining:
        """Take in an instance that comes up.

        The first time it is that of the start-up labelling. One that returns, or that was not there at the
        start, gets the label that the fleet lacks most; at a tie the one it had. One with a fixed role keeps
        that, and an instance that has it and is free takes the other's.
        """
        role, start_s = self._wanted(instance_id, now)
        self._joined.add(instance_id)
        self._avoided_until_s.pop(instance_id, None)
        self.stopping.discard(instance_id)
        if fixed_role is None or role in (fixed_role, Role.MIXED):
            self.labels[instance_id] = role
            return Joining(role, start_s=start_s)
        self._fixed[instance_id] = fixed_role
        self.labels[instance_id] = fixed_role
        for other, label in self.labels.items():
            if other != instance_id and label is fixed_role and other not in self._fixed:
                self.labels[other] = role
                why = f"{instance_id} came up and can only be {fixed_role.label}: the split stays as it was"
                return Joining(fixed_role, (Flip(other, role, "repair", why),), start_s)
        return Joining(fixed_role, start_s=start_s)

    def _wanted(self, instance_id: str, now: float) -> tuple[Role, float | None]:
        if instance_id in self.labels and instance_id not in self._joined:
            return self.labels[instance_id], None
        if instance_id not in self.labels and self.awaited:
            role, asked_s = self.awaited.pop(0)
            self._took_s[role].append(now - asked_s)
            self._ledger.start_s = {each: max(took_s) for each, took_s in self._took_s.items()}
            return role, now - asked_s
        return self.lacking(now, self.labels.get(instance_id)), None

    def lacking(self, now: float, last: Role | None = None) -> Role:
        """Return the label for one more instance: what the fleet, with those that start, lacks most (see
        ``joining_role``)."""
        snapshot = self._ledger.snapshot(now)
        return joining_role(self._roles, snapshot, len(self.labels), last, self.starting.elements())

    def start_failed(self, role: Role) -> None:
        """Say that an instance that was to start under ``role`` will not come."""
        failed = next((start for start in self.awaited if start.role is role), None)
        if failed is not None:
            self.awaited.remove(failed)

    def drain(self, instance_id: str, *, remove: bool) -> None:
        """Begin a drain, or say anew whether its instance is to be removed."""
        self.draining[instance_id] = remove
        self._ledger.drains(instance_id, True)

    def leaves(self, instance_id: str) -> None:
        """Say that an instance is down. One that was stopped on purpose is forgotten, its drain with it."""
        if instance_id in self.stopping:
            self.stopping.discard(instance_id)
            self.draining.pop(instance_id, None)
            self.labels.pop(instance_id, None)

    def stop_failed(self, instance_id: str) -> None:
        """Say that an instance cannot be stopped: it stays drained, and is not to be removed any more."""
        self.stopping.discard(instance_id)
        self.drain(instance_id, remove=False)

    def undrain(self, instance_id: str) -> bool:
        """End a drain. False where there is none, or where the instance is being stopped already."""
        if instance_id not in self.draining or instance_id in self.stopping:
            return False
        del self.draining[instance_id]
        self._ledger.drains(instance_id, False)
        return True

    def avoid(self, instance_id: str, until_s: float) -> None:
        """Place nothing on an instance until then, while others are up."""
        self._avoided_until_s[instance_id] = until_s

    def why_shut(self, instance_id: str, now: float) -> str:
        """Return why nothing new may go to an instance that is up; "" where it may."""
        if instance_id in self.stopping:
            return f"{instance_id} is being stopped"
        if instance_id in self.draining:
            return f"{instance_id} drains"
        failed = self._avoided_until_s.get(instance_id, now) > now
        return f"{instance_id} failed a leg a moment ago" if failed else ""

    def view(self, now: float) -> tuple[Snapshot, bool]:
        """Return the cluster as placements may use it, and whether flips may follow from it.

        Without those that drain, are being stopped or failed a moment ago, if others are up. Where
        an instance is missing only for a moment no pool is really short, and no label changes.
        """
        snapshot = self._ledger.snapshot(now)
        if not (self._avoided_until_s or self.draining or self.stopping):
            return snapshot, True
        avoided = {name for name, until_s in self._avoided_until_s.items() if until_s > now}
        seen = snapshot.without(avoided.union(self.draining, self.stopping))
        return seen, not avoided.intersection(snapshot.ids)

"""The one place that executes what controllers decide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from tidegate.control.effects import Drains, Effects, Flipped, StartInstance, StartMigration, StopInstance
from tidegate.control.live_request import LiveRequest, Stage
from tidegate.control.membership import AwaitedStart, Membership
from tidegate.core.decision import (
    Action,
    AddInstance,
    Drain,
    Flip,
    Migrate,
    Place,
    Remove,
    Rescale,
    SetSize,
    SetTarget,
    Undrain,
)
from tidegate.core.instance import Role
from tidegate.core.migration import FREE, MigrationCost
from tidegate.core.request import Request
from tidegate.journal.schema import ProfileLine
from tidegate.journal.writer import JournalWriter
from tidegate.ledger.ledger import Ledger
from tidegate.policies.protocols import DecodePlacement
from tidegate.policies.starting_roles import TARGET, steps_to_size, steps_to_target


class Actions:
    """Executes actions on the ledger and the membership, and says what is left to drivers.

    It journals flips that are carried out, rescaled profiles, starts, the beginning and the end of drains,
    and what became of each migration. Stops are journalled as instances go. What of an action is not legal is
    left undone without a line, but for migrations.

    ``migrations`` counts what became of migrations: begun, done, cancelled, ignored.
    ``asked`` gives a live request as placements see it.
    """

    def __init__(
        self,
        ledger: Ledger,
        membership: Membership,
        requests: Mapping[str, LiveRequest],
        decode: DecodePlacement,
        asked: Callable[[LiveRequest], Request],
        journal: JournalWriter,
    ) -> None:
        self._ledger = ledger
        self._membership = membership
        self._requests = requests
        self._decode = decode
        self._asked = asked
        self._journal = journal
        self.migrations: Counter[str] = Counter()
        self._released: set[str] = set()

    def execute(self, actions: Iterable[Action], now: float) -> Effects:
        """Carry out each action as far as it is legal; one that is not changes nothing.

        A flip is legal where an instance is up, flippable and labelled otherwise. What decodes on instances
        that are to prefill only moves once all flips in a row are done: none goes where it could not stay.
        """
        effects: Effects = []
        emptied: list[str] = []
        for action in actions:
            if not isinstance(action, Flip):
                self._move_decodes_off(emptied, now, effects)
            match action:
                case Flip():
                    self._flip(action, now, effects, emptied)
                case Migrate():
                    self._migrate(action, now, effects)
                case SetTarget() | SetSize():
                    steps = self._to_target(action, now)
                    effects += self.execute(steps, now)
                    self._released.update(step.instance for step in steps if isinstance(step, Drain))
                case AddInstance(role, reason):
                    self._membership.awaited.append(AwaitedStart(role, now))
                    if self._journal.enabled:
                        self._journal.instance(now, "", "starting", role=role.label, reason=reason)
                    effects.append(StartInstance(role, reason))
                case Drain(instance, remove, reason):
                    if instance in self._ledger.ids:
                        self._membership.drain(instance, remove=remove)
                        if self._journal.enabled:
                            self._journal.instance(now, instance, "draining", reason=reason)
                        effects.append(Drains(instance, reason, remove))
                        effects += self.drain_on(now)
                case Undrain(instance, reason):
                    if self._membership.undrain(instance):
                        if self._journal.enabled:
                            self._journal.instance(now, instance, "undrained", reason=reason)
                        effects.append(Drains(instance, reason, ended=True))
                case Remove(instance, reason):
                    if instance in self._ledger.ids:
                        self._stop(instance, reason, effects)
                case Rescale(instance, prefill, step):
                    self.rescale(instance, prefill, step, now)
        self._move_decodes_off(emptied, now, effects)
        return effects

    def rescale(self, instance: str, prefill: float, step: float, now: float) -> None:
        """Go on with a profile whose prefills and decode steps take so many times as long."""
        if instance in self._ledger.ids:
            self._ledger.profile_scaled(instance, prefill, step)
            t_s = self._journal.elapsed_s(now)
            self._journal.write(ProfileLine(t_s, instance, round(prefill, 6), round(step, 6)))

    def drain_on(self, now: float) -> Effects:
        """Go on with drains: move decodes that still run there, and stop what is empty and to be removed."""
        effects: Effects = []
        for instance, remove in list(self._membership.draining.items()):
            if instance not in self._ledger.ids:
                continue
            residents = self._ledger.residents(instance)
            if residents.prefills or residents.handoffs or residents.decodes:
                self._move_away(instance, residents.decodes, now, effects)
            elif remove and instance not in self._membership.stopping:
                self._stop(instance, "drained", effects)
        return effects

    def note_migration(
        self, migrate: Migrate, event: str, now: float, detail: str = "", cost: MigrationCost = FREE
    ) -> None:
        """Journal and count a migration that has begun, is done, cancelled or ignored."""
        self.migrations[event] += 1
        if self._journal.enabled:
            self._journal.migration(now, migrate, event, detail, cost)

    def _to_target(self, target: SetTarget | SetSize, now: float) -> Sequence[Action]:
        """Return what a target takes; what an earlier one drains is there to be taken back."""
        membership = self._membership
        self._released &= {name for name, remove in membership.draining.items() if remove}
        there = self._released.difference(membership.stopping).intersection(self._ledger.ids)
        released = {name: self._ledger.role_of(name) for name in sorted(there)}
        view, starting = membership.view(now)[0], membership.starting
        if isinstance(target, SetSize):
            return steps_to_size(view, target, starting.total(), released)
        return steps_to_target(view, target, starting, released)

    def _flip(self, flip: Flip, now: float, effects: Effects, emptied: list[str]) -> None:
        if flip.instance not in self._ledger.ids:
            return
        before, why = self._ledger.role_of(flip.instance), flip.sentence()
        if self._ledger.flip(flip.instance, flip.to, now):
            self._membership.labels[flip.instance] = flip.to
            if self._journal.enabled:
                self._journal.flip(now, flip, before, why)
            effects.append(Flipped(flip.instance, before, flip.to, flip.reason, why))
            if flip.reason == TARGET and flip.to is Role.PREFILL:
                # It is to stay so: beside prompts, what still decodes there would be late.
                emptied.append(flip.instance)

    def _move_decodes_off(self, emptied: list[str], now: float, effects: Effects) -> None:
        """Have what decodes on these instances move, and forget them."""
        for instance in emptied:
            self._move_away(instance, self._ledger.residents(instance).decodes, now, effects)
        emptied.clear()

    def _migrate(self, migrate: Migrate, now: float, effects: Effects) -> None:
        live = self._requests.get(migrate.request)
        why_not = self._why_not(live, migrate, now)
        if live is None or why_not:
            self.note_migration(migrate, "ignored", now, why_not)
            return
        live.migrate = migrate
        self._ledger.moves(live.id, migrate.dst, now)
        effects.append(StartMigration(live, migrate))

    def _why_not(self, live: LiveRequest | None, migrate: Migrate, now: float) -> str:
        """Return why a decode cannot move, as far as the plane knows; "" when it can."""
        if live is None:
            return "it has ended"
        ids = self._ledger.ids
        if migrate.src == migrate.dst or migrate.dst not in ids:
            return f"{migrate.dst} is no other instance that is up"
        if live.migrate is not None:
            return "it moves already"
        if live.stage is not Stage.DECODE or live.decode_on != migrate.src or migrate.src not in ids:
            return f"it does not decode on {migrate.src}"
        return self._membership.why_shut(migrate.dst, now)

    def _move_away(self, instance: str, decodes: Iterable[str], now: float, effects: Effects) -> None:
        """Have the decodes of a draining instance move where the system would place them."""
        view, _ = self._membership.view(now)
        for request_id in decodes:
            live = self._requests.get(request_id)
            if live is None or not live.movable or live.migrate is not None or live.stage is not Stage.DECODE:
                continue
            decision = self._decode.place_decode(self._asked(live), view, instance).decision
            to = decision.decode_on if isinstance(decision, Place) else None
            if to is not None and to != instance and not self._membership.why_shut(to, now):
                self._migrate(Migrate(request_id, instance, to, "drain"), now, effects)

    def _stop(self, instance: str, reason: str, effects: Effects) -> None:
        self._membership.stopping.add(instance)
        effects.append(StopInstance(instance, reason))

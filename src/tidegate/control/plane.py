"""The control plane: it observes, decides, acts and journals, for the gateway and the simulator alike.

It has no clock, no sockets and no randomness of its own. A driver tells it what happened, with the time, and
carries out the effects that it returns. Requests are in the ledger before the effect that runs them is out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tidegate.control.actions import Actions
from tidegate.control.effects import Effects, GiveUp, Held, Replay, RunDecode, Suspect, WakeAt
from tidegate.control.live_request import LiveRequest, Stage
from tidegate.control.membership import Membership
from tidegate.control.periods import Periods
from tidegate.control.placing import Placing
from tidegate.control.predictions import Predictions
from tidegate.control.refusals import no_decode
from tidegate.control.sessions import BoundSessions
from tidegate.control.settings import ControlSettings
from tidegate.core.decision import Action, Flip, Place
from tidegate.core.errors import (
    EngineError,
    EngineUnreachable,
    KvLost,
    NotRepeated,
    TidegateError,
    status_of,
)
from tidegate.core.instance import Instance, Role
from tidegate.core.migration import FREE, MigrationCost
from tidegate.costs.profile import Profile
from tidegate.journal.writer import JournalWriter
from tidegate.ledger.ledger import Ledger
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.protocols import AnswerLengths, Signal
from tidegate.signals.forecast import Earlier, LoadFeed
from tidegate.signals.lengths import LengthSource
from tidegate.signals.prefix import PrefixIndex
from tidegate.systems.system import System


class ControlPlane:
    """Runs one system over one fleet.

    ``ids`` are the instances that the fleet starts with. ``prefixes``, where given, tells placements what
    each instance's prefix cache holds; ``lengths``, where given, what is left of every answer; ``load``,
    where given, forecasts the load. ``requests`` are those that have not ended, by id; ``migrations`` counts
    what became of migrations: begun, done, cancelled, ignored; ``said`` has each controller's last reason.

    Times are a driver's seconds and never decrease. Every verb returns what is to be done, in this order.
    """

    def __init__(
        self,
        system: System,
        ids: Sequence[str],
        journal: JournalWriter,
        settings: ControlSettings | None = None,
        prefixes: PrefixIndex | None = None,
        lengths: LengthSource | None = None,
        load: LoadFeed | None = None,
    ) -> None:
        self.system = system
        self.settings = settings or ControlSettings()
        self.ledger = Ledger(
            system.window_s, system.windows, None if lengths is None else lengths.remaining_many
        )
        self.membership = Membership(ids, system.roles, self.ledger)
        self.prefixes = prefixes
        self.lengths = lengths
        self.requests: dict[str, LiveRequest] = {}
        self._journal = journal
        self._predictions = predictions = Predictions(lengths, load, self.requests, journal)
        self.sessions = BoundSessions(
            self.ledger, journal, predictions.asked, unnamed=Signal.HISTORY in system.needs
        )
        self._actions = Actions(
            self.ledger, self.membership, self.requests, system.decode, self.sessions.asked, journal
        )
        self._placing = Placing(
            system,
            self.settings,
            self.ledger,
            self.membership,
            prefixes,
            self.sessions,
            self._actions,
            journal,
        )
        self._held = self._placing.held
        self.migrations: Mapping[str, int] = self._actions.migrations
        self._periods = Periods(system)
        self.said: Mapping[str, str] = self._periods.reasons
        self._audited = False
        self._observers = system.observers

    # Time

    def start(self, now: float, earlier: Earlier | None = None) -> Effects:
        """Begin the periodic decisions, one period from ``now``; ``earlier`` is for ``LoadFeed.start``."""
        self._predictions.start(self.ledger, now, earlier)
        return [WakeAt(self._periods.start(now))]

    def tick(self, now: float) -> Effects:
        """Do what is due: close windows, let controllers decide, go on with drains, ask held requests again.

        Called at every ``WakeAt``; a call at which nothing is due does nothing but ask again.
        """
        effects: Effects = []
        before_s = self._periods.next_s
        if self._periods.window.due(now):
            self.ledger.window_closed(now)
            self._predictions.window_closed(self.ledger, now)
            self.sessions.window_closed(now)
            self._audit()
        if len(self.ledger.ids):
            for controller, state in self._periods.due(now):
                decision = controller.decide(self.ledger.snapshot(now), state)
                self._periods.states[controller.name] = decision.state
                if self._periods.news(controller.name, decision.reason) and self._journal.enabled:
                    flips = sum(isinstance(action, Flip) for action in decision.actions)
                    self._journal.control(now, controller.name, decision.reason, flips)
                effects += self._actions.execute(decision.actions, now)
        if self.membership.draining:
            effects += self._actions.drain_on(now)
        effects += self._placing.place_again(self._held.overdue(now), now)
        effects += self._placing.retry(now)
        if self._periods.next_s > before_s:
            effects.append(WakeAt(self._periods.next_s))
        return effects

    # Instances

    def instance_up(
        self, instance: Instance, profile: Profile, now: float, *, fixed_role: Role | None = None
    ) -> Effects:
        """Add an instance, empty, under the label that ``Membership.joins`` gives it."""
        role, flips, start_s = self.membership.joins(instance.id, fixed_role, now)
        effects = self._actions.execute(flips, now)
        self.ledger.instance_up(instance, profile, role, now)
        self.ledger.drains(instance.id, instance.id in self.membership.draining)
        if self.prefixes is not None:
            self.prefixes.instance_up(instance.id, instance.kv_capacity_tokens)
        self._journal.instance(now, instance.id, "up", role=role.label, start_s=start_s)
        return effects + self._placing.retry(now)

    def instance_down(self, instance_id: str, reason: str, now: float) -> Effects:
        """Drop an instance. The driver reports every leg that is lost with it as ``failed``."""
        if instance_id not in self.ledger.ids:
            return []
        self.membership.labels[instance_id] = self.ledger.role_of(instance_id)
        self.sessions.instance_down(instance_id, now)
        self.ledger.instance_down(instance_id, now)
        self.membership.leaves(instance_id)
        if self.prefixes is not None:
            self.prefixes.instance_down(instance_id)
        self._journal.instance(now, instance_id, "down", reason=reason)
        return self._placing.place_again(self._held.confirmed_down(instance_id), now) + self._placing.retry(
            now
        )

    def profile_scaled(self, instance_id: str, prefill: float, step: float, now: float) -> None:
        """Go on with a profile whose prefills and decode steps take so many times as long."""
        self._actions.rescale(instance_id, prefill, step, now)

    def foreign_load(self, instance_id: str, requests: int, tokens: int) -> None:
        """Say what is on an instance beside the plane's requests (``Ledger.foreign_load``)."""
        self.ledger.foreign_load(instance_id, requests, tokens)

    def start_failed(self, role: Role, reason: str, now: float) -> None:
        """Say that an instance that ``StartInstance`` asked for will not come."""
        self.membership.start_failed(role)
        self._journal.instance(now, "", "start_failed", role=role.label, reason=reason)

    def stop_failed(self, instance_id: str) -> None:
        """Say that ``StopInstance`` cannot be carried out; the instance stays drained."""
        self.membership.stop_failed(instance_id)

    def act(self, actions: Sequence[Action], now: float) -> Effects:
        """Execute what an operator or a test decided, beside the system's controllers."""
        return self._actions.execute(actions, now) + self._placing.retry(now)

    # Requests

    def arrive(self, live: LiveRequest, now: float) -> Effects:
        """Take a new request and place its prefill."""
        self.requests[live.id] = live
        self._predictions.arrived(live)
        self.sessions.arrived(live, now)
        return self._placing.place_prefill(live, "place_prefill", now)

    def joined(self, live: LiveRequest, on: str, now: float) -> None:
        """Take a request in mid-answer that decodes on an instance, which has its KV."""
        self.requests[live.id] = live
        request = live.as_request()
        self.ledger.prefill_dispatched(request, on, now)
        live.prefill_on = on
        self._placing.decodes_on(live, on, request.prompt_tokens, now)

    def prefill_done(self, live: LiveRequest, now: float) -> Effects:
        """Say that the prompt's KV is complete and the first token is out; place the decode."""
        self.ledger.prefill_ended(live.id, now)
        if self.prefixes is not None:
            self.prefixes.computed(live.id)
        request = self.sessions.asked(live)
        view, may_flip = self.membership.view(now)
        if not view.ids:
            return ControlPlane.failed(self, live, EngineUnreachable("no instance is up", refused=True), now)
        assert live.prefill_on is not None
        verdict = self.system.decode.place_decode(request, view, live.prefill_on)
        effects = self._placing.decided(request, "place_decode", verdict, view, may_flip)
        decision = verdict.decision
        on = decision.decode_on if isinstance(decision, Place) else None
        if on is None:
            effects.append(GiveUp(live, no_decode(decision, self.settings.retry_after_s)))
            return effects
        self._placing.decodes_on(live, on, request.prompt_tokens, now)
        return [*effects, RunDecode(live, on), *self._placing.retry(now)]

    def decode_began(self, live: LiveRequest, resident_tokens: int, now: float) -> Effects:
        """Say that a colocated prefill became a decode where it is."""
        assert live.prefill_on is not None
        self.ledger.prefill_ended(live.id, now)
        self.ledger.decode_dispatched(live.id, live.prefill_on, resident_tokens, now)
        if self.prefixes is not None:
            self.prefixes.computed(live.id)
        live.stage = Stage.DECODE
        return [WakeAt(now)] if self._held else []

    def transfer_ended(self, live: LiveRequest, now: float) -> None:
        """Say that the decode instance has the KV."""
        self._has_kv(live, now)

    def tokens(self, live: LiveRequest, count: int, now: float) -> None:
        """Count tokens of a decode. ``live.generated`` holds them already."""
        self.ledger.tokens(live.id, count, now)

    def length_reported(self, live: LiveRequest, at_token: int, remaining: float, now: float) -> None:
        """Say that an engine predicts ``remaining`` tokens behind the first ``at_token`` of an answer."""
        self._predictions.reported(live, at_token, remaining)

    def load_fitted(self, number: int, expected: Mapping[str, Any]) -> None:
        """Say what a slower source expects of the load (``LoadFeed.revised``)."""
        self._predictions.load_fitted(self.ledger, number, expected)

    def prefill_reported(
        self,
        live: LiveRequest,
        cached_tokens: int,
        now: float,
        *,
        read_tokens: int = 0,
        shared_tokens: int | None = None,
    ) -> None:
        """Say what an engine had of a prompt: in its cache, which the prediction is scored against, and read
        from another one. ``shared_tokens`` is for ``BoundSessions.prefilled``."""
        live.reused_tokens = cached_tokens + read_tokens
        if self.prefixes is not None:
            self.prefixes.score(live.predicted_cached_tokens, cached_tokens + read_tokens)
        self.sessions.prefilled(live, cached_tokens + read_tokens, now, shared_tokens)

    def failed(self, live: LiveRequest, error: EngineError, now: float) -> Effects:
        """Say that a leg failed. The request is placed again, waits for the fleet's word, or is given up."""
        settings = self.settings
        self.ledger.aborted(live.id, now)
        if self.prefixes is not None:
            self.prefixes.left(live.id)
        self._migration_over(live, "cancelled", now)
        live.stage = Stage.WAITING
        tried = not (isinstance(error, EngineUnreachable) and error.refused)
        if tried:
            live.failures = 1 if live.generated > live.progress else live.failures + 1
            live.deaths += isinstance(error, EngineUnreachable)
            live.progress = live.generated
        if self._journal.enabled:
            self._journal.failure(now, live.id, error, live.generated)
        poisonous = live.deaths >= settings.deadly and not live.generated
        again = live.repeatable or not isinstance(error, NotRepeated)
        if live.failures > settings.replays or now >= live.deadline_s or poisonous or not again:
            return [GiveUp(live, error)]
        live.replays += 1
        effects: Effects = [Replay(live, status_of(error).label)]
        if not error.instance or isinstance(error, KvLost) or error.instance not in self.ledger.ids:
            return effects + self._placing.place_prefill(live, "replay", now)
        self.membership.avoid(error.instance, now + settings.avoid_s)
        self._held.await_word(live, error.instance, now + settings.confirm_s)
        reason = f"the fleet looks at {error.instance}"
        return [*effects, Suspect(error.instance), Held(live, reason), WakeAt(now + settings.confirm_s)]

    def ended(self, live: LiveRequest, error: TidegateError | None, now: float) -> Effects:
        """Say that a request is over: answered in full, or failed with ``error``. Called once per request."""
        if error is None:
            self.ledger.finished(live.id, now)
            request = live.as_request()
            prompt_tokens = request.prompt_tokens - live.generated
            reused_tokens = min(live.reused_tokens, prompt_tokens)  # a replay's prompt holds answers
            for observer in self._observers:
                observer.answered(AnswerLengths(prompt_tokens, reused_tokens, live.generated), now)
            self._placing.shares.answered(request, live.generated)
        else:
            self.ledger.aborted(live.id, now)
        self._predictions.ended(live, whole=error is None, now=now)
        if self.prefixes is not None:
            if error is None and live.session is not None:
                self.prefixes.sent(live.blocks, live.decode_on or live.prefill_on or "", live.id)
            self.prefixes.left(live.id)
        if live.session is not None:
            self.sessions.ended(live, whole=error is None, now=now)
        self._migration_over(live, "cancelled", now)
        self.requests.pop(live.id, None)
        if live.stage is Stage.WAITING:
            self._held.remove(live)
        live.stage = Stage.ENDED
        if self.membership.draining:
            return self._actions.drain_on(now) + self._placing.retry(now)
        return self._placing.retry(now) if self._held else []

    # Migrations

    def migration_begun(self, live: LiveRequest, now: float) -> None:
        """Say that the migration of ``StartMigration`` is under way."""
        assert live.migrate is not None
        self._actions.note_migration(live.migrate, "begun", now)

    def migration_refused(self, live: LiveRequest, why: str, now: float, *, for_good: bool = False) -> None:
        """Say that a migration did not begin; the decode stays, ``for_good`` if it can never move."""
        live.movable = not for_good
        self._migration_over(live, "ignored", now, why)

    def migration_cancelled(self, live: LiveRequest, now: float, moved_bytes: int = 0, why: str = "") -> None:
        """Say that a migration ended before its commit; the decode runs on where it is."""
        self._migration_over(live, "cancelled", now, why, MigrationCost(moved_bytes))

    def migration_pulls(
        self, live: LiveRequest, resident_tokens: int, now: float, stopped_s: float | None
    ) -> None:
        """Say that a decode was stopped after a token at ``stopped_s``; its destination is to pull its KV."""
        assert live.migrate is not None
        self._placing.decodes_on(live, live.migrate.dst, resident_tokens, now, stopped_s)

    def migration_done(
        self,
        live: LiveRequest,
        resident_tokens: int,
        now: float,
        *,
        moved_bytes: int = 0,
        stages: int = 0,
        pause_s: float | None = None,
    ) -> None:
        """Say that a decode goes on at its destination with its KV: ``moved_bytes`` in ``stages`` copies. Its
        client waited for ``pause_s`` behind the token after which the source stopped; None: not measured."""
        assert live.migrate is not None
        if live.decode_on != live.migrate.dst:
            self._placing.decodes_on(live, live.migrate.dst, resident_tokens, now)
        self._has_kv(live, now)
        live.migrations += 1
        self.sessions.moved(live, live.migrate, now)
        self._migration_over(live, "done", now, "", MigrationCost(moved_bytes, stages, pause_s))

    # Questions

    def snapshot(self, now: float) -> Snapshot:
        """Return the cluster as it is, whoever placements may use."""
        return self.ledger.snapshot(now)

    @property
    def window_ends_s(self) -> float:
        """When the ledger's window closes next."""
        return self._periods.window.next_s

    @property
    def held_count(self) -> int:
        """How many requests wait to be placed."""
        return len(self._held)

    # Parts of events

    def _has_kv(self, live: LiveRequest, now: float) -> None:
        """Say that a decode's KV is where it decodes, and held nowhere else."""
        self.ledger.transfer_ended(live.id, now)
        if self.prefixes is not None:
            self.prefixes.computed(live.id)
            self.prefixes.left(live.id, but=live.decode_on)

    def _migration_over(
        self, live: LiveRequest, event: str, now: float, why: str = "", cost: MigrationCost = FREE
    ) -> None:
        migrate, live.migrate = live.migrate, None
        if migrate is not None:
            self.ledger.moves(live.id, "", now)
            self._actions.note_migration(migrate, event, now, why, cost)

    def _audit(self) -> None:
        """Check the ledger's sums once it is idle."""
        idle = not self.requests
        if idle and not self._audited:
            self.ledger.check_integrity()
        self._audited = idle

"""Carries out the control plane's effects on the simulated cluster, and reports what came of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tidegate.control.effects import (
    Effects,
    Flipped,
    GiveUp,
    RunDecode,
    RunPrefill,
    StartInstance,
    StartMigration,
    StopInstance,
    WakeAt,
)
from tidegate.control.live_request import LiveRequest, Stage
from tidegate.control.plane import ControlPlane, ControlSettings
from tidegate.control.record import outcome_line
from tidegate.core.errors import EngineUnreachable, InternalError, PromptTooLong, TidegateError, status_of
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.dataplane.cluster import Cluster
from tidegate.dataplane.events import EventKind, EventQueue
from tidegate.dataplane.replica import Replica
from tidegate.dataplane.sequence import LOADING, Pin, SimSequence
from tidegate.journal.writer import JournalWriter
from tidegate.measure.timeline import FlipEvent
from tidegate.policies.order import Ticket
from tidegate.signals.prefix import NO_BLOCKS, PrefixIndex, PromptBlocks
from tidegate.sim.flight import UNREACHED, RequestColumns, SimulatedRequest
from tidegate.sim.membership import CONTROL, FleetSchedule
from tidegate.sim.sampling import Sampler
from tidegate.sim.settings import SimSettings
from tidegate.systems.system import System
from tidegate.workloads.trace import TraceRecord


class Serving:
    """The virtual-time driver of one control plane, and the instances' ``Listener``.

    ``flights`` are the live requests by number in order of arrival; ``arrived`` counts all of them, and
    ``ended`` is told of the end of each. ``oversize`` has (tokens, number) of each request that no instance
    could hold; ``steps`` counts those of each instance.
    """

    def __init__(
        self,
        system: System,
        replicas: Sequence[Replica],
        settings: SimSettings,
        journal: JournalWriter,
        events: EventQueue,
        membership: FleetSchedule,
        ended: Callable[[int, float], None] | None,
    ) -> None:
        self._ids = [replica.instance.id for replica in replicas]
        self.cluster = Cluster(replicas, events, self, leap=settings.leap, order=system.order)
        self.plane = ControlPlane(
            system,
            self._ids[: membership.planned],
            journal,
            ControlSettings(replays=settings.replays, admission=settings.admission),
            PrefixIndex() if settings.prefix_hits else None,
        )
        self.sampler = Sampler(self._ids, self.cluster.kv_tokens_in_use)
        self.first_roles: list[Role | None] = [None] * len(replicas)
        self.last_roles: list[Role | None] = [None] * len(replicas)
        self.flights: dict[int, SimulatedRequest] = {}
        self.columns = RequestColumns()
        self.steps = [0] * len(replicas)
        self.arrived = 0
        self.preemptions = 0
        self.migrations = 0
        self.kv_transfer_bytes = 0
        self._replicas = replicas
        self._settings = settings
        self._journal = journal
        self._events = events
        self._membership = membership
        self._index: dict[str | None, int] = {name: index for index, name in enumerate(self._ids)}
        self._index[None] = -1
        self._contexts = [replica.instance.max_model_len for replica in replicas]
        self.context = max(self._contexts, default=0)
        self.oversize: list[tuple[int, int]] = []
        # Where nobody listens to tokens the ledger is all that the plane would tell.
        self._tell_steps = self.plane.stepped if system.observers else self.plane.ledger.stepped
        self._stale = settings.heartbeat_s > 0
        self._untold: list[list[tuple[int, float]]] = [[] for _ in replicas]
        self._ended = ended

    def start(self) -> None:
        """Have the instances that are up at the start join, and the periodic decisions begin."""
        for number, at_s in enumerate(self._membership.starts_s):
            if at_s == 0:
                self.instance_up(number, 0.0)
        self._do(self.plane.start(0.0), 0.0)

    # what happens

    def arrive(self, number: int, record: TraceRecord, now: float) -> None:
        """Take record ``number`` of the trace, which asks for exactly ``output_tokens`` tokens."""
        index = self.arrived
        self.arrived += 1
        request = Request(
            f"r{index}",
            record.input_tokens,
            record.output_tokens,
            now,
            self._settings.slo_of(record, number) if record.slo_class else self._settings.slo,
            "",
            record.session_id,
            record.turn,
        )
        blocks = PromptBlocks(record.hash_ids, record.block_tokens) if record.hash_ids else NO_BLOCKS
        flight = SimulatedRequest(index, number, request, now + self._settings.deadline_s, blocks)
        self.flights[index] = flight
        if flight.most_tokens > self.context:
            self._refuse(flight, self.context, now)
        else:
            self.cluster.report(now)
            self._do(self.plane.arrive(flight, now), now)

    def tick(self, now: float) -> None:
        """Have the plane do what is due."""
        self.cluster.report(now)
        self.sampler.tick(self.plane.snapshot(now), self.plane.held_count, idle=not self.flights)
        self._do(self.plane.tick(now), now)

    def heartbeat(self, now: float) -> None:
        """Have the control plane learn what every instance has done by now."""
        self.cluster.report(now)
        for instance in range(len(self._ids)):
            self._tell(instance)

    def instance_up(self, instance: int, now: float) -> None:
        """Have an instance join."""
        replica = self._replicas[instance]
        self.cluster.report(now)
        self._membership.came_up(instance, now)
        effects = self.plane.instance_up(replica.instance, replica.profile, now)
        self.first_roles[instance] = self.plane.ledger.role_of(replica.instance.id)
        self._do(effects, now)

    def instance_down(self, instance: int, now: float, reason: str = "died") -> None:
        """Have an instance die, or be stopped for another reason, with all that is on it.

        A decode that was to pull its KV from there computes it again where it is.
        """
        self.cluster.report(now)
        self._tell(instance)
        self._cancel_migrations_to(instance, now)
        lost, robbed = [], []
        for flight in self.flights.values():
            if flight.leg is None:
                continue
            if flight.on == instance:
                lost.append(flight)
            elif flight.pin is not None and flight.pin.on == instance and flight.leg.source is flight.pin:
                robbed.append(flight)
        errors = [self._abort_leg(flight, instance, now) for flight in lost]
        self._tell(instance)
        name = self._ids[instance]
        self.last_roles[instance] = self.plane.ledger.role_of(name)
        self._membership.went_down(instance, now, spare=reason != "died")
        effects = self.plane.instance_down(name, reason, now)
        for flight in robbed:
            self._without_source(flight, now)
        self._do(effects, now)
        for flight, error in zip(lost, errors, strict=True):
            self._do(self.plane.failed(flight, error, now), now)

    def submit(self, index: int, legs: int, now: float) -> None:
        """Have a leg reach its engine, unless its request has ended or is on another one by now."""
        flight = self.flights.get(index)
        if flight is not None and flight.legs == legs and flight.leg is not None:
            self.cluster.submit(flight.on, flight.leg, now)

    def labels(self) -> list[Role | None]:
        """Return the last label of every instance; None for one that never came up."""
        ledger = self.plane.ledger
        up = set(ledger.ids)
        return [
            ledger.role_of(name) if name in up else last
            for name, last in zip(self._ids, self.last_roles, strict=True)
        ]

    # effects

    def _do(self, effects: Effects, now: float) -> None:
        for effect in effects:
            match effect:
                case RunPrefill():
                    self._run_prefill(effect, now)
                case RunDecode():
                    self._dispatch(effect.live, self._index[effect.on], False, None, now)
                case WakeAt(at_s):
                    self._events.push(at_s, EventKind.TICK, CONTROL)
                case GiveUp(live, error):
                    self._close(live, error, now)
                case Flipped(instance, before, after, reason):
                    self.sampler.flips.append(FlipEvent(now, instance, before, after, reason))
                case StartMigration(live, migrate):
                    self._migrate(live, self._index[migrate.src], self._index[migrate.dst], now)
                case StartInstance(role):
                    if not self._membership.start_spare(now, self._events):
                        self.plane.start_failed(role)
                case StopInstance(instance, reason):
                    self.instance_down(self._index[instance], now, reason)
                case _:
                    pass  # a held request waits in the plane, and nothing else fails here than instances

    def _run_prefill(self, effect: RunPrefill, now: float) -> None:
        live = effect.live
        assert isinstance(live, SimulatedRequest)
        hand_over = live.decode_on is None and live.request.max_tokens - live.generated > 1
        # One whose answer has begun has no TTFT left to meet, and goes first.
        ticket = None if live.generated else effect.ticket
        self._dispatch(live, self._index[effect.place.prefill_on], hand_over, ticket, now)

    def _dispatch(
        self, flight: LiveRequest, on: int, hand_over: bool, ticket: Ticket | None, now: float
    ) -> None:
        """Send off a leg: of one token if another leg is to follow, else of all that are left."""
        assert isinstance(flight, SimulatedRequest)
        flight.handing_over = hand_over
        last = flight.most_tokens
        if last > self._contexts[on]:
            self._refuse(flight, self._contexts[on], now)
            return
        prompt, blocks = flight.request.prompt_tokens + flight.generated, flight.blocks
        sequence = SimSequence(
            flight.index,
            prompt,
            prompt + 1 if hand_over else last,
            hand_over,
            flight.pin,
            blocks.keys,
            blocks.block_tokens,
            ticket,
        )
        flight.leg = sequence
        flight.on = on
        flight.placed_s = now
        flight.leg_first_s = UNREACHED
        flight.legs += 1
        if self._settings.front_s > 0:
            self._events.push(now + self._settings.front_s, EventKind.LEG, flight.index, flight.legs)
        else:
            self.cluster.instances[on].submit(sequence, now)

    def _migrate(self, flight: LiveRequest, src: int, dst: int, now: float) -> None:
        assert isinstance(flight, SimulatedRequest)
        if self.cluster.begin_migration(flight.index, src, dst, now):
            self.plane.migration_begun(flight, now)
        else:
            why = "it is not in a batch there, or the destination has no room"
            self.plane.migration_refused(flight, why, now)

    def _cancel_migrations_to(self, instance: int, now: float) -> None:
        name = self._ids[instance]
        for flight in list(self.flights.values()):
            if flight.migrate is not None and flight.migrate.dst == name:
                self.cluster.cancel_migration(flight.index, now)

    # failures and endings

    def _abort_leg(self, flight: SimulatedRequest, instance: int, now: float) -> EngineUnreachable:
        """Take a leg off an instance that dies, and return the error with which it fails."""
        leg = flight.leg
        assert leg is not None
        self.cluster.abort(leg, now)
        flight.generated = max(flight.generated, leg.tokens - flight.request.prompt_tokens)
        flight.leg, flight.on, flight.pin = None, -1, None
        flight.legs += 1
        flight.handing_over = False
        stage = "decode" if flight.stage is Stage.DECODE else "prefill"
        name = self._ids[instance]
        return EngineUnreachable(f"instance {name} died", instance=name, stage=stage)

    def _without_source(self, flight: SimulatedRequest, now: float) -> None:
        """Have a decode compute what it cannot pull any more."""
        leg, pin = flight.leg, flight.pin
        assert leg is not None and pin is not None
        flight.pin = None
        if leg.state == LOADING:
            self.cluster.abort(leg, now)
            self._dispatch(flight, flight.on, False, None, now)
        else:
            self.cluster.drop(pin, now)

    def _refuse(self, flight: SimulatedRequest, context: int, now: float) -> None:
        """End a request that does not fit a context."""
        prompt, tokens = flight.request.prompt_tokens, flight.request.max_tokens
        self.oversize.append((flight.most_tokens, flight.number))
        message = f"the context is {context} tokens; the prompt has {prompt} and max_tokens is {tokens}"
        self._close(flight, PromptTooLong(message), now)

    def _close(self, flight: LiveRequest, error: TidegateError | None, now: float) -> None:
        """End a request and write down how it ended."""
        assert isinstance(flight, SimulatedRequest)
        if self._stale and flight.on >= 0:
            self._tell(flight.on)
        if error is not None and flight.pin is not None:
            self.cluster.drop(flight.pin, now)
        del self.flights[flight.index]
        effects = self.plane.ended(flight, error, now)
        self.columns.write(flight, self._index, "ok" if error is None else status_of(error).label, now)
        self.preemptions += flight.preemptions
        self.migrations += flight.migrations
        self.kv_transfer_bytes += flight.kv_transfer_bytes
        if self._journal.enabled:
            self._journal.write(outcome_line(flight.record(), flight.ending(error, now), 0.0))
        if self._ended is not None:
            self._ended(flight.number, now)
        if effects:
            self._do(effects, now)

    # what the instances tell

    def stepped(self, instance: int, count: int, now: float) -> None:
        """See ``Listener.stepped``. With a heartbeat the ledger knows of steps as of the last one only."""
        self.steps[instance] += count
        if self._stale:
            self._untold[instance].append((count, now))
        else:
            self._tell_steps(self._ids[instance], count, now)

    def _tell(self, instance: int) -> None:
        """Have the ledger know all steps of an instance so far: before who steps together there changes.

        A response tells more than its own token: what brings an instance's answer (a first token, an end, a
        preemption) brings the steps before it, too.
        """
        for count, at_s in self._untold[instance]:
            self._tell_steps(self._ids[instance], count, at_s)
        self._untold[instance].clear()

    def token(self, sequence: SimSequence, now: float) -> None:
        """See ``Listener.token``: the first one of a leg tells that its prefill, or its pull, has ended."""
        flight = self.flights[sequence.request]
        plane = self.plane
        if self._stale:
            self._tell(flight.on)
        decodes = flight.stage is Stage.DECODE
        if flight.leg_first_s != flight.leg_first_s:
            flight.leg_first_s = now
            if not decodes and not flight.handing_over:
                plane.decode_began(flight, sequence.prompt, now)
                decodes = True
            if flight.first_token_s != flight.first_token_s:
                flight.note_first_token(sequence, now)
                plane.prefill_reported(flight, sequence.cached_tokens)
        flight.generated += 1
        flight.last_token_s = now
        if decodes:
            plane.tokens(flight, 1, now)  # the first one tells of the transfer's end, too
            if not plane.ledger.joined(flight.id):
                raise InternalError(f"{flight.id} is out of step with its batch")

    def preempted(self, sequence: SimSequence) -> None:
        """See ``Listener.preempted``."""
        flight = self.flights[sequence.request]
        flight.preemptions += 1
        if self._stale:
            self._tell(flight.on)
        self.plane.ledger.left_step(flight.id)

    def paused(self, sequence: SimSequence, now: float) -> None:
        """See ``Listener.paused``."""
        flight = self.flights[sequence.request]
        self._tell(flight.on)
        self.plane.ledger.left_step(flight.id)

    def migrated(
        self, sequence: SimSequence, src: int, dst: int, moved_bytes: int, committed: bool, now: float
    ) -> None:
        """See ``Listener.migrated``."""
        flight = self.flights.get(sequence.request)
        if flight is None:
            return
        flight.kv_transfer_bytes += moved_bytes
        if committed:
            flight.on = dst
            self.plane.migration_done(flight, sequence.tokens, now, moved_bytes=moved_bytes, pulled=True)
        else:
            self.plane.migration_cancelled(flight, now, moved_bytes)

    def pull(self, sequence: SimSequence, instance: int, now: float) -> None:
        """See ``Listener.pull``."""
        moved = self.cluster.pull(sequence, instance, now)
        self.flights[sequence.request].kv_transfer_bytes += moved

    def ended(self, sequence: SimSequence, pin: Pin | None, now: float) -> None:
        """See ``Listener.ended``: hand the request over, or finish it."""
        flight = self.flights[sequence.request]
        flight.last_token_s = now
        if pin is not None:
            flight.pin = pin
            self.cluster.begin_lease(pin, now)
            self.cluster.report(now)
            self._do(self.plane.prefill_done(flight, now), now)
            return
        flight.generated = flight.request.max_tokens
        flight.note_end(sequence)
        self._close(flight, None, now)

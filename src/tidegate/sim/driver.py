"""Carries out the control plane's effects on the simulated cluster, and reports what came of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tidegate.control.effects import (
    Drains,
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
from tidegate.control.plane import ControlPlane
from tidegate.control.record import outcome_line
from tidegate.control.settings import ControlSettings
from tidegate.core.errors import InternalError, PromptTooLong, TidegateError, status_of
from tidegate.core.instance import Role
from tidegate.dataplane.cluster import Cluster
from tidegate.dataplane.events import EventKind, EventQueue
from tidegate.dataplane.replica import Replica
from tidegate.dataplane.sequence import LOADING, Pin, SimSequence
from tidegate.journal.writer import JournalWriter
from tidegate.measure.timeline import FlipEvent
from tidegate.policies.order import Ticket, decode_ticket
from tidegate.signals.forecast import LoadFeed
from tidegate.signals.lengths.choice import simulated_source
from tidegate.signals.prefix import NO_BLOCKS, PrefixIndex, PromptBlocks
from tidegate.sim.filling import Filling, Resident
from tidegate.sim.legs import SentLegs
from tidegate.sim.membership import CONTROL, FleetSchedule
from tidegate.sim.sampling import Sampler
from tidegate.sim.settings import SimSettings
from tidegate.sim.simulated_request import AwaitedRead, RequestColumns, SimulatedRequest
from tidegate.sim.step_news import StepNews
from tidegate.systems.system import System
from tidegate.workloads.residents import MidAnswers
from tidegate.workloads.trace import TraceRecord


class SimDriver:
    """The virtual-time driver of one control plane, and the instances' ``Listener``.

    ``requests`` are the live requests by number in order of arrival; ``arrived`` counts all of them, and
    ``ended`` is told of the end of each. ``slo_class`` has the class of each, where the settings have any.
    ``oversize`` has (tokens, number) of each request that no instance could hold; ``unstarted`` has (time,
    reason) of each start that no spare was there for; ``steps`` counts those of each instance. ``load``,
    where given, forecasts the load.
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
        load: LoadFeed | None = None,
        missed: Callable[[int], None] | None = None,
        residents: MidAnswers | None = None,
    ) -> None:
        self._output_tokens: dict[str, int] = {}
        name = settings.lengths
        lengths = simulated_source(name, self._output_tokens) if name else None
        self._ids = [replica.instance.id for replica in replicas]
        order, chunks = system.order.in_engines, system.chunks
        replicas = [each.with_known_budget(chunks) for each in replicas]
        real = [settings.real(each) for each in replicas]
        self.cluster = Cluster(real, events, self, leap=settings.leap, order=order, chunks=chunks)
        self.plane = ControlPlane(
            system,
            self._ids[: membership.planned],
            journal,
            ControlSettings(replays=settings.replays, admission=settings.admission, shares=settings.shares),
            PrefixIndex() if settings.prefix_hits else None,
            lengths,
            load,
        )
        self.sampler = Sampler(self._ids, self.cluster.kv_tokens_in_use)
        self.first_roles: list[Role | None] = [None] * len(replicas)
        self.last_roles: list[Role | None] = [None] * len(replicas)
        self.requests: dict[int, SimulatedRequest] = {}
        self.legs = SentLegs(self.cluster, events, settings.front_s, self.requests)
        self.columns = RequestColumns(missed)
        self.slo_class: list[str] = []
        self.steps = [0] * len(replicas)
        self.arrived = self.residents = 0
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
        self.unstarted: list[tuple[float, str]] = []
        self._news = StepNews(self.plane.ledger, self._ids, late=settings.heartbeat_s > 0)
        self._ended = ended
        self.filling = None if residents is None else Filling(residents, settings.slo.tpot_s, self.join)

    def start(self) -> None:
        """Have the instances that are up at the start join, and the periodic decisions begin."""
        for number, at_s in enumerate(self._membership.starts_s):
            if at_s == 0:
                self.instance_up(number, 0.0)
        self._do(self.plane.start(0.0), 0.0)

    # what happens

    def arrive(self, number: int, record: TraceRecord, now: float) -> None:
        """Take record ``number`` of the trace."""
        index = self.arrived
        self.arrived += 1
        if self._settings.slo_classes:
            self.slo_class.append(record.slo_class)
        request = self._settings.request(f"r{index}", record, number, now, self.context)
        blocks = PromptBlocks(record.hash_ids, record.block_tokens) if record.hash_ids else NO_BLOCKS
        deadline_s = now + self._settings.deadline_s
        live = SimulatedRequest(index, number, request, record.output_tokens, deadline_s, blocks)
        self.requests[index] = live
        self._output_tokens[request.id] = record.output_tokens
        if live.most_tokens > self.context:
            self._refuse(live, self.context, now)
        else:
            self.cluster.report(now)
            self._do(self.plane.arrive(live, now), now)

    def join(self, record: TraceRecord, tokens: int, first_token_s: float, on: str, now: float) -> bool:
        """See ``Joins``. No prefix cache has anything of its prompt. None that would be refused joins."""
        if record.input_tokens + record.output_tokens > self._contexts[self._index[on]]:
            return True
        pin = self.cluster.hold(self._index[on], record.input_tokens + tokens - 1, now)
        if pin is None:
            return False
        self.residents += 1
        name = f"resident{self.residents}"
        request = self._settings.request(name, record, -1, first_token_s, self.context)
        live = Resident(self.residents, request, record.output_tokens, tokens, {on: pin.tokens})
        self.requests[live.index] = live
        self._output_tokens[live.id] = live.output_tokens
        self.plane.joined(live, on, now)
        self._dispatch(live, pin.on, False, self._decode_ticket(live), now, pin)
        return True

    def tick(self, now: float) -> None:
        """Have the plane do what is due."""
        self.cluster.report(now)
        self.sampler.tick(self.plane.snapshot(now), self.plane.held_count, idle=not self.requests)
        self._do(self.plane.tick(now), now)

    def heartbeat(self, now: float) -> None:
        """Have the control plane learn what every instance has done by now."""
        self.cluster.report(now)
        self._news.tell_all()

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
        self._news.tell(instance)
        self._cancel_migrations_to(instance, now)
        lost, robbed = [], []
        for live in self.requests.values():
            if live.leg is None:
                continue
            source = live.leg.source
            if (live.on if live.reads is None else live.reads.on) == instance:
                lost.append(live)
            elif live.on == instance or (source is not None and source.on == instance):
                robbed.append(live)
        errors = [self.legs.abort(live, self._ids[instance], now) for live in lost]
        self._news.tell(instance)
        name = self._ids[instance]
        self.last_roles[instance] = self.plane.ledger.role_of(name)
        self._membership.went_down(instance, now, spare=reason != "died")
        effects = self.plane.instance_down(name, reason, now)
        for live in robbed:
            self._without_source(live, now)
        self._do(effects, now)
        for live, error in zip(lost, errors, strict=True):
            self._do(self.plane.failed(live, error, now), now)

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
                    live = effect.live
                    assert isinstance(live, SimulatedRequest)
                    self._dispatch(live, self._index[effect.on], False, self._decode_ticket(live), now)
                    if self.filling is not None:
                        self.filling.decodes(effect.on, live.request.prompt_tokens, now)
                case WakeAt(at_s):
                    self._events.push(at_s, EventKind.TICK, CONTROL)
                case GiveUp(live, error):
                    self._close(live, error, now)
                case Flipped(instance, before, after, reason, _):
                    self.sampler.flipped(FlipEvent(now, instance, before, after, reason))
                case StartMigration(live, migrate):
                    self._migrate(live, self._index[migrate.src], self._index[migrate.dst], now)
                case StartInstance(role, reason):
                    if self._membership.start_spare(role, now, self._events):
                        self.sampler.scaled("add", role, 1, now)
                    else:
                        self.unstarted.append((now, reason))
                        self.plane.start_failed(role, "no spare is left", now)
                case Drains(instance, _, _, ended):
                    role = self.plane.ledger.role_of(instance)
                    self.sampler.scaled("add" if ended else "drain", role, 1 if ended else -1, now)
                case StopInstance(instance, reason):
                    self.instance_down(self._index[instance], now, reason)
                case _:
                    pass  # a held request waits in the plane, and nothing else fails here than instances

    def _run_prefill(self, effect: RunPrefill, now: float) -> None:
        live = effect.live
        assert isinstance(live, SimulatedRequest)
        hand_over = live.decode_on is None and live.output_tokens - live.generated > 1
        # One whose answer has begun has no TTFT left to meet, and goes first.
        ticket = self._decode_ticket(live) if live.generated else effect.ticket
        on, history = self._index[effect.place.prefill_on], live.history
        if effect.place.read_from is None or history is None:
            self._dispatch(live, on, hand_over, ticket, now)
            return
        self.legs.pin_history(live, self._index[history.on], AwaitedRead(on, hand_over, ticket), now)

    def _decode_ticket(self, live: LiveRequest) -> Ticket:
        assert isinstance(live, SimulatedRequest)
        return decode_ticket(live.request, live.first_token_s)

    def _dispatch(
        self,
        live: LiveRequest,
        on: int,
        hand_over: bool,
        ticket: Ticket | None,
        now: float,
        source: Pin | None = None,
    ) -> None:
        """Send off a leg, to an instance whose context it fits."""
        assert isinstance(live, SimulatedRequest)
        if live.most_tokens > self._contexts[on]:
            self._refuse(live, self._contexts[on], now)
        else:
            self.legs.run(live, on, hand_over, ticket, now, source)

    def _migrate(self, live: LiveRequest, src: int, dst: int, now: float) -> None:
        assert isinstance(live, SimulatedRequest)
        if self.cluster.begin_migration(live.index, src, dst, now):
            self.plane.migration_begun(live, now)
        else:
            why = "it is not in a batch there, or the destination has no room"
            self.plane.migration_refused(live, why, now)

    def _cancel_migrations_to(self, instance: int, now: float) -> None:
        name = self._ids[instance]
        for live in list(self.requests.values()):
            if live.migrate is not None and live.migrate.dst == name:
                self.cluster.cancel_migration(live.index, now)

    # failures and endings

    def cut_off(self, now: float) -> None:
        """End the run: answers that have begun get one token more and end, all else ends as unfinished.

        A next token now is as early as there could be one, also of an answer that stalls.
        """
        self.cluster.report(now)
        self._news.tell_all()
        for live in self.requests.values():
            if live.index >= 0:
                begun = live.first_token_s == live.first_token_s
                live.generated = 1 + (self.plane.ledger.answer_tokens(live.id) or live.generated)
                live.last_token_s = now
                self.columns.write(live, self._index, "ok" if begun else "unfinished", now)
        self.requests.clear()

    def _without_source(self, live: SimulatedRequest, now: float) -> None:
        """Have a leg compute what it cannot pull any more."""
        leg, reads = live.leg, live.reads
        assert leg is not None
        pin, live.pin = leg.source, None
        if reads is not None:
            self.cluster.abort(leg, now)
            self._dispatch(live, *reads, now)
        elif leg.state == LOADING:
            self.cluster.abort(leg, now)
            self._dispatch(live, live.on, leg.hand_over, leg.ticket, now)
        elif pin is not None:
            self.cluster.drop(pin, now)

    def _refuse(self, live: SimulatedRequest, context: int, now: float) -> None:
        """End a request that does not fit a context."""
        prompt, tokens = live.request.prompt_tokens, live.output_tokens
        self.oversize.append((live.most_tokens, live.number))
        message = f"the context is {context} tokens; the prompt has {prompt} and max_tokens is {tokens}"
        self._close(live, PromptTooLong(message), now)

    def _close(self, live: LiveRequest, error: TidegateError | None, now: float) -> None:
        """End a request and write down how it ended."""
        assert isinstance(live, SimulatedRequest)
        self._news.tell(live.on)
        if error is not None and live.pin is not None:
            self.cluster.drop(live.pin, now)
        del self.requests[live.index]
        effects = self.plane.ended(live, error, now)
        del self._output_tokens[live.id]
        if live.index >= 0:
            self.columns.write(live, self._index, "ok" if error is None else status_of(error).label, now)
        self.preemptions += live.preemptions
        self.migrations += live.migrations
        self.kv_transfer_bytes += live.kv_transfer_bytes
        if self._journal.enabled:
            self._journal.write(outcome_line(live.record(), live.ending(error, now), 0.0))
        if self._ended is not None:
            self._ended(live.number, now)
        if effects:
            self._do(effects, now)

    # what the instances tell

    def stepped(self, instance: int, count: int, now: float) -> None:
        """See ``Listener.stepped``. With a heartbeat the ledger knows of steps as of the last one only."""
        self.steps[instance] += count
        self._news.stepped(instance, count, now)

    def token(self, sequence: SimSequence, now: float) -> None:
        """See ``Listener.token``: the first one of a leg tells that its prefill, or its pull, has ended."""
        live = self.requests[sequence.request]
        plane = self.plane
        if live.reads is not None:
            return
        if self._news.late:
            self._news.tell(live.on)
        decodes = live.stage is Stage.DECODE
        if live.leg_first_s != live.leg_first_s:
            live.leg_first_s = now
            if not decodes and not live.handing_over:
                self._do(plane.decode_began(live, sequence.prompt, now), now)
                decodes = True
                if self.filling is not None:
                    self.filling.decodes(self._ids[live.on], live.request.prompt_tokens, now)
            if live.first_token_s != live.first_token_s:
                live.note_first_token(sequence, self._settings.front_s, now)
                self.columns.began(live)
                plane.prefill_reported(live, sequence.cached_tokens, now, read_tokens=live.read_tokens)
        live.generated += 1
        live.last_token_s = now
        if decodes:
            plane.tokens(live, 1, now)  # the first one tells of the transfer's end, too
            if not plane.ledger.joined(live.id):
                raise InternalError(f"{live.id} is out of step with its batch")

    def preempted(self, sequence: SimSequence) -> None:
        """See ``Listener.preempted``."""
        live = self.requests[sequence.request]
        live.preemptions += 1
        if self._news.late:
            self._news.tell(live.on)
        self.plane.ledger.left_step(live.id)

    def paused(self, sequence: SimSequence, now: float) -> None:
        """See ``Listener.paused``."""
        live = self.requests[sequence.request]
        self._news.tell(live.on)
        self.plane.ledger.left_step(live.id)

    def migrated(
        self, sequence: SimSequence, src: int, dst: int, moved_bytes: int, committed: bool, now: float
    ) -> None:
        """See ``Listener.migrated``."""
        live = self.requests.get(sequence.request)
        if live is None:
            return
        live.kv_transfer_bytes += moved_bytes
        if committed:
            live.on = dst
            self.plane.migration_done(live, sequence.tokens, now, moved_bytes=moved_bytes)
        else:
            self.plane.migration_cancelled(live, now, moved_bytes)

    def pull(self, sequence: SimSequence, instance: int, now: float) -> None:
        """See ``Listener.pull``."""
        live, source = self.requests[sequence.request], sequence.source
        live.kv_transfer_bytes += self.cluster.pull(sequence, instance, now)
        if source is not None and live.pin is not source:
            live.read_tokens = source.tokens - sequence.cached_tokens

    def ended(self, sequence: SimSequence, pin: Pin | None, now: float) -> None:
        """See ``Listener.ended``: hand the request over, or finish it."""
        live = self.requests[sequence.request]
        if pin is not None and live.reads is not None:
            self.cluster.begin_lease(pin, now)
            self._dispatch(live, *live.reads, now, pin)
            return
        live.last_token_s = now
        if pin is not None:
            live.pin = pin
            self.cluster.begin_lease(pin, now)
            self.cluster.report(now)
            self._do(self.plane.prefill_done(live, now), now)
            return
        live.generated = live.output_tokens
        live.note_end(sequence)
        self._close(live, None, now)

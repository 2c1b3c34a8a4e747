"""What the gateway does for each request, with the same ledger calls in the same order."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Fleet

from tidegate.control.record import outcome_line
from tidegate.core.decision import Hold, Migrate, Path, Place, Reject
from tidegate.core.errors import (
    EngineUnreachable,
    InternalError,
    Overloaded,
    PromptTooLong,
    TidegateError,
    status_of,
)
from tidegate.core.request import Request
from tidegate.dataplane.cluster import Cluster
from tidegate.dataplane.events import EventQueue, Kind
from tidegate.dataplane.replica import Replica
from tidegate.dataplane.sequence import LOADING, Pin, Sequence
from tidegate.journal.writer import JournalWriter
from tidegate.policies.order import Ticket, WaitingQueue, prefill_ticket
from tidegate.policies.pricing import fastest_prefill_seconds
from tidegate.sim.checks import Oversize
from tidegate.sim.columns import RequestColumns
from tidegate.sim.control import RETRY_AFTER_S, Control
from tidegate.sim.flight import Flight
from tidegate.sim.membership import Membership
from tidegate.sim.migrator import Migrator
from tidegate.sim.reports import StepReports
from tidegate.sim.settings import SimSettings
from tidegate.systems.system import System
from tidegate.workloads.trace import TraceRecord

DEADLY = 3
"""Instances that may die under a request before its first token (the gateway's)."""


class Serving:
    """Owns the live requests, the control plane and the cluster. The instances' ``Listener``.

    ``arrived`` counts requests; ``ended`` is told of the end of each.
    """

    def __init__(
        self,
        system: System,
        replicas: Fleet[Replica],
        settings: SimSettings,
        journal: JournalWriter,
        events: EventQueue,
        membership: Membership,
        ended: Callable[[int, float], None] | None,
    ) -> None:
        ids = [replica.instance.id for replica in replicas]
        self.cluster = Cluster(replicas, events, self, leap=settings.leap, order=system.order)
        up = [at_s == 0 for at_s in membership.starts_s]
        self.control = Control(
            system, replicas, journal, self.cluster.report, self._migrate, up, self.cluster.kv_tokens_in_use
        )
        self.flights: dict[int, Flight] = {}
        self.columns = RequestColumns()
        self.reports = StepReports(self.control.ledger, ids, settings.heartbeat_s)
        self.arrived = 0
        self.preemptions = 0
        self.kv_transfer_bytes = 0
        self._ledger = self.control.ledger
        self._settings = settings
        self._journal = journal
        self._events = events
        self._ids = ids
        self._index = {name: index for index, name in enumerate(self._ids)}
        self._contexts = [replica.instance.max_model_len for replica in replicas]
        self._context = max(self._contexts, default=0)
        self.oversize = Oversize(self._context)
        self.migrator = Migrator(self.cluster, self._ledger, self.reports, self.flights, ids, journal)
        self._stale = settings.heartbeat_s > 0
        self._ended = ended
        self._held: WaitingQueue[Flight] = system.order.queue()

    # requests

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
        flight = Flight(index, number, request, record.hash_ids, record.block_tokens)
        self.flights[index] = flight
        if not self._refused(flight, self._context, now):
            self._place_prefill(flight, now)

    def tick(self, now: float) -> None:
        """Run the periodic decisions, and ask again for requests that were held."""
        self.control.tick(now, idle=not self.flights, held=len(self._held))
        self._retry(now)

    def heartbeat(self, now: float) -> None:
        """Have the control plane learn what every instance has done by now."""
        self.cluster.report(now)
        self.reports.heartbeat()

    def instance_up(self, instance: int, now: float) -> None:
        """Have an instance join, and ask again for requests that were held."""
        self.control.instance_up(instance, now)
        self._retry(now)

    def instance_down(self, instance: int, now: float) -> None:
        """Have an instance die, with all that is on it; its requests are replayed as the gateway does.

        A decode that was to pull its KV from there computes it again where it is.
        """
        self.cluster.report(now)
        self.reports.tell(instance)
        self.migrator.instance_down(instance, now)
        lost, robbed = [], []
        for flight in self.flights.values():
            if flight.leg is None:
                continue
            if flight.on == instance:
                lost.append(flight)
            elif flight.pin is not None and flight.pin.on == instance and flight.leg.source is flight.pin:
                robbed.append(flight)
        stages = [self._abort_leg(flight, now) for flight in lost]
        self.reports.tell(instance)
        self.control.instance_down(instance, "died", now)
        for flight in robbed:
            self._without_source(flight, now)
        for flight, stage in zip(lost, stages, strict=True):
            self._replay(flight, instance, stage, now)

    def _abort_leg(self, flight: Flight, now: float) -> str:
        """Take a leg off its instance, keeping count of its tokens; return its stage."""
        leg = flight.leg
        assert leg is not None
        self.cluster.abort(leg, now)
        self.migrator.aborted(flight)
        flight.generated = max(flight.generated, leg.tokens - flight.request.prompt_tokens)
        flight.leg, flight.on, flight.pin = None, -1, None
        flight.legs += 1
        return "decode" if flight.decoding else "prefill"

    def _without_source(self, flight: Flight, now: float) -> None:
        """Have a decode compute what it cannot pull any more."""
        leg, pin = flight.leg, flight.pin
        assert leg is not None and pin is not None
        flight.pin = None
        if leg.state == LOADING:
            self.cluster.abort(leg, now)
            self._dispatch(flight, flight.on, leg.prompt, leg.last_token - leg.prompt, None, now)
        else:
            self.cluster.drop(pin, now)

    def _replay(self, flight: Flight, instance: int, stage: str, now: float) -> None:
        """Serve what is left of a request from its prompt and the tokens it has."""
        name = self._ids[instance]
        error = EngineUnreachable(f"instance {name} died", instance=name, stage=stage)
        self._ledger.aborted(flight.request.id, now)
        if self._journal.enabled:
            self._journal.failure(now, flight.request.id, error, flight.generated)
        flight.decoding = flight.handing_over = False
        poisonous = flight.replays + 1 >= DEADLY and not flight.generated
        if flight.replays >= self._settings.replays or poisonous:
            self._close(flight, error, now)
        else:
            flight.replays += 1
            self._place_prefill(flight, now)

    def submit(self, index: int, legs: int, now: float) -> None:
        """Have a leg reach its engine, unless its request has ended or is on another one by now."""
        flight = self.flights.get(index)
        if flight is not None and flight.legs == legs and flight.leg is not None:
            self.cluster.submit(flight.on, flight.leg, now)

    def _place_prefill(self, flight: Flight, now: float) -> None:
        request = flight.resident()
        decision = self.control.place_prefill(request, "replay" if flight.replays else "place_prefill", now)
        if not isinstance(decision, Place):
            self._not_placed(flight, decision, now)
            return
        work_s = self._ledger.prefill_dispatched(request, decision.prefill_on, now)
        flight.predicted_prefill_s = work_s
        flight.prefill_on = on = self._index[decision.prefill_on]
        if self._refused(flight, self._contexts[on], now):
            return
        tokens = request.max_tokens
        colocated = decision.path is Path.COLOCATED
        if colocated:
            flight.decode_on = on
        flight.handing_over = not colocated and tokens > 1
        ticket = prefill_ticket(request, work_s)
        self._dispatch(flight, on, request.prompt_tokens, 1 if flight.handing_over else tokens, ticket, now)

    def _place_decode(self, flight: Flight, now: float) -> None:
        request = flight.resident()
        self._ledger.prefill_ended(request.id, now)
        placed = self.control.place_decode(request, self._ids[flight.prefill_on], now)
        if isinstance(placed, Reject):
            self._close(flight, Overloaded(placed.reason, retry_after_s=placed.retry_after_s), now)
            return
        flight.decode_on = on = self._index[placed]
        flight.decoding = True
        flight.handing_over = False
        if self._refused(flight, self._contexts[on], now):
            return
        if on != flight.prefill_on:
            self._ledger.transfer_started(request.id, now)
        self._dispatch(flight, on, request.prompt_tokens, request.max_tokens, None, now)

    def _dispatch(
        self, flight: Flight, on: int, prompt: int, tokens: int, ticket: Ticket | None, now: float
    ) -> None:
        sequence = Sequence(
            flight.index,
            prompt,
            prompt + tokens,
            flight.handing_over,
            flight.pin,
            flight.block_ids,
            flight.block_tokens,
            ticket,
        )
        flight.begin_leg(on, sequence, now)
        if self._settings.front_s > 0:
            self._events.push(now + self._settings.front_s, Kind.LEG, flight.index, flight.legs)
        else:
            self.cluster.submit(on, sequence, now)

    def _not_placed(self, flight: Flight, verdict: Hold | Reject, now: float) -> None:
        """Reject the request, or keep it until the next change unless its deadline has passed."""
        if isinstance(verdict, Reject):
            self._close(flight, Overloaded(verdict.reason, retry_after_s=verdict.retry_after_s), now)
        elif now >= flight.arrival_s + self._settings.deadline_s:
            late = Overloaded(f"held until its deadline: {verdict.reason}", retry_after_s=RETRY_AFTER_S)
            self._close(flight, late, now)
        else:
            request = flight.resident()
            work_s = fastest_prefill_seconds(self.control.snapshot(now), request)
            self._held.push(flight, prefill_ticket(request, work_s))

    def _retry(self, now: float) -> None:
        """Ask again for the requests that are held, in the system's order."""
        if len(self._held):
            for flight in [self._held.pop(now) for _ in range(len(self._held))]:
                self._place_prefill(flight, now)

    def _refused(self, flight: Flight, context: int, now: float) -> bool:
        """End a request that does not fit a context; tell whether it does not."""
        prompt, tokens = flight.request.prompt_tokens, flight.output_tokens
        if prompt + tokens <= context:
            return False
        self.oversize.note(flight.number, prompt + tokens)
        message = f"the context is {context} tokens; the prompt has {prompt} and max_tokens is {tokens}"
        self._close(flight, PromptTooLong(message), now)
        return True

    def _close(self, flight: Flight, error: TidegateError | None, now: float) -> None:
        """Take the request out of the ledger and write down how it ended."""
        if self._stale and flight.on >= 0:
            self.reports.tell(flight.on)
        if error is None:
            self._ledger.finished(flight.request.id, now)
        else:
            self._ledger.aborted(flight.request.id, now)
            if flight.pin is not None:
                self.cluster.drop(flight.pin, now)
        del self.flights[flight.index]
        self.columns.write(flight, "ok" if error is None else status_of(error).label, now)
        self.preemptions += flight.preemptions
        self.kv_transfer_bytes += flight.kv_transfer_bytes
        if self._journal.enabled:
            self._journal.write(outcome_line(flight.story(self._ids), flight.ending(error, now), 0.0))
        if self._ended is not None:
            self._ended(flight.number, now)

    # what the instances tell

    def stepped(self, instance: int, count: int, now: float) -> None:
        """See ``Listener.stepped``."""
        self.reports.stepped(instance, count, now)

    def token(self, sequence: Sequence, now: float) -> None:
        """See ``Listener.token``: the first one of a leg tells that its prefill, or its pull, has ended."""
        flight = self.flights[sequence.request]
        request_id = flight.request.id
        if self._stale:
            self.reports.tell(flight.on)
        if flight.leg_first_s != flight.leg_first_s:
            flight.leg_first_s = now
            if flight.decoding:
                self._ledger.transfer_ended(request_id, now)
            elif not flight.handing_over:
                self._ledger.prefill_ended(request_id, now)
                self._ledger.decode_dispatched(request_id, self._ids[flight.on], sequence.prompt, now)
                flight.decoding = True
            if flight.first_token_s != flight.first_token_s:
                flight.note_first_token(sequence, now)
        flight.generated += 1
        flight.last_token_s = now
        if flight.decoding:
            self._ledger.tokens(request_id, 1, now)
            if not self._ledger.joined(request_id):
                raise InternalError(f"{request_id} is out of step with its batch")

    def preempted(self, sequence: Sequence) -> None:
        """See ``Listener.preempted``."""
        flight = self.flights[sequence.request]
        flight.preemptions += 1
        if self._stale:
            self.reports.tell(flight.on)
        self._ledger.left_step(flight.request.id)

    def paused(self, sequence: Sequence, now: float) -> None:
        """See ``Listener.paused``."""
        self.migrator.paused(sequence)

    def migrated(
        self, sequence: Sequence, src: int, dst: int, moved_bytes: int, committed: bool, now: float
    ) -> None:
        """See ``Listener.migrated``."""
        self.migrator.migrated(sequence, src, dst, moved_bytes, committed, now)

    def _migrate(self, migrate: Migrate, now: float) -> None:
        self.migrator.begin(migrate, now)

    def pull(self, sequence: Sequence, instance: int, now: float) -> None:
        """See ``Listener.pull``."""
        moved = self.cluster.pull(sequence, instance, now)
        self.flights[sequence.request].kv_transfer_bytes += moved

    def ended(self, sequence: Sequence, pin: Pin | None, now: float) -> None:
        """See ``Listener.ended``: hand the request over, or finish it."""
        flight = self.flights[sequence.request]
        flight.last_token_s = now
        if pin is not None:
            flight.pin = pin
            self.cluster.begin_lease(pin, now)
            self._place_decode(flight, now)
            return
        flight.generated = flight.output_tokens
        flight.note_end(sequence)
        self._close(flight, None, now)
        if len(self._held):
            self._retry(now)

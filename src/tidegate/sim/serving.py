"""What the gateway does for each request, with the same ledger calls in the same order."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Fleet

from tidegate.core.decision import Hold, Path, Reject
from tidegate.core.errors import InternalError, Overloaded, PromptTooLong, TidegateError
from tidegate.core.request import Request
from tidegate.dataplane.cluster import Cluster
from tidegate.dataplane.events import EventQueue, Kind
from tidegate.dataplane.replica import Replica
from tidegate.dataplane.sequence import Pin, Sequence
from tidegate.measure.rows import Story, outcome_row
from tidegate.sim.control import RETRY_AFTER_S, Control, Dispatched
from tidegate.sim.flight import Flight
from tidegate.sim.journal import SimJournal
from tidegate.sim.results import SimResult
from tidegate.sim.settings import SimSettings
from tidegate.systems.system import System


class Serving:
    """Owns the live requests, the control plane and the cluster. The instances' ``Listener``."""

    def __init__(
        self,
        system: System,
        replicas: Fleet[Replica],
        settings: SimSettings,
        journal: SimJournal,
        events: EventQueue,
    ) -> None:
        self.cluster = Cluster(replicas, events, self, leap=settings.leap)
        self.control = Control(system, replicas, journal, self.cluster.report)
        self.flights: dict[int, Flight] = {}
        self.results: list[SimResult] = []
        self.steps = [0] * len(replicas)
        self._ledger = self.control.ledger
        self._settings = settings
        self._journal = journal
        self._events = events
        self._replicas = replicas
        self._index = {replica.instance.id: index for index, replica in enumerate(replicas)}
        self._context = max(replica.instance.max_model_len for replica in replicas)
        self._held: deque[Flight] = deque()

    # requests

    def arrive(self, index: int, request: Request, now: float) -> None:
        """Take a request, which asks for exactly ``max_tokens`` tokens."""
        flight = Flight(index, request, request.max_tokens, Story(now))
        self.flights[index] = flight
        if not self._refused(flight, self._context, now):
            self._place_prefill(flight, now)

    def tick(self, now: float) -> None:
        """Run the periodic decisions, and ask again for requests that were held."""
        self.control.tick(now, idle=not self.flights)
        self._retry(now)

    def submit(self, index: int, now: float) -> None:
        """Have a leg reach its engine."""
        flight = self.flights[index]
        assert flight.leg is not None
        self.cluster.instances[flight.on].submit(flight.leg, now)

    def _place_prefill(self, flight: Flight, now: float) -> None:
        placed = self.control.place_prefill(flight.request, now)
        if not isinstance(placed, Dispatched):
            self._not_placed(flight, placed, now)
            return
        place, story = placed.place, flight.story
        story.prefill_on = place.prefill_on
        story.predicted_prefill_s = placed.predicted_prefill_s
        on = self._index[place.prefill_on]
        if self._refused(flight, self._replicas[on].instance.max_model_len, now):
            return
        colocated = place.path is Path.COLOCATED
        if colocated:
            story.decode_on = place.prefill_on
        flight.handing_over = not colocated and flight.output_tokens > 1
        tokens = 1 if flight.handing_over else flight.output_tokens
        self._dispatch(flight, on, flight.request.prompt_tokens, tokens, now)

    def _place_decode(self, flight: Flight, now: float) -> None:
        request, prefill_on = flight.resident(), flight.story.prefill_on
        assert prefill_on is not None
        self._ledger.prefill_ended(request.id, now)
        placed = self.control.place_decode(request, prefill_on, now)
        if isinstance(placed, Reject):
            self._close(flight, Overloaded(placed.reason, retry_after_s=placed.retry_after_s), now)
            return
        flight.story.decode_on = placed
        flight.decoding = True
        flight.handing_over = False
        on = self._index[placed]
        if self._refused(flight, self._replicas[on].instance.max_model_len, now):
            return
        if placed != prefill_on:
            self._ledger.transfer_started(request.id, now)
        self._dispatch(flight, on, request.prompt_tokens, request.max_tokens, now)

    def _dispatch(self, flight: Flight, on: int, prompt: int, tokens: int, now: float) -> None:
        sequence = Sequence(flight.index, prompt, prompt + tokens, flight.handing_over, source=flight.pin)
        flight.begin_leg(on, sequence, now)
        if self._settings.front_s > 0:
            self._events.push(now + self._settings.front_s, Kind.LEG, flight.index)
        else:
            self.submit(flight.index, now)

    def _not_placed(self, flight: Flight, verdict: Hold | Reject, now: float) -> None:
        """Reject the request, or keep it until the next change unless its deadline has passed."""
        if isinstance(verdict, Reject):
            self._close(flight, Overloaded(verdict.reason, retry_after_s=verdict.retry_after_s), now)
        elif now >= flight.story.arrival_s + self._settings.deadline_s:
            late = Overloaded(f"held until its deadline: {verdict.reason}", retry_after_s=RETRY_AFTER_S)
            self._close(flight, late, now)
        else:
            self._held.append(flight)

    def _retry(self, now: float) -> None:
        for _ in range(len(self._held)):
            self._place_prefill(self._held.popleft(), now)

    def _refused(self, flight: Flight, context: int, now: float) -> bool:
        """End a request that does not fit a context; tell whether it does not."""
        prompt, tokens = flight.request.prompt_tokens, flight.output_tokens
        if prompt + tokens <= context:
            return False
        message = f"the context is {context} tokens; the prompt has {prompt} and max_tokens is {tokens}"
        self._close(flight, PromptTooLong(message), now)
        return True

    def _close(self, flight: Flight, error: TidegateError | None, now: float) -> None:
        """Take the request out of the ledger and write down how it ended."""
        if error is None:
            self._ledger.finished(flight.request.id, now)
        else:
            self._ledger.aborted(flight.request.id, now)
            if flight.pin is not None:
                self.cluster.drop(flight.pin, now)
        del self.flights[flight.index]
        ending = flight.ending(error, now)
        self.results.append(flight.result(ending))
        if self._journal.enabled:
            self._journal.write("outcome", now, outcome_row(flight.story, ending, 0.0))

    # what the instances tell

    def stepped(self, instance: int, count: int, now: float) -> None:
        """See ``Listener.stepped``."""
        self.steps[instance] += count
        self._ledger.stepped(self._replicas[instance].instance.id, count, now)

    def token(self, sequence: Sequence, now: float) -> None:
        """See ``Listener.token``: the first one of a leg tells that its prefill, or its pull, has ended."""
        flight = self.flights[sequence.request]
        request_id, story = flight.request.id, flight.story
        if flight.leg_first_s is None:
            flight.leg_first_s = now
            if flight.decoding:
                self._ledger.transfer_ended(request_id, now)
            elif not flight.handing_over:
                self._ledger.prefill_ended(request_id, now)
                on = self._replicas[flight.on].instance.id
                self._ledger.decode_dispatched(request_id, on, flight.request.prompt_tokens, now)
                flight.decoding = True
            if story.first_token_s is None:
                story.first_token_s = now
                flight.note_prefill(sequence)
        flight.generated += 1
        story.last_token_s = now
        if flight.decoding:
            self._ledger.tokens(request_id, 1, now)
            if not self._ledger.joined(request_id):
                raise InternalError(f"{request_id} is out of step with its batch")

    def preempted(self, sequence: Sequence) -> None:
        """See ``Listener.preempted``."""
        flight = self.flights[sequence.request]
        flight.preemptions += 1
        self._ledger.left_step(flight.request.id)

    def pull(self, sequence: Sequence, instance: int, now: float) -> None:
        """See ``Listener.pull``."""
        moved = self.cluster.pull(sequence, instance, now)
        self.flights[sequence.request].story.kv_transfer_bytes += moved

    def ended(self, sequence: Sequence, pin: Pin | None, now: float) -> None:
        """See ``Listener.ended``: hand the request over, or finish it."""
        flight = self.flights[sequence.request]
        flight.story.last_token_s = now
        if pin is not None:
            flight.pin = pin
            self.cluster.begin_lease(pin, now)
            self._place_decode(flight, now)
            return
        flight.generated = flight.output_tokens
        flight.note_decode(sequence)
        self._close(flight, None, now)
        self._retry(now)

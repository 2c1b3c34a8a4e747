"""All emulated instances of a process: their simulated data plane, and the legs that it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tidegate.core.clock import Clock
from tidegate.core.errors import BadRequest
from tidegate.dataplane.batcher import Batcher
from tidegate.dataplane.cluster import Cluster
from tidegate.dataplane.events import Event, EventKind, EventQueue
from tidegate.dataplane.replica import Replica
from tidegate.dataplane.sequence import Pin, SimSequence
from tidegate.engines.emulated.leg import EmulatedLeg, new_leg
from tidegate.engines.emulated.pump import Pump
from tidegate.engines.serving.types import Counters, GenerateRequest, KvSource, Output, PinnedKv
from tidegate.policies.order import Order


@dataclass(slots=True)
class HeldPin:
    """KV that a finished leg left, and the leg that claimed it."""

    pin: Pin
    claimed_by: SimSequence | None = None

    @property
    def over(self) -> bool:
        """Whether its blocks are free, or another leg's."""
        pin, leg = self.pin, self.claimed_by
        return pin.gone or (pin.taken and (leg is None or leg.source is not pin))


@dataclass(slots=True, eq=False)
class EmulatedInstance:
    """One instance: ``legs`` and ``pins`` by the engine's ids, and the legs that get a token per step.

    ``sink`` takes its outputs, on the event loop.
    """

    index: int
    engine_id: str
    replica: Replica
    batcher: Batcher
    sink: Callable[[list[Output]], None]
    counters: Counters = field(default_factory=Counters)
    legs: dict[str, EmulatedLeg] = field(default_factory=dict)
    in_step: dict[EmulatedLeg, None] = field(default_factory=dict)
    pins: dict[str, HeldPin] = field(default_factory=dict)

    def forget_old_pins(self) -> None:
        """Drop what is over, from the oldest on: leases are equally long."""
        while self.pins and (oldest := next(iter(self.pins))) and self.pins[oldest].over:
            del self.pins[oldest]


class Host:
    """Runs legs on the wall clock, for the instances of ``replicas``. The data plane's ``Listener``.

    ``front_s`` passes between a leg's submission and its place in the instance's queue, beside what HTTP
    takes in reality. All calls come on one event loop.
    """

    def __init__(
        self,
        replicas: list[Replica],
        engine_ids: list[str],
        *,
        order: Order | None = None,
        front_s: float = 0.0,
        clock: Clock | None = None,
    ) -> None:
        self._events = EventQueue()
        self._cluster = Cluster((), self._events, self, leap=False, order=order)
        self.places: list[EmulatedInstance] = []
        self._by_engine: dict[str, EmulatedInstance] = {}
        self._legs: dict[int, tuple[EmulatedInstance, EmulatedLeg]] = {}
        self._numbered = 0
        self._touched: dict[EmulatedLeg, EmulatedInstance] = {}
        self._front_s = front_s
        self.pump = Pump(self._events, self._handle, self._flush, clock)
        for replica, engine_id in zip(replicas, engine_ids, strict=True):
            self.add(replica, engine_id)

    def add(self, replica: Replica, engine_id: str) -> EmulatedInstance:
        """Add an instance, empty."""
        instance = self._cluster.add(replica)
        place = EmulatedInstance(instance.index, engine_id, replica, instance.batcher, _nobody)
        self.places.append(place)
        self._by_engine[engine_id] = place
        return place

    def remove(self, place: EmulatedInstance) -> None:
        """Abort all legs of an instance, and free the KV that others have not begun to pull.

        Its place in ``places`` stays, for simulated instances are numbered.
        """
        for request_id in list(place.legs):
            self.abort(place, request_id)
        for request_id in list(place.pins):
            self.release(place, request_id)
        del self._by_engine[place.engine_id]

    # what reaches an instance

    def submit(self, place: EmulatedInstance, request: GenerateRequest) -> None:
        """Start a leg. Raises BadRequest for an id in use."""
        if request.id in place.legs:
            raise BadRequest(f"request id {request.id!r} is in use", param="request_id")
        now = self.pump.catch_up()
        held = None if request.source is None else self._claim(place, request, request.source, now)
        self._numbered += 1
        pin = None if held is None else held.pin
        leg = new_leg(self._numbered, request, pin, place.replica.instance.block_tokens, now)
        if held is not None:
            held.claimed_by = leg.sequence
        place.legs[request.id] = leg
        self._legs[self._numbered] = place, leg
        if self._front_s > 0:
            self._events.push(now + self._front_s, EventKind.LEG, self._numbered)
        else:
            self._cluster.submit(place.index, leg.sequence, now)
        self.pump.arm()

    def abort(self, place: EmulatedInstance, request_id: str) -> None:
        """End a leg early; its last output has ``finish_reason`` abort. An unknown id is ignored."""
        now = self.pump.catch_up()
        leg = place.legs.pop(request_id, None)
        if leg is not None:
            del self._legs[leg.sequence.request]
            place.in_step.pop(leg, None)
            self._cluster.abort(leg.sequence, now)
            leg.abort(now)
            self._touched[leg] = place
            self._flush()
        self.pump.arm()

    def release(self, place: EmulatedInstance, request_id: str) -> bool:
        """Free KV that a leg left; False when there is none that is free to go."""
        now = self.pump.catch_up()
        held = place.pins.get(request_id)
        if held is None or held.claimed_by is not None or held.over:
            return False
        del place.pins[request_id]
        self._cluster.drop(held.pin, now)
        self.pump.arm()
        return True

    def release_source(self, source: KvSource) -> None:
        """Free the KV behind a handle that nobody is going to pull."""
        place = self._by_engine.get(source.engine_id)
        if place is not None:
            self.release(place, source.request_id)

    def _claim(
        self, place: EmulatedInstance, request: GenerateRequest, source: KvSource, now: float
    ) -> HeldPin | None:
        """Return the KV behind a handle if it fits the leg; otherwise free it, and the leg recomputes."""
        owner = self._by_engine.get(source.engine_id)
        held = None if owner is None else owner.pins.get(source.request_id)
        if held is None or held.claimed_by is not None or held.over:
            place.counters.pull_failures += 1
            return None
        if held.pin.tokens != len(request.prompt_token_ids) - 1:
            # Only whole prompts are handed over; the data plane has no leg that pulls a part and computes
            # the rest.
            place.counters.pull_failures += 1
            self._cluster.drop(held.pin, now)
            return None
        return held

    # events

    def _handle(self, event: Event) -> None:
        now, kind, whose, _ = event
        if kind == EventKind.LEG:
            if whose in self._legs:
                place, leg = self._legs[whose]
                self._cluster.submit(place.index, leg.sequence, now)
        else:
            self._cluster.handle(event)

    def _flush(self) -> None:
        """Hand on what the legs said, all of a leg's tokens in one output."""
        touched, self._touched = self._touched, {}
        outputs: dict[int, list[Output]] = {}
        for leg, place in touched.items():
            outputs.setdefault(place.index, []).append(leg.take())
        for index, said in outputs.items():
            self.places[index].sink(said)

    # what the data plane tells

    def stepped(self, instance: int, count: int, now: float) -> None:
        """See ``Listener.stepped``."""
        place = self.places[instance]
        place.counters.steps += count
        place.counters.generation_tokens += count * len(place.in_step)
        for leg in place.in_step:
            leg.advance(count, now)
            self._touched[leg] = place

    def token(self, sequence: SimSequence, now: float) -> None:
        """See ``Listener.token``."""
        place, leg = self._legs[sequence.request]
        counters = place.counters
        if leg.first_token_s is None:
            _count_prompt(counters, leg)
        counters.generation_tokens += 1
        leg.advance(1, now)
        place.in_step[leg] = None
        self._touched[leg] = place

    def preempted(self, sequence: SimSequence) -> None:
        """See ``Listener.preempted``."""
        place, leg = self._legs[sequence.request]
        place.counters.preemptions += 1
        place.in_step.pop(leg, None)

    def pull(self, sequence: SimSequence, instance: int, now: float) -> None:
        """See ``Listener.pull``."""
        place, leg = self._legs[sequence.request]
        source = sequence.source
        assert source is not None
        moved = self._cluster.pull(sequence, instance, now)
        token_bytes = self.places[source.on].replica.instance.kv_bytes_per_token
        leg.loaded_tokens = moved // token_bytes if token_bytes else source.tokens
        place.counters.pulled_bytes += moved

    def paused(self, sequence: SimSequence, now: float) -> None:
        """See ``Listener.paused``."""
        place, leg = self._legs[sequence.request]
        place.in_step.pop(leg, None)

    def migrated(
        self, sequence: SimSequence, src: int, dst: int, moved_bytes: int, committed: bool, now: float
    ) -> None:
        """See ``Listener.migrated``; nobody asks an emulated instance for one."""

    def ended(self, sequence: SimSequence, pin: Pin | None, now: float) -> None:
        """See ``Listener.ended``."""
        place, leg = self._legs.pop(sequence.request)
        request = leg.request
        del place.legs[request.id]
        place.in_step.pop(leg, None)
        pinned = None
        if pin is not None:
            self._cluster.begin_lease(pin, now)
            place.forget_old_pins()
            older = place.pins.pop(request.id, None)
            if older is not None and older.claimed_by is None:
                self._cluster.drop(older.pin, now)
            place.pins[request.id] = HeldPin(pin)
            ends_s = now + place.replica.engine.lease_s
            pinned = PinnedKv(request.id, tuple(range(pin.blocks)), pin.tokens, ends_s)
        leg.finish(now, pinned)
        self._touched[leg] = place


def _count_prompt(counters: Counters, leg: EmulatedLeg) -> None:
    prompt, cached = leg.sequence.prompt, leg.sequence.cached_tokens
    counters.prompt_tokens += prompt
    counters.prefix_queries += prompt
    counters.prefix_hits += cached
    counters.cached_prompt_tokens += cached
    counters.pulled_prompt_tokens += leg.loaded_tokens
    counters.computed_prompt_tokens += prompt - cached - leg.loaded_tokens


def _nobody(outputs: list[Output]) -> None:
    """Take outputs before a server does."""

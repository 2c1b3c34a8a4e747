"""All emulated instances of a process: their simulated data plane, and the legs that it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from tidegate.core.clock import Clock
from tidegate.core.errors import BadRequest, NoInstance
from tidegate.dataplane.batcher import Batcher
from tidegate.dataplane.cluster import Cluster
from tidegate.dataplane.events import Event, EventKind, EventQueue
from tidegate.dataplane.replica import Replica
from tidegate.dataplane.sequence import LOADING, NEW, WAITING, Pin, SimSequence
from tidegate.engines.emulated.event_timer import EventTimer
from tidegate.engines.emulated.leg import EmulatedLeg, new_leg
from tidegate.engines.serving.types import Counters, EngineStats, GenerateRequest, KvSource, Output, PinnedKv
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

    @property
    def available(self) -> bool:
        """Whether a leg may still claim it."""
        return self.claimed_by is None and not self.over


@dataclass(slots=True, eq=False)
class EmulatedInstance:
    """One instance, a ``ServedEngine`` for the event loop: ``legs`` and ``pins`` by the engine's ids.

    ``in_step`` are the legs that get a token per step; ``sink`` takes the outputs, on the event loop.
    """

    host: Host
    index: int
    engine_id: str
    replica: Replica
    batcher: Batcher
    sink: Callable[[list[Output]], None] = lambda outputs: None
    counters: Counters = field(default_factory=Counters)
    legs: dict[str, EmulatedLeg] = field(default_factory=dict)
    in_step: dict[EmulatedLeg, None] = field(default_factory=dict)
    pins: dict[str, HeldPin] = field(default_factory=dict)
    stopping: bool = False

    def submit(self, request: GenerateRequest) -> None:
        """Start a leg. Raises BadRequest for an id in use, NoInstance when the instance stops."""
        if self.stopping:
            raise NoInstance("the engine is stopping")
        if request.id in self.legs:
            raise BadRequest(f"request id {request.id!r} is in use", param="request_id")
        self.host.submit(self, request)

    def abort(self, request_id: str) -> None:
        """End a leg early; its last output has ``finish_reason`` abort. An unknown id is ignored."""
        self.host.abort(self, request_id)

    def release(self, request_id: str) -> bool:
        """Free KV that a leg left; False when there is none that is free to go."""
        return self.host.release(self, request_id)

    def stop(self) -> None:
        """Take nothing more and abort what runs."""
        self.stopping = True
        for request_id in list(self.legs):
            self.abort(request_id)

    def stats(self) -> EngineStats:
        """Return the statistics of now."""
        self.host.timer.catch_up()
        self.host.timer.arm()
        self.forget_old_pins()
        states = [leg.sequence.state for leg in self.legs.values()]
        waiting = states.count(NEW) + states.count(WAITING)
        loading = states.count(LOADING)
        blocks = self.batcher.blocks
        return EngineStats(
            running=len(states) - waiting - loading,
            waiting=waiting,
            loading=loading,
            pinned=sum(not held.over for held in self.pins.values()),
            free_blocks=blocks.free,
            total_blocks=blocks.total,
            block_tokens=blocks.block_tokens,
            kv_usage=1 - blocks.free / blocks.total,
            **asdict(self.counters),
        )

    def forget_old_pins(self) -> None:
        """Drop what is over, from the oldest on: leases are equally long."""
        while self.pins and (oldest := next(iter(self.pins))) and self.pins[oldest].over:
            del self.pins[oldest]

    def count_prompt(self, leg: EmulatedLeg) -> None:
        """Count the prompt of a leg that gets its first token."""
        counters, prompt, cached = self.counters, leg.sequence.prompt, leg.sequence.cached_tokens
        counters.prompt_tokens += prompt
        counters.prefix_queries += prompt
        counters.prefix_hits += cached
        counters.cached_prompt_tokens += cached
        counters.pulled_prompt_tokens += leg.loaded_tokens
        counters.computed_prompt_tokens += prompt - cached - leg.loaded_tokens


class Host:
    """Runs legs on the wall clock, for the instances of ``replicas``. The data plane's ``Listener``.

    ``front_s`` passes between a leg's submission and its arrival in the instance's queue, beside what HTTP
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
        self.instances: list[EmulatedInstance] = []
        self._by_engine: dict[str, EmulatedInstance] = {}
        self._legs: dict[int, tuple[EmulatedInstance, EmulatedLeg]] = {}
        self._numbered = 0
        self._touched: dict[EmulatedLeg, EmulatedInstance] = {}
        self._front_s = front_s
        self.timer = EventTimer(self._events, self._handle, self._flush, clock)
        for replica, engine_id in zip(replicas, engine_ids, strict=True):
            self.add(replica, engine_id)

    def add(self, replica: Replica, engine_id: str) -> EmulatedInstance:
        """Add an instance, empty."""
        simulated = self._cluster.add(replica)
        instance = EmulatedInstance(self, simulated.index, engine_id, replica, simulated.batcher)
        self.instances.append(instance)
        self._by_engine[engine_id] = instance
        return instance

    def remove(self, instance: EmulatedInstance) -> None:
        """Abort all legs of an instance, and free the KV that others have not begun to pull.

        It stays in ``instances``, for simulated instances are numbered.
        """
        instance.stop()
        for request_id in list(instance.pins):
            self.release(instance, request_id)
        del self._by_engine[instance.engine_id]

    def submit(self, instance: EmulatedInstance, request: GenerateRequest) -> None:
        """See ``EmulatedInstance.submit``."""
        now = self.timer.catch_up()
        held = None if request.source is None else self._claim(instance, request, request.source, now)
        self._numbered += 1
        pin = None if held is None else held.pin
        leg = new_leg(self._numbered, request, pin, instance.replica.instance.block_tokens, now)
        if held is not None:
            held.claimed_by = leg.sequence
        instance.legs[request.id] = leg
        self._legs[self._numbered] = instance, leg
        if self._front_s > 0:
            self._events.push(now + self._front_s, EventKind.LEG, self._numbered)
        else:
            self._cluster.submit(instance.index, leg.sequence, now)
        self.timer.arm()

    def abort(self, instance: EmulatedInstance, request_id: str) -> None:
        """See ``EmulatedInstance.abort``."""
        now = self.timer.catch_up()
        leg = instance.legs.pop(request_id, None)
        if leg is not None:
            del self._legs[leg.sequence.request]
            instance.in_step.pop(leg, None)
            self._cluster.abort(leg.sequence, now)
            leg.finish(now, reason="abort")
            self._touched[leg] = instance
            self._flush()
        self.timer.arm()

    def release(self, instance: EmulatedInstance, request_id: str) -> bool:
        """See ``EmulatedInstance.release``."""
        now = self.timer.catch_up()
        held = instance.pins.get(request_id)
        if held is None or not held.available:
            return False
        del instance.pins[request_id]
        self._cluster.drop(held.pin, now)
        self.timer.arm()
        return True

    def release_source(self, source: KvSource) -> None:
        """Free the KV behind a handle that nobody is going to pull."""
        owner = self._by_engine.get(source.engine_id)
        if owner is not None:
            self.release(owner, source.request_id)

    def _claim(
        self, instance: EmulatedInstance, request: GenerateRequest, source: KvSource, now: float
    ) -> HeldPin | None:
        """Return the KV behind a handle if it fits the leg; otherwise free it, and the leg recomputes."""
        owner = self._by_engine.get(source.engine_id)
        held = None if owner is None else owner.pins.get(source.request_id)
        if held is None or not held.available:
            instance.counters.pull_failures += 1
            return None
        if held.pin.tokens != len(request.prompt_token_ids) - 1:
            # Only whole prompts are handed over; the data plane has no leg that pulls a part and computes
            # the rest.
            instance.counters.pull_failures += 1
            self._cluster.drop(held.pin, now)
            return None
        return held

    def _handle(self, event: Event) -> None:
        now, kind, number, _ = event
        if kind != EventKind.LEG:
            self._cluster.handle(event)
        elif number in self._legs:
            instance, leg = self._legs[number]
            self._cluster.submit(instance.index, leg.sequence, now)

    def _flush(self) -> None:
        """Hand on the legs' new tokens, all of a leg's tokens in one output."""
        touched, self._touched = self._touched, {}
        outputs: dict[int, list[Output]] = {}
        for leg, instance in touched.items():
            outputs.setdefault(instance.index, []).append(leg.take())
        for index, of_instance in outputs.items():
            self.instances[index].sink(of_instance)

    # The data plane's Listener

    def stepped(self, instance: int, count: int, now: float) -> None:
        stepping = self.instances[instance]
        stepping.counters.steps += count
        stepping.counters.generation_tokens += count * len(stepping.in_step)
        for leg in stepping.in_step:
            leg.advance(count, now)
            self._touched[leg] = stepping

    def token(self, sequence: SimSequence, now: float) -> None:
        instance, leg = self._legs[sequence.request]
        if leg.first_token_s is None:
            instance.count_prompt(leg)
        instance.counters.generation_tokens += 1
        leg.advance(1, now)
        instance.in_step[leg] = None
        self._touched[leg] = instance

    def preempted(self, sequence: SimSequence) -> None:
        instance, leg = self._legs[sequence.request]
        instance.counters.preemptions += 1
        instance.in_step.pop(leg, None)

    def pull(self, sequence: SimSequence, instance: int, now: float) -> None:
        puller, leg = self._legs[sequence.request]
        source = sequence.source
        assert source is not None
        moved = self._cluster.pull(sequence, instance, now)
        token_bytes = self.instances[source.on].replica.instance.kv_bytes_per_token
        leg.loaded_tokens = moved // token_bytes if token_bytes else source.tokens
        puller.counters.pulled_bytes += moved

    def paused(self, sequence: SimSequence, now: float) -> None:
        instance, leg = self._legs[sequence.request]
        instance.in_step.pop(leg, None)

    def migrated(
        self, sequence: SimSequence, src: int, dst: int, moved_bytes: int, committed: bool, now: float
    ) -> None:
        """Nobody asks an emulated instance for a migration."""

    def ended(self, sequence: SimSequence, pin: Pin | None, now: float) -> None:
        instance, leg = self._legs.pop(sequence.request)
        request = leg.request
        del instance.legs[request.id]
        instance.in_step.pop(leg, None)
        pinned = None
        if pin is not None:
            self._cluster.begin_lease(pin, now)
            instance.forget_old_pins()
            older = instance.pins.pop(request.id, None)
            if older is not None and older.claimed_by is None:
                self._cluster.drop(older.pin, now)
            instance.pins[request.id] = HeldPin(pin)
            ends_s = now + instance.replica.engine.lease_s
            pinned = PinnedKv(request.id, tuple(range(pin.blocks)), pin.tokens, ends_s)
        leg.finish(now, pinned)
        self._touched[leg] = instance

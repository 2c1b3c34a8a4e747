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
from tidegate.engines.emulated.vocabulary import answer, block_ids, pieces
from tidegate.engines.serving.assembling import ByteDecoder, TextAssembler, token_output
from tidegate.engines.serving.types import (
    Counters,
    EngineStats,
    GenerateRequest,
    KvSource,
    Output,
    PinnedKv,
    RequestTimes,
    TokenLogprob,
)
from tidegate.policies.chunks import ChunkBudget
from tidegate.policies.order import Order

_NO_EOS: frozenset[int] = frozenset()
"""Nothing ends an answer but its limit and the client's stops."""


@dataclass(slots=True, eq=False)
class EmulatedLeg:
    """State of a leg. ``sequence`` is what the instance sees of it; times are those of its events.
    ``pending`` collects what was not delivered yet, ``tokens`` are all that the leg generates, and
    ``loaded_tokens`` come with a pull."""

    request: GenerateRequest
    sequence: SimSequence
    tokens: list[int]
    text: TextAssembler
    submitted_s: float
    pending: Output
    new_tokens: int = 0
    first_token_s: float | None = None
    loaded_tokens: int = 0

    def advance(self, count: int, now: float) -> None:
        """Generate the next ``count`` tokens."""
        if self.first_token_s is None:
            self.first_token_s = now
        pending = self.pending
        for _ in range(count):
            token = self.tokens[self.new_tokens]
            self.new_tokens += 1
            output = token_output(self.request, token, self.new_tokens, self.text, _NO_EOS)
            pending.token_ids.append(token)
            pending.text += output.text
            pending.finish_reason, pending.stop_reason = output.finish_reason, output.stop_reason
            if self.request.sampling.logprobs is not None:
                entry = TokenLogprob(token, self.text.said, pieces()[token], 0.0)
                pending.logprobs = [*(pending.logprobs or []), entry]

    def finish(self, now: float, pinned: PinnedKv | None = None, reason: str | None = None) -> None:
        """Complete the last output; ``reason`` is why the leg ends before its last token."""
        self.pending.pinned = pinned
        self.pending.finish_reason = reason or self.pending.finish_reason
        self.pending.times = self._times(now)

    def take(self) -> Output:
        """Return the output since the last call."""
        output, self.pending = self.pending, Output(self.request.id, [], "")
        return output

    def _times(self, now: float) -> RequestTimes:
        sequence = self.sequence
        admitted_s = now if sequence.admitted_s is None else sequence.admitted_s
        first_s = now if self.first_token_s is None else self.first_token_s
        load_s = 0.0 if sequence.loaded_s is None else sequence.loaded_s - admitted_s
        return RequestTimes(
            queue_s=admitted_s - self.submitted_s,
            kv_load_s=load_s,
            prefill_s=first_s - admitted_s - load_s,
            decode_s=now - first_s,
            kv_loaded_tokens=self.loaded_tokens if sequence.loaded_s is not None else 0,
            cached_tokens=sequence.cached_tokens,
            preemptions=sequence.preemptions,
        )


def new_leg(
    number: int, request: GenerateRequest, source: Pin | None, block_tokens: int, now: float
) -> EmulatedLeg:
    """Return the leg of ``request``, numbered ``number`` for its instance, submitted at ``now``. The answer
    is known beforehand, and so is where a stop ends it."""
    prompt, params = list(request.prompt_token_ids), request.sampling
    asked = len(prompt) - request.generated
    tokens = answer(prompt[:asked], request.generated, params.max_tokens)
    tokens = tokens[: _length(request, tokens)]
    sequence = SimSequence(
        number,
        len(prompt),
        len(prompt) + len(tokens),
        hand_over=request.pin_kv,
        source=source,
        block_ids=block_ids([*prompt, *tokens], block_tokens, request.salt),
        hash_block_tokens=block_tokens,
        ticket=None if request.ticket is None else request.ticket.on_clock(now),
        generated=request.generated,
    )
    return EmulatedLeg(request, sequence, tokens, _assembler(request), now, Output(request.id, [], ""))


def _assembler(request: GenerateRequest) -> TextAssembler:
    params, asked = request.sampling, len(request.prompt_token_ids) - request.generated
    replayed = request.prompt_token_ids[asked:]
    return TextAssembler(ByteDecoder(pieces()), params.stop, replayed, params.min_tokens)


def _length(request: GenerateRequest, tokens: list[int]) -> int:
    """Return how many of ``tokens`` come before one of the client's stops, or all."""
    params = request.sampling
    if params.stop or params.stop_token_ids:
        text = _assembler(request)
        for count, token in enumerate(tokens, start=1):
            if token_output(request, token, count, text, _NO_EOS).finish_reason is not None:
                return count
    return len(tokens)


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
    ``in_step`` are the legs that get a token per step; ``sink`` takes the outputs, on the event loop."""

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
        """Start a leg. Raises BadRequest for an id in use and for a leg that follows a decode, NoInstance
        when the instance stops."""
        if self.stopping:
            raise NoInstance("the engine is stopping")
        if request.follows is not None:
            raise BadRequest("emulated decodes do not move in stages", param="kv_transfer_params")
        if request.id in self.legs:
            raise BadRequest(f"request id {request.id!r} is in use", param="request_id")
        self.host.submit(self, request)

    def abort(self, request_id: str) -> None:
        """End a leg early; its last output has ``finish_reason`` abort. An unknown id is ignored."""
        now = self.host.timer.catch_up()
        leg = self.legs.pop(request_id, None)
        if leg is not None:
            self.in_step.pop(leg, None)
            self.host.abort(self, leg, now)
        self.host.timer.arm()

    def release(self, request_id: str) -> bool:
        """Free KV that a leg left; False when there is none that is free to go."""
        now = self.host.timer.catch_up()
        held = self.pins.get(request_id)
        if held is None or not held.available:
            return False
        del self.pins[request_id]
        self.host.cluster.drop(held.pin, now)
        self.host.timer.arm()
        return True

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


class Host:
    """Runs legs on the wall clock, for the instances added. The data plane's ``Listener``.

    ``front_s`` passes between a leg's submission and its arrival in the instance's queue, beside what HTTP
    takes in reality. All calls come on one event loop."""

    def __init__(
        self,
        *,
        order: Order | None = None,
        chunks: ChunkBudget | None = None,
        front_s: float = 0.0,
        clock: Clock | None = None,
    ) -> None:
        self._events = EventQueue()
        self.cluster = Cluster((), self._events, self, leap=False, order=order, chunks=chunks)
        self.instances: list[EmulatedInstance] = []
        self._by_engine: dict[str, EmulatedInstance] = {}
        self._legs: dict[int, tuple[EmulatedInstance, EmulatedLeg]] = {}
        self._numbered = 0
        self._touched: dict[EmulatedLeg, EmulatedInstance] = {}
        self._front_s = front_s
        self.timer = EventTimer(self._events, self._handle, self._flush, clock)

    def add(self, replica: Replica, engine_id: str) -> EmulatedInstance:
        """Add an instance, empty."""
        simulated = self.cluster.add(replica)
        instance = EmulatedInstance(self, simulated.index, engine_id, replica, simulated.batcher)
        self.instances.append(instance)
        self._by_engine[engine_id] = instance
        return instance

    def remove(self, instance: EmulatedInstance) -> None:
        """Abort all legs of an instance, and free the KV that others have not begun to pull. It stays in
        ``instances``, for simulated instances are numbered."""
        instance.stop()
        for request_id in list(instance.pins):
            instance.release(request_id)
        del self._by_engine[instance.engine_id]

    def submit(self, instance: EmulatedInstance, request: GenerateRequest) -> None:
        """Start a leg of an instance."""
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
            self.cluster.submit(instance.index, leg.sequence, now)
        self.timer.arm()

    def abort(self, instance: EmulatedInstance, leg: EmulatedLeg, now: float) -> None:
        """End a leg that its instance has dropped."""
        del self._legs[leg.sequence.request]
        self.cluster.abort(leg.sequence, now)
        leg.finish(now, reason="abort")
        self._touched[leg] = instance
        self._flush()

    def release_source(self, source: KvSource) -> None:
        """Free the KV behind a handle that nobody is going to pull."""
        owner = self._by_engine.get(source.engine_id)
        if owner is not None:
            owner.release(source.request_id)

    def _claim(
        self, instance: EmulatedInstance, request: GenerateRequest, source: KvSource, now: float
    ) -> HeldPin | None:
        """Return the KV behind a handle if it fits the leg; otherwise free it, and the leg recomputes."""
        owner = self._by_engine.get(source.engine_id)
        held = None if owner is None else owner.pins.get(source.request_id)
        if held is None or not held.available:
            instance.counters.pull_failures += 1
            return None
        if held.pin.tokens > len(request.prompt_token_ids) - 1:
            instance.counters.pull_failures += 1
            self.cluster.drop(held.pin, now)
            return None
        return held

    def _handle(self, event: Event) -> None:
        now, kind, number, _ = event
        if kind != EventKind.LEG:
            self.cluster.handle(event)
        elif number in self._legs:
            instance, leg = self._legs[number]
            self.cluster.submit(instance.index, leg.sequence, now)

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
        counters = instance.counters
        if leg.first_token_s is None:
            counters.count_prompt(sequence.prompt, sequence.cached_tokens, leg.loaded_tokens)
            counters.prefix_queries += sequence.prompt
            counters.prefix_hits += sequence.cached_tokens
        counters.generation_tokens += 1
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
        moved = self.cluster.pull(sequence, instance, now)
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
            self.cluster.begin_lease(pin, now)
            instance.forget_old_pins()
            older = instance.pins.pop(request.id, None)
            if older is not None and older.claimed_by is None:
                self.cluster.drop(older.pin, now)
            instance.pins[request.id] = HeldPin(pin)
            ends_s = now + instance.replica.engine.lease_s
            pinned = PinnedKv(request.id, tuple(range(pin.blocks)), pin.tokens, ends_s)
        leg.finish(now, pinned)
        self._touched[leg] = instance

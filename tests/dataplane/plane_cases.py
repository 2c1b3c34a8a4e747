"""Random fleets and random lives of legs, run on the data plane alone, and audited after every event."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from hypothesis import strategies as st

from tidegate.core.instance import Instance
from tidegate.costs.forms import MixedCost, PrefillCost, StepCost, TransferCost
from tidegate.dataplane.cluster import Cluster
from tidegate.dataplane.events import EventKind, EventQueue
from tidegate.dataplane.instance import SimInstance
from tidegate.dataplane.replica import EngineSettings, Replica
from tidegate.dataplane.sequence import CHUNKING, DECODING, ENDED, LOADING, PAUSED, READY, Pin, SimSequence
from tidegate.policies.chunks import make_chunks
from tidegate.policies.order import Ticket
from tidegate.policies.orders import make_order
from tidegate_testing.builders import REFERENCE

BINARY = replace(
    REFERENCE,
    prefill=PrefillCost(0.0, 2.0**-14, 0.0),
    step=StepCost(2.0**-8, 0.0, 2.0**-24),
    mixed=MixedCost(2.0**-8, 2.0**-14, 2.0**-30, 2.0**-24),
    transfer=TransferCost(0.0, 2.0**35),
)


@dataclass(frozen=True)
class PlaneCase:
    """A fleet and legs of a seed. Sizes are small enough that everything runs out at times.

    ``tied``: times are multiples of powers of two, and links have no latency, so that much happens at once.
    """

    seed: int
    tied: bool
    instances: int
    legs: int
    rate_rps: float
    longest_prompt: int
    longest_answer: int
    kv_tokens: int
    block_tokens: int
    hash_block_tokens: int
    max_batch_tokens: int
    max_num_seqs: int
    order: str
    reserve: float
    lease_s: float
    disturbances: int
    prefix_cache: bool = True
    chunks: str = "fixed"
    kv_bytes_per_token: int = 1_000_000

    def fleet(self) -> list[Replica]:
        engine = EngineSettings(
            self.max_batch_tokens,
            self.max_num_seqs,
            0.0 if self.tied else 0.0007,
            self.lease_s,
            self.reserve,
            self.prefix_cache,
        )
        context = self.kv_tokens // self.block_tokens * self.block_tokens
        shape = Instance("", self.kv_tokens, context, self.block_tokens, self.kv_bytes_per_token)
        return [
            Replica(
                replace(shape, id=f"i{i}"),
                BINARY if self.tied else REFERENCE,
                engine,
                node=f"n{i // 2}",
                inter_node=TransferCost(0.0, 2.0**34) if self.tied else TransferCost(0.0017, 2.3e10),
            )
            for i in range(self.instances)
        ]


CASES = st.builds(
    PlaneCase,
    seed=st.integers(0, 2**32 - 1),
    tied=st.booleans(),
    instances=st.integers(1, 4),
    legs=st.integers(1, 40),
    rate_rps=st.sampled_from([5.0, 60.0, 500.0]),
    longest_prompt=st.sampled_from([20, 300, 900]),
    longest_answer=st.sampled_from([2, 40, 400]),
    kv_tokens=st.sampled_from([1600, 2400, 50_000]),
    block_tokens=st.sampled_from([1, 16, 24]),
    hash_block_tokens=st.sampled_from([4, 16, 40, 64]),
    max_batch_tokens=st.sampled_from([16, 64, 8192]),
    max_num_seqs=st.sampled_from([1, 4, 1024]),
    order=st.sampled_from(["fifo", "edf", "sjf", "feasible-first", "length-aware"]),
    reserve=st.sampled_from([0.0, 0.01]),
    lease_s=st.sampled_from([0.0517, 30.0]),
    disturbances=st.sampled_from([0, 10, 60]),
    prefix_cache=st.booleans(),
    chunks=st.sampled_from(["fixed", "slack"]),
)


@dataclass
class Told:
    """What the listener was told of one leg."""

    tokens_s: list[float] = field(default_factory=list)
    story: list[tuple[object, ...]] = field(default_factory=list)
    end_s: float | None = None
    aborted: bool = False


class PlaneRun:
    """The listener: hands legs over at random, and disturbs them by aborts and migrations."""

    def __init__(self, case: PlaneCase, *, leap: bool) -> None:
        self.case = case
        self.events = EventQueue()
        fleet = case.fleet()
        order, chunks = make_order(case.order), make_chunks(case.chunks)
        self.cluster = Cluster(fleet, self.events, self, leap=leap, order=order, chunks=chunks)
        self.sequences: list[SimSequence] = []
        self.told: list[Told] = []
        self.in_step: list[set[SimSequence]] = [set() for _ in fleet]
        self.steps = [0] * len(fleet)
        self.migrations: list[bool] = []
        self._pins: list[Pin] = []
        self._arrivals: list[SimSequence] = []
        self._plan_arrivals()

    def _plan_arrivals(self) -> None:
        """Make all choices up front, so that none depends on how events interleave."""
        case, rng = self.case, random.Random(self.case.seed)
        now = 0.0
        self.choices: list[tuple[int, int, int]] = []
        for number in range(case.legs):
            now += rng.expovariate(case.rate_rps)
            prompt, answer = rng.randint(1, case.longest_prompt), rng.randint(1, case.longest_answer)
            answer = min(answer, case.kv_tokens // case.block_tokens * case.block_tokens - prompt - 1)
            family = rng.randrange(4)
            common = rng.randrange(12)
            known = (prompt + answer) // case.hash_block_tokens if rng.random() < 0.8 else 0
            ids = tuple(
                family * 1000 + at if at < common else (number + 1) * 1_000_000 + at for at in range(known)
            )
            hand_over = rng.random() < 0.6 and answer > 1
            on, decode_on = rng.randrange(case.instances), rng.randrange(case.instances)
            last = prompt + (1 if hand_over else answer)
            self.choices.append((decode_on, prompt + answer, answer))
            bound = rng.choice([None, None, 1, 48])
            ticket = Ticket(
                now,
                now + rng.uniform(0.0, 0.5),
                rng.uniform(0.0, 0.1),
                prompt,
                0.0,
                bound,
                (0.02, 0.05, 0.2)[number % 3],
            )
            leg = SimSequence(number, prompt, last, hand_over, None, ids, case.hash_block_tokens, ticket)
            leg.on = on
            self._arrivals.append(leg)
            self.sequences.append(leg)
            self.told.append(Told())
            self.events.push(self._at(now), EventKind.ARRIVAL, number)
        self.disturbances = [
            (rng.randrange(case.legs), rng.choice(["abort", "migrate", "migrate", "cancel"]), rng.random())
            for _ in range(case.disturbances)
        ]
        for number in range(case.disturbances):
            self.events.push(self._at(rng.uniform(0.0, 2.0 * now + 1.0)), EventKind.TICK, number)

    def _at(self, at_s: float) -> float:
        return round(at_s * 256) / 256 if self.case.tied else at_s

    def run(self, *, audit: bool = False) -> PlaneRun:
        """Handle every event; with ``audit`` count all blocks after each."""
        while self.events.next_s() is not None:
            event = self.events.pop()
            now, kind, whose, _ = event
            if kind is EventKind.ARRIVAL:
                leg = self._arrivals[whose]
                if leg.state != ENDED:
                    self.cluster.submit(leg.on, leg, now)
            elif kind is EventKind.TICK:
                self._disturb(whose, now)
            else:
                self.cluster.handle(event)
            for instance in self.cluster.instances if audit else ():
                self._audit(instance)
        return self

    def _disturb(self, number: int, now: float) -> None:
        request, what, chance = self.disturbances[number]
        leg, told = self.sequences[request], self.told[request]
        to = int(chance * self.case.instances)
        if what == "abort":
            if chance < 0.3 and told.end_s is None:
                self.cluster.report(now)
                told.aborted = True
                for members in self.in_step:
                    members.discard(leg)
                self.cluster.abort(leg, now)
                told.story.append(("aborted", leg.state == ENDED))
        elif what == "migrate":
            began = leg.on >= 0 and self.cluster.begin_migration(request, leg.on, to, now)
            told.story.append(("migrate", leg.on, to, began))
        else:
            self.cluster.cancel_migration(request, now)

    def _audit(self, instance: SimInstance) -> None:
        """Count every block afresh: each is free, or held by somebody, or both cached and idle."""
        batcher = instance.batcher
        blocks, cache = batcher.blocks, batcher.blocks.cache
        assert 0 <= cache.idle_blocks <= blocks.free <= blocks.total
        assert cache.idle_blocks == sum(unit.blocks for unit in cache._idle.values())
        holders: dict[int, int] = {}
        private = 0
        owners = [pin for pin in self._pins if pin.on == instance.index and not self._freed(pin)]
        for pin in owners:
            private += pin.blocks
            private -= self._count(pin.shared, holders)
        for leg in self.sequences:
            if leg.on != instance.index or leg.state not in (LOADING, CHUNKING, READY, DECODING, PAUSED):
                continue
            if leg.state == CHUNKING:
                held = leg.blocks
            elif leg.state == DECODING:
                # Steps after the first of a stretch take their blocks when they are booked.
                held = blocks.for_tokens(leg.base + batcher.decode.ticks + (1 if instance._busy else 0))
            elif leg.state == LOADING:
                assert leg.source is not None
                held = blocks.for_tokens(leg.source.tokens)
            else:
                held = blocks.for_tokens(leg.computed)
            private += held - self._count(leg.shared, holders)
        reserved = sum(
            move.blocks for move in self.cluster._migrations._under_way.values() if move.dst == instance.index
        )
        units = sum(unit.blocks for unit in cache._units.values()) - cache.idle_blocks
        assert blocks.total - blocks.free == private + units + reserved
        for unit in cache._units.values():
            assert unit.holders == holders.get(id(unit), 0)

    def _freed(self, pin: Pin) -> bool:
        """Tell whether a pin's blocks are free, or are counted with the leg that took them over."""
        if pin.gone:
            return True
        if not pin.taken:
            return False
        return not any(leg.state == LOADING and leg.source is pin for leg in self.sequences)

    @staticmethod
    def _count(shared: object, holders: dict[int, int]) -> int:
        if shared is None:
            return 0
        for unit in shared.held:  # type: ignore[attr-defined]
            holders[id(unit)] = holders.get(id(unit), 0) + 1
        return shared.held_blocks  # type: ignore[attr-defined,no-any-return]

    # what the instances tell

    def stepped(self, instance: int, count: int, now: float) -> None:
        self.steps[instance] += count
        for leg in self.in_step[instance]:
            self.told[leg.request].tokens_s.extend([now] * count)

    def token(self, sequence: SimSequence, now: float) -> None:
        told = self.told[sequence.request]
        assert told.end_s is None and not told.aborted
        told.tokens_s.append(now)
        if sequence.tokens < sequence.last_token or sequence.state == DECODING:
            self.in_step[sequence.on].add(sequence)

    def preempted(self, sequence: SimSequence) -> None:
        self.in_step[sequence.on].discard(sequence)
        self.told[sequence.request].story.append(("preempted",))

    def paused(self, sequence: SimSequence, now: float) -> None:
        self.in_step[sequence.on].discard(sequence)

    def migrated(
        self, sequence: SimSequence, src: int, dst: int, moved_bytes: int, committed: bool, now: float
    ) -> None:
        assert sequence.on == (dst if committed else src)
        self.migrations.append(committed)
        self.told[sequence.request].story.append(("migrated", src, dst, moved_bytes, committed))

    def pull(self, sequence: SimSequence, instance: int, now: float) -> None:
        moved = self.cluster.pull(sequence, instance, now)
        self.told[sequence.request].story.append(("pull", instance, moved))

    def ended(self, sequence: SimSequence, pin: Pin | None, now: float) -> None:
        told = self.told[sequence.request]
        assert not told.aborted and told.end_s is None and sequence.state == ENDED
        self.in_step[sequence.on].discard(sequence)
        told.story.append(("leg", sequence.on, sequence.cached_tokens))
        if pin is None:
            told.end_s = now
            return
        self._pins.append(pin)
        self.cluster.begin_lease(pin, now)
        decode_on, last, _ = self.choices[sequence.request]
        leg = SimSequence(
            sequence.request,
            sequence.tokens,
            last,
            False,
            pin,
            sequence.block_ids,
            self.case.hash_block_tokens,
            sequence.ticket and sequence.ticket._replace(first_token_s=now),
            generated=1,
        )
        self.sequences[sequence.request] = leg
        self.cluster.submit(decode_on, leg, now)

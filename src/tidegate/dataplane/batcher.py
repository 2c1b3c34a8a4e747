"""Which tokens a simulated instance computes next: the queues, blocks and preemptions of an engine.

The rules are those of vLLM and the embedded engine: every running sequence with one pending token takes
part, then the token budget is filled with chunks of prompts, oldest first, then with new ones in order of
arrival. A prompt gets the blocks of all its tokens at admission. When blocks run out, the youngest
running sequence gives its own back and computes them again later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tidegate.dataplane.blocks import Blocks
from tidegate.dataplane.decode_batch import DecodeBatch
from tidegate.dataplane.replica import Replica
from tidegate.dataplane.sequence import (
    CHUNKING,
    DECODING,
    ENDED,
    LOADING,
    READY,
    WAITING,
    Pin,
    Sequence,
)


@dataclass(slots=True)
class Chunk:
    """``count`` pending tokens of a sequence in one step."""

    sequence: Sequence
    count: int


@dataclass(slots=True)
class Plan:
    """What the next step does. ``pulls`` were admitted and wait for their KV; ``preempted`` lost theirs.

    ``newcomers`` are the decodes whose first step in the batch this is.
    """

    chunks: list[Chunk]
    newcomers: list[Sequence]
    pulls: list[Sequence]
    preempted: list[Sequence]


class Batcher:
    """Owns the queues of one instance. ``running``, by age, holds ``decode`` and ``_chunking``."""

    def __init__(self, index: int, replica: Replica) -> None:
        engine, instance = replica.engine, replica.instance
        self.blocks = Blocks(instance.kv_capacity_tokens, instance.block_tokens, engine.reserve)
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}
        self.decode = DecodeBatch(instance.block_tokens)
        self._index = index
        self._engine = engine
        self._chunking: list[Sequence] = []
        self._ready: list[Sequence] = []
        self._loading = 0

    def plan(self, now: float) -> Plan:
        """Choose the next step's tokens and take their blocks."""
        plan = Plan([], self._ready, [], [])
        self._ready = []
        for sequence in plan.newcomers:
            self.join(sequence)
        self._make_room(plan)
        budget = self._engine.max_batch_tokens - len(self.decode)
        for sequence in self._chunking:
            budget = _add_chunk(plan, sequence, budget)
        while budget > 0 and self.waiting:
            sequence = self.waiting[0]
            if not self._admit(sequence, plan):
                break
            self.waiting.popleft()
            if sequence.admitted_s is None:
                sequence.admitted_s = now
            if sequence.state == DECODING:
                budget -= 1
            elif sequence.state == CHUNKING:
                budget = _add_chunk(plan, sequence, budget)
        return plan

    def commit(self, plan: Plan, steps: int) -> list[Sequence]:
        """Record that ``steps`` steps of ``plan`` are done; return the sequences whose prompt is complete.

        Takes the blocks of all but the first step, whose own ``plan`` took. The decodes that ended and the
        prompts that are complete are still to be asked for and put somewhere by the caller.
        """
        if steps > 1:
            self.blocks.take(self.decode.blocks_for(steps - 1, after=1))
        self.decode.ticks += steps
        complete = []
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.computed += steps * chunk.count
            if sequence.pending == 0:
                self._chunking.remove(sequence)
                sequence.state = READY
                sequence.tokens += 1
                complete.append(sequence)
        return complete

    def ended(self) -> list[Sequence]:
        """Take the decodes that have their last token out of the batch; they still hold their blocks."""
        gone = self.decode.ended()
        for sequence in gone:
            sequence.state = READY
        return gone

    def take_for_step(self) -> None:
        """Take the blocks of one more step."""
        self.blocks.take(self.decode.blocks_for(1))

    def most_steps(self, plan: Plan) -> int:
        """Return how many steps from this one on have the same composition and find their blocks."""
        most = self.decode.steps_to_end()
        if plan.chunks:
            chunk = plan.chunks[0]
            alone = len(plan.chunks) == 1 and chunk.count < chunk.sequence.pending
            whole = (chunk.sequence.pending - 1) // chunk.count if alone else 1
            most = whole if most is None else min(most, whole)
        assert most is not None, "a step has members"
        return self._within_blocks(most)

    def join(self, sequence: Sequence) -> None:
        """Have a sequence with one pending token take part from the next step on."""
        sequence.state = DECODING
        self.decode.join(sequence)

    def queue(self, sequence: Sequence) -> None:
        """Add a leg to the queue."""
        sequence.state, sequence.on = WAITING, self._index
        self.waiting.append(sequence)

    def discard(self, sequence: Sequence, plan: Plan | None) -> None:
        """Free all that a sequence holds; ``plan`` is the step that runs, whose blocks are taken."""
        state, sequence.state = sequence.state, ENDED
        if state == WAITING:
            self.waiting.remove(sequence)
            return
        if state == LOADING:
            assert sequence.source is not None
            self._loading -= 1
            self.blocks.give_back(self.blocks.for_tokens(sequence.source.tokens))
            return
        del self.running[sequence]
        if state == CHUNKING:
            self._chunking.remove(sequence)
            if plan is not None:
                plan.chunks = [chunk for chunk in plan.chunks if chunk.sequence is not sequence]
            self.blocks.give_back(self.blocks.for_tokens(sequence.tokens))
        elif state == DECODING:
            self.decode.leave(sequence)
            held = sequence.tokens if plan is not None else sequence.computed
            self.blocks.give_back(self.blocks.for_tokens(held))
            if plan is not None and sequence in plan.newcomers:
                plan.newcomers.remove(sequence)
        else:
            if sequence in self._ready:
                self._ready.remove(sequence)
            self.blocks.give_back(self.blocks.for_tokens(sequence.computed))

    def loaded(self, sequence: Sequence, tokens: int) -> None:
        """Take note that ``tokens`` tokens' KV has arrived."""
        self._loading -= 1
        sequence.state = READY
        sequence.source = None
        sequence.computed = tokens
        self.running[sequence] = None
        self._ready.append(sequence)

    def release(self, sequence: Sequence, *, pin: bool) -> Pin | None:
        """Take out a running sequence that ended; with ``pin`` its blocks stay taken, for a decode."""
        del self.running[sequence]
        sequence.state = ENDED
        blocks = self.blocks.for_tokens(sequence.computed)
        if pin:
            sequence.pin = Pin(self._index, blocks, sequence.computed)
            return sequence.pin
        self.blocks.give_back(blocks)
        return None

    def _within_blocks(self, most: int) -> int:
        free = self.blocks.free
        if len(self.decode) * (1 + most // self.blocks.block_tokens) <= free:
            return most
        low, high = 1, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.decode.blocks_for(middle - 1, after=1) <= free:
                low = middle
            else:
                high = middle - 1
        return low

    def _make_room(self, plan: Plan) -> None:
        """Give every decode the block of its next token, preempting from the young end."""
        while (needed := self.decode.blocks_for(1)) > self.blocks.free:
            youngest = next(reversed(self.running))
            del self.running[youngest]
            if youngest.state == DECODING:
                self.decode.leave(youngest)
                self.blocks.give_back(self.blocks.for_tokens(youngest.computed))
                if youngest in plan.newcomers:
                    plan.newcomers.remove(youngest)
            else:
                self._chunking.remove(youngest)
                self.blocks.give_back(self.blocks.for_tokens(youngest.tokens))
            youngest.state = WAITING
            youngest.computed = 0
            youngest.preemptions += 1
            self.waiting.appendleft(youngest)
            plan.preempted.append(youngest)
        self.blocks.take(needed)

    def _admit(self, sequence: Sequence, plan: Plan) -> bool:
        """Give the head of the queue its blocks; False, with nothing changed, when there is no room."""
        if len(self.running) + self._loading >= self._engine.max_num_seqs:
            return False
        pin = sequence.source
        if pin is not None and not pin.gone:
            return (
                self._adopt(sequence, pin, plan) if pin.on == self._index else self._load(sequence, pin, plan)
            )
        if not self._take(self.blocks.for_tokens(sequence.tokens)):
            return False
        sequence.state = CHUNKING
        self._chunking.append(sequence)
        self.running[sequence] = None
        return True

    def _adopt(self, sequence: Sequence, pin: Pin, plan: Plan) -> bool:
        """Take over the blocks of this instance's own pin; the next token may need one more."""
        if not self._take(self.blocks.for_tokens(pin.tokens + 1) - pin.blocks):
            return False
        pin.taken = True
        sequence.source = None
        sequence.computed = pin.tokens
        self.running[sequence] = None
        self.join(sequence)
        plan.newcomers.append(sequence)
        return True

    def _load(self, sequence: Sequence, pin: Pin, plan: Plan) -> bool:
        if not self._take(self.blocks.for_tokens(pin.tokens)):
            return False
        pin.taken = True
        sequence.state = LOADING
        self._loading += 1
        plan.pulls.append(sequence)
        return True

    def _take(self, count: int) -> bool:
        if not self.blocks.room_for(count, others=bool(self.running) or self._loading > 0):
            return False
        self.blocks.take(count)
        return True


def _add_chunk(plan: Plan, sequence: Sequence, budget: int) -> int:
    """Give the sequence what is left of the budget, at most what it needs; return what remains."""
    count = min(sequence.pending, budget)
    if count > 0:
        plan.chunks.append(Chunk(sequence, count))
    return budget - count

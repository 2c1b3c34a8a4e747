"""Which tokens a simulated instance computes next: the queues, blocks and preemptions of an engine.

The rules are vLLM's (0.19): every running sequence with one pending token takes part, then the token budget
is filled with chunks of the prompts that have begun, oldest first, then with new ones. A chunk budget may
fill less (``StepRoom``).

- *Admission*: the whole prompt must find free blocks, beside the reserve, but only those of the tokens that a
  step computes are taken for it. A head without room holds back all behind it until something has changed.
- *Prefix*: of a prompt, the units that are in the cache are not computed again; at least one token is.
- *Preemption*: without blocks the youngest running sequence gives its own back, and nobody is admitted.
- *Order* (ours; vLLM has one queue): preempted work, then the legs whose KV exists, first come, first served
  (each costs one token, and its reader waits); then the prompts as their queue says, or none of them.
- *Pulls*: an admitted leg whose KV is elsewhere gets blocks for all of it, leaving those that begun prompts
  will need, and takes part once what the cache lacks has arrived; a prompt finds room as a whole.

The embedded engine differs in one rule: it takes the blocks of a whole prompt at its admission.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf

from tidegate.dataplane.blocks import Blocks
from tidegate.dataplane.decode_batch import DecodeBatch
from tidegate.dataplane.prefix import Shared
from tidegate.dataplane.replica import Replica
from tidegate.dataplane.sequence import (
    CHUNKING,
    DECODING,
    ENDED,
    LOADING,
    PAUSED,
    READY,
    UNBOUNDED,
    WAITING,
    Pin,
    SimSequence,
)
from tidegate.dataplane.step_blocks import StepBlocks
from tidegate.dataplane.step_room import StepRoom
from tidegate.policies.chunks import FIXED, ChunkBudget
from tidegate.policies.dues import TokenDues
from tidegate.policies.order import UNKNOWN, WaitingQueue


class Batcher:
    """Owns the queues of one instance, and the plan of the step, or equal steps, that it runs.

    ``running``, by age, holds ``decode`` and the prompts that have begun. ``readied`` join the next step.
    ``loading`` counts who has a place and is not in the batch: its KV comes, or moves away.
    ``stuck``: nobody who waits can be admitted.

    Of the plan: ``chunks`` are the sequences that compute ``chunk`` tokens; ``newcomers`` the decodes whose
    first step in the batch it is; ``pulls`` were admitted and wait for their KV; ``preempted`` lost theirs.
    """

    def __init__(
        self, index: int, replica: Replica, queue: WaitingQueue[SimSequence], chunks: ChunkBudget = FIXED
    ) -> None:
        engine, instance = replica.engine, replica.instance
        self.blocks = Blocks(instance.kv_capacity_tokens, instance.block_tokens, engine.reserve)
        self.decode = DecodeBatch(instance.block_tokens, None if chunks.steady else TokenDues())
        self.running: dict[SimSequence, None] = {}
        self.chunks: list[SimSequence] = []
        self.newcomers: list[SimSequence] = []
        self.pulls: list[SimSequence] = []
        self.preempted: list[SimSequence] = []
        self.index = index
        self._step_blocks = StepBlocks(self.blocks, self.decode)
        self._room = StepRoom(chunks, replica, self.decode)
        self.max_num_seqs = engine.max_num_seqs
        self._prefix_cache = engine.prefix_cache
        self._queue = queue
        self._first: deque[SimSequence] = deque()
        self._chunking: list[SimSequence] = []
        self.readied: list[SimSequence] = []
        self._queued = 0
        self.loading = 0
        self.stuck = self._bounded = False

    @property
    def waiting(self) -> bool:
        """Whether there are legs that were not admitted yet."""
        return bool(self._first) or self._queued > 0

    def head(self, now: float) -> SimSequence | None:
        """Return who is next to be admitted."""
        return self._first[0] if self._first else self._queue.head(now)

    # plan

    def plan(self, now: float) -> None:
        """Choose the next step's tokens and take their blocks."""
        decode, blocks, room = self.decode, self.blocks, self._room
        room.begin(now)
        if self.pulls:
            self.pulls = []
        if self.preempted:
            self.preempted = []
        if self.chunks:
            self.chunks = []
        if self.readied:
            self.newcomers, self.readied = self.readied, []
            for sequence in self.newcomers:
                decode.join(sequence)
        elif self.newcomers:
            self.newcomers = []
        self._bounded = False
        if decode.members:
            needed = decode.remainders[-decode.ticks % blocks.block_tokens]
            if needed:
                while needed > blocks.free:
                    self._preempt_youngest(taken=False)
                    needed = decode.blocks_for(1)
                blocks.take(needed)
        if self._first and not (room.steady or self.stuck or self.preempted):
            self._admit_continued(now)  # before a chunk is chosen that is to be in time for them
        if self._chunking:
            at = 0
            while at < len(self._chunking) and room.left > 0 and not self._bounded:
                self._schedule(self._chunking[at])
                at += 1
        if not self.stuck and not self.preempted and room.left > 0:
            if self._first or self._queued:
                self._admit_all(now)
            else:
                self.stuck = True

    def most_steps(self) -> int:
        """Return how many steps from this one on have the same composition and find their blocks."""
        chunks, decode = self.chunks, self.decode
        if self.preempted or len(chunks) > 1:
            return 1  # the next step admits again, or has other chunks
        if not self._room.steady and (self._chunking or (self.waiting and not self.stuck)):
            return 1  # it may have another chunk
        if chunks:
            sequence = chunks[0]
            chunk = sequence.chunk
            pending = sequence.tokens - sequence.computed
            if chunk == pending:
                return 1
            most = (pending - 1) // chunk
            if decode.members:
                most = min(most, decode.steps_to_end())
        else:
            most = decode.steps_to_end()
        return self._step_blocks.most_that_fit(chunks, most)

    def take_next(self) -> None:
        """Take the blocks of the plan's next step."""
        self._step_blocks.take_for(self.chunks, 1, after=0)

    def blocks_held(self, steps: int, *, running: bool) -> int:
        """Return how many blocks are taken when ``steps`` steps that are not booked are over.

        ``running``: the step after them has begun.
        """
        needed = self._step_blocks.needed_by(self.chunks, steps + running) if steps else 0
        return min(self.blocks.total - self.blocks.free + needed, self.blocks.total)

    def commit(self, steps: int) -> Sequence[SimSequence]:
        """Record that ``steps`` steps of the plan are done; return the sequences whose prompt is complete.

        Takes the blocks of all but the first step, which ``plan`` took. The decodes that ended and the
        prompts that are complete are still to be asked for and put somewhere by the caller.
        """
        if steps > 1:
            if self.chunks and self.chunks[0].shared is not None and self.blocks.cache.idle_blocks:
                # What a step evicts decides what it may enter: one by one.
                for _ in range(steps - 1):
                    self.commit(1)
                    self.take_next()
                return self.commit(1)
            if self.chunks:
                self._step_blocks.take_for(self.chunks, steps - 1, after=1)
            elif needed := self.decode.blocks_for(steps - 1, after=1):
                self.blocks.take(needed)
        self.decode.ticks += steps
        if not self.chunks:
            return ()
        complete: list[SimSequence] = []
        for sequence in self.chunks:
            computed = sequence.computed = sequence.computed + steps * sequence.chunk
            if sequence.shared is not None:
                self.blocks.cache.publish(sequence.shared, computed)
            if computed == sequence.tokens:
                self._chunking.remove(sequence)
                sequence.state = READY
                sequence.tokens += 1
                complete.append(sequence)
                self.stuck = False
        return complete

    def queue(self, sequence: SimSequence, now: float) -> None:
        """Add a leg to the queue."""
        sequence.state = WAITING
        sequence.on = self.index
        sequence.tokens = sequence.prompt
        if sequence.ticket is not None:
            sequence.first_token_s = sequence.ticket.first_token_s
        if sequence.block_ids:
            self.know(sequence)
        self.stuck = False
        if sequence.source is not None and not sequence.extends:
            self._first.append(sequence)
        else:
            self._queued += 1
            ticket = sequence.ticket
            if ticket is not None and ticket.first_token_s is not None:
                self._queue.push_continued(sequence)
            else:
                self._queue.push(sequence, ticket or UNKNOWN._replace(tokens=sequence.prompt).on_clock(now))

    def loaded(self, sequence: SimSequence, tokens: int) -> None:
        """Take note that ``tokens`` tokens' KV is here."""
        self.loading -= 1
        self.stuck = False
        extends, sequence.source, sequence.computed = sequence.extends, None, tokens
        if sequence.shared is not None:
            self.blocks.cache.publish(sequence.shared, tokens)
        if not extends:
            self.ready(sequence)
            return
        sequence.state, sequence.blocks = CHUNKING, self.blocks.for_tokens(tokens)
        self._chunking.append(sequence)
        self.running[sequence] = None

    def release(self, sequence: SimSequence, *, pin: bool) -> Pin | None:
        """Take out a running sequence that ended; with ``pin`` its blocks stay taken, for a decode."""
        del self.running[sequence]
        self.stuck = False
        sequence.state = ENDED
        computed, shared = sequence.computed, sequence.shared
        blocks = -(-computed // self.blocks.block_tokens)
        if shared is not None:
            self.blocks.cache.publish(shared, computed)
            sequence.shared = None
        if pin:
            pinned = sequence.pin = Pin(self.index, blocks, computed, shared)
            return pinned
        self.blocks.release(blocks, shared)
        return None

    def unpin(self, pin: Pin) -> None:
        """Free the blocks of a pin."""
        self.stuck = False
        self.blocks.release(pin.blocks, pin.shared)

    def discard(self, sequence: SimSequence, *, in_step: bool) -> None:
        """Free all that a sequence holds; ``in_step``: blocks were taken for the step that runs."""
        state, sequence.state = sequence.state, ENDED
        self.stuck = False
        if state == WAITING:
            if sequence in self._first:
                self._first.remove(sequence)
            else:
                self._queued -= 1
                self._queue.remove(sequence)
            return
        if state == LOADING:
            assert sequence.source is not None
            self.loading -= 1
            self.blocks.release(self.blocks.for_tokens(sequence.source.tokens), sequence.shared)
            return
        if state == PAUSED:
            self.give_up(sequence)
            return
        del self.running[sequence]
        self._take_out(sequence, state, in_step)

    def pause(self, sequence: SimSequence) -> None:
        """Take a decode out of the batch, with its blocks and its place."""
        self.decode.leave(sequence)
        del self.running[sequence]
        if sequence in self.newcomers:
            self.newcomers.remove(sequence)
        sequence.state = PAUSED
        self.loading += 1

    def give_up(self, sequence: SimSequence) -> None:
        """Free what a paused decode held: it went elsewhere."""
        self.loading -= 1
        self.stuck = False
        self._free(sequence, self.blocks.for_tokens(sequence.computed))
        sequence.shared = None

    def ready(self, sequence: SimSequence) -> None:
        """Have a sequence whose KV is here join the next step."""
        sequence.state = READY
        self.running[sequence] = None
        self.readied.append(sequence)

    def know(self, sequence: SimSequence) -> None:
        """Note which of the sequence's tokens can be found again."""
        if sequence.block_ids and self._prefix_cache:
            ids, tokens = sequence.block_ids, int(sequence.hash_block_tokens)
            sequence.shared = Shared(ids, tokens, self.blocks.block_tokens)

    # blocks and admission

    def _take_out(self, sequence: SimSequence, state: int, in_step: bool) -> None:
        """Free the blocks of a sequence that ran in ``state``."""
        if state == CHUNKING:
            self._chunking.remove(sequence)
            if sequence in self.chunks:
                self.chunks.remove(sequence)
            held = sequence.blocks
        elif state == DECODING:
            self.decode.leave(sequence)
            held = self.blocks.for_tokens(sequence.tokens if in_step else sequence.computed)
            if sequence in self.newcomers:
                self.newcomers.remove(sequence)
        else:
            if sequence in self.readied:
                self.readied.remove(sequence)
            held = self.blocks.for_tokens(sequence.computed)
        self._free(sequence, held)

    def _free(self, sequence: SimSequence, held: int) -> None:
        """Free ``held`` blocks of a sequence, but keep what is whole findable."""
        if sequence.shared is not None:
            self.blocks.cache.publish(sequence.shared, sequence.computed)
        self.blocks.release(held, sequence.shared)

    def _schedule(self, sequence: SimSequence, least: int = 0) -> None:
        """Give a prompt what the step has room for, at most what it needs, and ``least`` in any case."""
        bound, computed = sequence.chunk_bound, sequence.computed
        room = max(least, self._room.for_prompt(computed))
        count, self._bounded = min(sequence.tokens - computed, room, bound), bound < UNBOUNDED
        if count <= 0:
            return
        blocks = -(-(sequence.computed + count) // self.blocks.block_tokens)
        while blocks - sequence.blocks > self.blocks.free:
            if self._preempt_youngest(taken=True) is sequence:
                return
        self.blocks.take(blocks - sequence.blocks)
        sequence.blocks = blocks
        sequence.chunk = count
        self.chunks.append(sequence)
        ticket, is_first = sequence.ticket, sequence.first_token_s is None
        ends = is_first and computed + count == sequence.tokens
        self._room.add(count, computed, ticket.deadline_s if ends and ticket is not None else inf)

    def _preempt_youngest(self, *, taken: bool) -> SimSequence:
        """Free the blocks of the youngest; ``taken``: the decodes have those of the coming step."""
        youngest = next(reversed(self.running))
        del self.running[youngest]
        state, youngest.state = youngest.state, WAITING
        self._take_out(youngest, state, taken)
        youngest.computed = 0
        youngest.blocks = 0
        youngest.preemptions += 1
        self._first.appendleft(youngest)
        self.preempted.append(youngest)
        self.stuck = False
        return youngest

    def _admit_continued(self, now: float) -> None:
        """Admit the decodes whose KV exists while there is room."""
        first, room = self._first, self._room
        while room.left > 0 and first and first[0].source is not None:
            if not self._admit(first[0]):
                self.stuck = True
                return
            first.popleft().note_admission(now)

    def _admit_all(self, now: float) -> None:
        """Admit from the queue while there is room."""
        first, queue, room = self._first, self._queue, self._room
        while room.left > 0:
            continued, asked, next_s = bool(first), self._queued and not self._bounded, room.next_s
            sequence = first[0] if continued else queue.head(next_s, room.chunk_tokens) if asked else None
            if sequence is None:
                self.stuck = True
                return
            if not room.steady and sequence.source is None and room.for_prompt(0) <= 0:
                return
            if not self._admit(sequence):
                self.stuck = True
                return
            if continued:
                first.popleft()
            else:
                self._queued -= 1
                queue.pop(next_s)
            sequence.note_admission(now)
            if sequence.state == CHUNKING:
                self._schedule(sequence, least=1)

    def _admit(self, sequence: SimSequence) -> bool:
        """Let the head of the queue begin; False, with nothing changed, when there is no room."""
        if len(self.running) + self.loading >= self.max_num_seqs:
            return False
        pin = sequence.source
        if pin is not None and not pin.gone:
            return self._adopt(sequence, pin) if pin.on == self.index else self._load(sequence, pin)
        units = self._find_room(sequence, sequence.tokens, sequence.tokens - 1, 0)
        if units < 0:
            return False
        shared = sequence.shared
        if shared is not None:
            self.blocks.hold_prefix(shared, units)
            sequence.computed = units * shared.unit_tokens
            sequence.blocks = units * shared.unit_blocks
        sequence.source = None
        sequence.state = CHUNKING
        self._chunking.append(sequence)
        self.running[sequence] = None
        return True

    def _find_room(self, sequence: SimSequence, tokens: int, findable: int, others_need: int) -> int:
        others = bool(self.running) or self.loading > 0
        return self.blocks.find_room(sequence.shared, tokens, findable, others_need, others=others)

    def _adopt(self, sequence: SimSequence, pin: Pin) -> bool:
        """Take over the blocks of this instance's own pin; the next token may need one more."""
        count = self.blocks.for_tokens(pin.tokens + 1) - pin.blocks
        if not self.blocks.room_for(count, others=bool(self.running) or self.loading > 0):
            return False
        self.blocks.take(count)
        pin.taken = True
        sequence.source = None
        sequence.shared = pin.shared and pin.shared.named_by(sequence.shared)
        sequence.computed = pin.tokens
        self.running[sequence] = None
        self.decode.join(sequence)
        self.newcomers.append(sequence)
        return True

    def _load(self, sequence: SimSequence, pin: Pin) -> bool:
        """Take the blocks of KV that is elsewhere, but for what the cache has of it."""
        tokens, promised = pin.tokens, 0
        for other in self._chunking:
            promised += self.blocks.for_tokens(other.tokens) - other.blocks
        needed = sequence.tokens if sequence.extends else tokens
        units = self._find_room(sequence, needed, tokens, promised)
        if units < 0:
            return False
        count, shared = -(-tokens // self.blocks.block_tokens), sequence.shared
        if shared is not None:
            self.blocks.hold_prefix(shared, units)
            count -= units * shared.unit_blocks
        self.blocks.take(count)
        pin.taken = True
        sequence.state = LOADING
        self.loading += 1
        self.pulls.append(sequence)
        return True

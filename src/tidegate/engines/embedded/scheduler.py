"""Which tokens the next step computes.

State is three collections: ``waiting`` (in the engine's order), ``running`` (oldest first, with blocks) and
``loading`` (with blocks, KV on its way from a peer). A step takes every running sequence with one pending
token, then fills the token budget, or what a chunk budget allows of it, with chunks of prompts. When blocks
run out, the youngest running sequence gives its own back and computes them again later. Where pins alone keep
the head of the queue waiting, the oldest end.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tidegate.core.clock import Clock
from tidegate.costs.profile import UNMEASURED, Profile
from tidegate.engines.embedded.blocks import BlockPool, Pins, extend_keys
from tidegate.engines.embedded.composing import ComposedStep
from tidegate.engines.embedded.kv_pull import PeerPuller
from tidegate.engines.embedded.model import Batch
from tidegate.engines.embedded.options import EngineConfig
from tidegate.engines.embedded.sequence import TokenSequence
from tidegate.engines.embedded.step_time import StepTimes
from tidegate.engines.serving.types import Counters, KvSource, PinnedKv
from tidegate.policies.chunks import FIXED, ChunkBudget, make_chunks
from tidegate.policies.order import PATIENCE_S, UNKNOWN, WaitingQueue
from tidegate.policies.orders import make_order
from tidegate.policies.shares import shared_queue

log = logging.getLogger(__name__)

_RESERVE = 0.01
"""Share of blocks that admission leaves free while others run, so that their next tokens find room."""

LoadDone = Callable[[TokenSequence, str | None, int], None]


class BatchScheduler:
    """Owns the queues and decides batches. Only the compute thread calls it. ``load_done`` is called on the
    transfer thread when a pull ends and must bring the sequence back to ``finish_load`` on the compute
    thread."""

    def __init__(
        self, pool: BlockPool, pins: Pins, clock: Clock, load_done: LoadDone, config: EngineConfig
    ) -> None:
        self.pool = pool
        self.pins = pins
        self.waiting: WaitingQueue[TokenSequence] = shared_queue(make_order(config.order))
        self.running: list[TokenSequence] = []
        self.loading: list[TokenSequence] = []
        self.counters = Counters()
        self.puller: PeerPuller | None = None
        self.stall_ends_s = math.inf
        """When pins end for the head of the queue, on the clock; inf while they are not what it waits for."""
        self._clock = clock
        self._load_done = load_done
        self._config = config
        self._chunks: ChunkBudget = FIXED
        self._times = StepTimes(UNMEASURED)
        self._steps_since = 0
        self._fresh: list[int] = []
        self._reserve = int(_RESERVE * pool.total_blocks)

    def price(self, profile: Profile) -> None:
        """Choose chunks by the engine's chunk budget from now on, by what ``profile`` and ``took`` say."""
        self._chunks, self._times = make_chunks(self._config.chunks), StepTimes(profile)

    def add(self, sequence: TokenSequence) -> None:
        """Queue a new request: one that continues an answer before those that have yet to begin theirs."""
        if sequence.request.generated:
            self.waiting.push_continued(sequence)
        else:
            ticket = sequence.request.ticket or UNKNOWN._replace(tokens=len(sequence.tokens))
            self.waiting.push(sequence, ticket.on_clock(sequence.submitted_s))

    def schedule(self) -> Batch:
        """Choose the next step's tokens and allocate their blocks. The batch may be empty."""
        for blocks in self.pins.collect():
            self.pool.release(blocks)
        self._fresh = []
        self._make_room()
        now = self._clock.now()
        self._end_stall(now)
        step = ComposedStep(
            self._chunks, self._times.profile, self._config.max_batch_tokens, self._steps_since, now
        )
        for sequence in self.running:
            if sequence.pending == 1:
                step.add_single(sequence)
        if not self._chunks.steady:
            self._admit_continued(step, now)  # before a chunk is chosen that is to be in time for them
        for begun in self.running:
            if begun.pending > 1 and step.left > 0 and not step.alone:
                step.add_chunk(begun)
        while step.left > 0:
            next_s = step.next_s
            head = self.waiting.head(next_s, step.chunk_tokens)
            if head is None or not (head.request.generated or (not step.alone and step.room(0) > 0)):
                break
            if not self._admit(head):
                break
            self.waiting.pop(next_s)
            if head.loading:
                continue
            if head.pending == 1:
                step.add_single(head)
            else:
                step.add_chunk(head, least=1)
        self._steps_since = 0 if step.chunks else self._steps_since + 1
        return Batch(step.singles, step.chunks, self._fresh)

    def _admit_continued(self, step: ComposedStep, now: float) -> None:
        """Admit the answers that go on, while there is room; what they have to compute comes later."""
        while step.left > 0:
            head = self.waiting.head(now)
            if head is None or not head.request.generated or not self._admit(head):
                return
            self.waiting.pop(now)
            if not head.loading and head.pending == 1:
                step.add_single(head)

    def took(self, batch: Batch, seconds: float) -> None:
        """Take in how long the step of ``batch``, which is committed, took as a whole."""
        if not self._chunks.steady:
            self._times.observe(batch, seconds)

    def commit(self, batch: Batch) -> None:
        """Record that the batch's tokens have KV; full blocks become findable by later requests."""
        for sequence in batch.singles:
            sequence.computed += 1
            self._publish(sequence)
        for chunk in batch.chunks:
            chunk.sequence.computed += chunk.count
            self._publish(chunk.sequence)

    def remove(self, sequence: TokenSequence) -> list[int]:
        """Take a waiting or running sequence out and return its blocks, still held."""
        if sequence.blocks:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
            self.decline(sequence)
        return sequence.take_blocks()

    def finish_load(self, sequence: TokenSequence, error: str | None, moved_bytes: int, wanted: bool) -> None:
        """Take note that a pull ended. A failed one is computed instead; an unwanted one is dropped."""
        self.loading.remove(sequence)
        sequence.loading = False
        self.counters.pulled_bytes += moved_bytes
        now = self._clock.now()
        sequence.kv_load_s = now - (sequence.admitted_s or now)
        if error is not None:
            self.counters.pull_failures += 1
        if wanted and error is None:
            self._publish(sequence)
            self.running.append(sequence)
            return
        sequence.loaded_tokens = 0
        self.pool.release(sequence.take_blocks())
        if wanted:
            self.waiting.push_front(sequence)

    def expect(self, sequence: TokenSequence, tokens: int) -> bool:
        """Reserve a place, and blocks for ``tokens`` tokens, for a decode that is on its way here; False,
        with nothing changed, without room. ``cached_tokens`` of it are in the prefix cache and need not come.
        """
        if len(self.running) + len(self.loading) >= self._config.max_num_seqs:
            return False
        block_tokens, most = self.pool.block_tokens, len(sequence.tokens) - 1
        extend_keys(sequence.keys, sequence.root, sequence.tokens, block_tokens, most)
        hits = self.pool.lookup(sequence.keys)
        if not self._allocate_for(sequence, hits, tokens):
            return False
        sequence.published = len(hits)
        sequence.cached_tokens = len(hits) * block_tokens
        sequence.loading = True
        sequence.admitted_s = self._clock.now()
        self.loading.append(sequence)
        self.counters.prefix_queries += len(sequence.tokens)
        self.counters.prefix_hits += sequence.cached_tokens
        return True

    def expect_more(self, sequence: TokenSequence, tokens: int) -> bool:
        """Have blocks reserved for ``tokens`` tokens of an expected decode; False when there are too few."""
        need = -(-tokens // self.pool.block_tokens) - len(sequence.blocks)
        blocks = self.pool.allocate(max(0, need)) if need <= 0 or self._room_for(need) else None
        if blocks is not None:
            sequence.add_blocks(blocks)
        return blocks is not None

    def end_expecting(self, sequence: TokenSequence, moved_bytes: int, arrived: bool) -> None:
        """Run an expected decode, whose KV and tokens are here, or drop it and free what was reserved."""
        self.loading.remove(sequence)
        sequence.loading = False
        self.counters.pulled_bytes += moved_bytes
        if not arrived:
            self.pool.release(sequence.take_blocks())
            return
        sequence.computed = len(sequence.tokens) - 1
        sequence.loaded_tokens = max(0, len(sequence.request.prompt_token_ids) - sequence.cached_tokens)
        self.pool.release(sequence.drop_blocks(-(-sequence.computed // self.pool.block_tokens)))
        self._publish(sequence)
        self.running.append(sequence)

    def place_computed(self, sequence: TokenSequence, tokens: int) -> None:
        """Run a waiting sequence, for which there must be blocks, as if its first ``tokens`` had KV."""
        self._allocate_for(sequence, [])
        self.waiting.remove(sequence)
        self._start(sequence, 0)
        sequence.computed = tokens
        sequence.published = len(sequence.blocks)

    def _end_stall(self, now: float) -> None:
        """End pins, those that are due first, for a head of the queue that they alone have kept waiting.

        Who is to pull them may itself be waiting for room that KV takes which is to come here, and so on in a
        circle until the leases end. It computes what it cannot pull any more.
        """
        head = None if self.running or self.loading else self.waiting.head(now)
        if head is None:
            self.stall_ends_s = math.inf
            return
        self.stall_ends_s = min(self.stall_ends_s, now + PATIENCE_S)
        if now < self.stall_ends_s:
            return
        source, own = head.request.source, None
        if source is not None and source.engine_id == self._config.engine_id:
            own = self.pins.pinned(source.request_id)
        need = -(-len(head.tokens) // self.pool.block_tokens) - (len(own.block_ids) if own else 0)
        while self.pool.free_blocks < need:
            blocks = self.pins.end_oldest(but=own.request_id if own else "")
            if blocks is None:
                break
            self.pool.release(blocks)

    def _make_room(self) -> None:
        """Give every decoding sequence the block of its next token, preempting from the young end."""
        at = 0
        while at < len(self.running):
            sequence = self.running[at]
            if sequence.computed < len(sequence.blocks) * self.pool.block_tokens:
                at += 1
                continue
            block = self.pool.allocate(1)
            if block is not None:
                sequence.add_blocks(block)
                self._fresh += block
                at += 1
            else:
                self._preempt(self.running.pop())

    def _preempt(self, sequence: TokenSequence) -> None:
        self.pool.release(sequence.take_blocks())
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self.waiting.push_front(sequence)

    def _admit(self, sequence: TokenSequence) -> bool:
        """Give the head of the queue its blocks; False, with nothing changed, when there is no room."""
        if len(self.running) + len(self.loading) >= self._config.max_num_seqs:
            return False
        block_tokens = self.pool.block_tokens
        most = len(sequence.tokens) - 1
        extend_keys(sequence.keys, sequence.root, sequence.tokens, block_tokens, most)
        hits = self.pool.lookup(sequence.keys[: most // block_tokens])
        source = sequence.request.source if sequence.try_source else None
        if source is not None and source.engine_id == self._config.engine_id:
            pin = self.pins.pinned(source.request_id)
            if pin is not None and source.block_ids == pin.block_ids[: len(source.block_ids)]:
                return self._adopt(sequence, pin, source.num_tokens)
            sequence.try_source = False
            source = None
        usable = 0
        if source is not None:
            usable = min(source.num_tokens, len(source.block_ids) * block_tokens, len(sequence.tokens))
        pull = min(usable, most) // block_tokens > len(hits)
        if not self._allocate_for(sequence, hits):
            return False
        if pull and source is not None:
            self._load(sequence, source, usable, len(hits))
        else:
            self.decline(sequence)
            self._start(sequence, len(hits) * block_tokens)
        return True

    def _allocate_for(self, sequence: TokenSequence, shared: list[int], tokens: int = 0) -> bool:
        """Give the sequence ``shared`` blocks and fresh ones for its other tokens, or for ``tokens`` in all,
        if enough are free."""
        need = -(-(tokens or len(sequence.tokens)) // self.pool.block_tokens) - len(shared)
        self.pool.retain(shared)
        blocks = self.pool.allocate(need) if self._room_for(need) else None
        if blocks is None:
            self.pool.release(shared)
            return False
        sequence.add_blocks(shared + blocks)
        return True

    def _room_for(self, count: int) -> bool:
        reserve = self._reserve if self.running or self.loading else 0
        return self.pool.free_blocks - count >= reserve

    def _start(self, sequence: TokenSequence, cached: int) -> None:
        """Move an admitted sequence, ``cached`` tokens of which have KV, to ``running``."""
        self._note_admission(sequence, cached, cached)
        sequence.computed = cached
        sequence.published = cached // self.pool.block_tokens
        self.running.append(sequence)

    def _note_admission(self, sequence: TokenSequence, cached: int, filled: int) -> None:
        """Count an admission with ``cached`` tokens from the prefix cache. Have the last block cleared unless
        it already holds some of the first ``filled`` tokens."""
        if (len(sequence.blocks) - 1) * self.pool.block_tokens >= filled:
            self._fresh.append(sequence.blocks[-1])
        self.counters.prefix_queries += len(sequence.tokens)
        self.counters.prefix_hits += cached
        if sequence.admitted_s is None:
            sequence.admitted_s = self._clock.now()
            sequence.cached_tokens = cached

    def _adopt(self, sequence: TokenSequence, pin: PinnedKv, covered: int) -> bool:
        """Take over the blocks of this instance's own pin; False when the rest finds no room. The handle may
        cover fewer tokens than the pin: only ``covered`` ones are the prompt's."""
        block_tokens = self.pool.block_tokens
        computed = min(pin.num_tokens, covered, len(sequence.tokens) - 1)
        written = pin.block_ids[computed // block_tokens : computed // block_tokens + 1]
        if any(self.pool.is_shared(block) for block in written):
            # The block that is written next has or may find another reader, so it is computed afresh.
            computed -= computed % block_tokens
        keep = -(-computed // block_tokens)
        need = -(-len(sequence.tokens) // block_tokens) - keep
        if not self._room_for(need):
            return False
        sequence.try_source = False
        if self.pins.take(pin.request_id) is None:
            return self._admit(sequence)
        fresh = self.pool.allocate(need)
        if fresh is None:
            raise AssertionError("blocks that were free are gone")
        self.pool.release(pin.block_ids[keep:])
        sequence.add_blocks([*pin.block_ids[:keep], *fresh])
        self._start(sequence, computed)
        return True

    def _load(self, sequence: TokenSequence, source: KvSource, usable: int, hits: int) -> None:
        """Have the first ``usable`` tokens' KV brought in by the puller, but for its first ``hits`` blocks,
        which are here."""
        cached = hits * self.pool.block_tokens
        self._note_admission(sequence, cached, usable)
        sequence.try_source = False
        sequence.loading = True
        sequence.published = hits
        sequence.computed = min(usable, len(sequence.tokens) - 1)
        sequence.loaded_tokens = sequence.computed - cached
        self.loading.append(sequence)
        count = -(-usable // self.pool.block_tokens)
        lacking = replace(source, block_ids=source.block_ids[hits:count])
        done = partial(self._load_done, sequence)
        if self.puller is None:
            done("this instance has no KV transfer", 0)
            return
        try:
            self.puller.submit(lacking, sequence.blocks[hits:count], done)
        except Exception as error:
            log.exception("submitting a pull from %s failed", source.engine_id)
            done(str(error), 0)

    def decline(self, sequence: TokenSequence) -> None:
        """Tell the owner of KV that the sequence will not pull to release it, once."""
        source = sequence.request.source
        if source is None or not sequence.try_source:
            return
        sequence.try_source = False
        if source.engine_id == self._config.engine_id:
            self.pins.release(source.request_id)
        elif self.puller is not None:
            self.puller.release(source)

    def _publish(self, sequence: TokenSequence) -> None:
        """Make the sequence's newly completed blocks findable."""
        full = sequence.computed // self.pool.block_tokens
        if full > sequence.published:
            extend_keys(
                sequence.keys, sequence.root, sequence.tokens, self.pool.block_tokens, sequence.computed
            )
            for index in range(sequence.published, full):
                self.pool.publish(sequence.blocks[index], sequence.keys[index])
            sequence.published = full

"""A simulated instance: steps in virtual time."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappush
from typing import Final, Protocol

from tidegate.dataplane.batcher import Batcher
from tidegate.dataplane.events import EventKind, EventQueue
from tidegate.dataplane.replica import Replica
from tidegate.dataplane.sequence import DECODING, PAUSED, READY, WAITING, Pin, SimSequence
from tidegate.dataplane.stretch import Stretch
from tidegate.policies.chunks import ChunkBudget
from tidegate.policies.order import PATIENCE_S, WaitingQueue

NEVER: Final = math.inf
_STEP_END: Final = EventKind.STEP_END


class Listener(Protocol):
    """Whoever the instance answers to.

    Calls come in the order in which things happen, but those of ``stepped`` and ``token`` come late where the
    instance leaps: at the next ``report``, or at the stretch's end. Without leap they come with every step.
    """

    def stepped(self, instance: int, count: int, now: float) -> None:
        """Every decode in step got ``count`` tokens, the last one at ``now``."""
        ...

    def token(self, sequence: SimSequence, now: float) -> None:
        """The sequence got a token on its own: the first of its leg, or the first after it left the batch.

        From then on it is in step, until it is preempted, paused, ended or aborted.
        """
        ...

    def preempted(self, sequence: SimSequence) -> None:
        """The sequence lost its KV and waits to compute it again."""
        ...

    def pull(self, sequence: SimSequence, instance: int, now: float) -> None:
        """The sequence was admitted and its KV is to be brought here."""
        ...

    def paused(self, sequence: SimSequence, now: float) -> None:
        """The decode is out of its batch for the last stage of a migration; ``token`` tells of its return."""
        ...

    def migrated(
        self, sequence: SimSequence, src: int, dst: int, moved_bytes: int, committed: bool, now: float
    ) -> None:
        """A migration is over: the decode goes on at ``dst`` if ``committed``, else stays as it is.

        One that its sequence's preemption or end cut short is told of after that.
        """
        ...

    def ended(self, sequence: SimSequence, pin: Pin | None, now: float) -> None:
        """The leg has its last token."""
        ...


class SimInstance:
    """Runs a ``Batcher``'s plans: one event per step, or per stretch of steps with ``leap``.

    Leaping changes nothing that can be observed, not even at the very time of a step's end that was leapt
    over: that step has been reported by then, and what comes finds the instance between two steps, the next
    of which is yet to be planned (``_between``). What frees or takes blocks books the steps before it first.

    What a leg goes through on its way is written out, ``Stretch.end_s`` and the like: a simulation spends its
    time here.

    ``left`` is called with each sequence that a migration copies and that went out of the batch. In
    ``next_report_s[slot]`` the instance says when it has steps to report.
    """

    def __init__(
        self,
        index: int,
        replica: Replica,
        queue: WaitingQueue[SimSequence],
        events: EventQueue,
        listener: Listener,
        next_report_s: list[float],
        slot: int,
        left: Callable[[SimSequence, float], None],
        *,
        leap: bool,
        chunks: ChunkBudget,
    ) -> None:
        self.index = index
        self.replica = replica
        self.batcher = Batcher(index, replica, queue, chunks)
        self.version = 0
        self._next_report_s = next_report_s
        self._slot = slot
        self._events = events
        self._heap: Final = events.heap
        self._listener = listener
        self._leap = leap
        self._stretch = Stretch(replica.profile, replica.engine.host_s)
        self._busy = False
        self._reported = 0
        self._starting = False
        self._leaving: list[SimSequence] = []
        self._left: list[SimSequence] = []
        self._attend = left
        self._stalled_at = -1

    # what reaches the instance

    def submit(self, sequence: SimSequence, now: float) -> None:
        """Queue a leg."""
        self.batcher.queue(sequence, now)
        if self._busy:
            self._changed(now)
        elif not self._starting:
            self._starting = True
            self._events.start(self.index, now)

    def loaded(self, sequence: SimSequence, tokens: int, now: float) -> None:
        """Run a leg whose KV has arrived."""
        if sequence.shared is not None:
            self.settle(now)
        self.batcher.loaded(sequence, tokens)
        self._changed(now)

    def unpin(self, pin: Pin, now: float) -> None:
        """Free the blocks of a pin."""
        stretch = self._stretch
        if self._busy and stretch.planned > stretch.done + 1:
            self.settle(now)
        self.batcher.unpin(pin)
        if self._busy or self.batcher.waiting:  # else there is nothing to begin
            self._changed(now)

    def abort(self, sequence: SimSequence, now: float) -> None:
        """Take out a sequence, with its tokens reported; the step that runs still takes its time."""
        if sequence.state != WAITING:
            self.settle(now)
        self.batcher.discard(sequence, in_step=self._busy)
        self._changed(now)

    def report(self, now: float) -> float:
        """Tell the listener of all steps that ended by ``now``; return when the next one does."""
        if not self._busy:
            return NEVER
        stretch = self._stretch
        done = stretch.done_by(now, self._reported)
        if done > self._reported:
            if self.batcher.newcomers:
                self._report_until(done)
            else:
                end_s = stretch.start_s + done * (stretch.first_s + stretch.half_s * (done - 1))
                self._listener.stepped(self.index, done - self._reported, end_s)
                self._reported = done
        return stretch.start_s + (done + 1) * (stretch.first_s + stretch.half_s * done)

    def blocks_held(self, now: float) -> int:
        """Return how many KV blocks are taken at ``now``, those of steps that are leapt over with them."""
        stretch, blocks = self._stretch, self.batcher.blocks
        if not self._busy or stretch.planned == stretch.done + 1:
            return blocks.total - blocks.free
        done = stretch.done_by(now, self._reported)
        if self._is_between(done, now):
            return self.batcher.blocks_held(done - stretch.done, running=False)
        return self.batcher.blocks_held(min(done, stretch.planned - 1) - stretch.done, running=True)

    # migration

    def decoding(self, request: int) -> SimSequence | None:
        """Return the decode of a request; None when it is not in the batch."""
        return next((each for each in self.batcher.decode.members if each.request == request), None)

    def keep_place(self, now: float) -> bool:
        """Keep a place for a decode that is to come; False when all are taken."""
        self.settle(now)
        batcher = self.batcher
        if len(batcher.running) + batcher.loading >= batcher.max_num_seqs:
            return False
        batcher.loading += 1
        return True

    def reserve(self, count: int, now: float) -> bool:
        """Take blocks for a decode that is to come; False when there is no room."""
        self.settle(now)
        batcher = self.batcher
        if not batcher.blocks.room_for(count, others=bool(batcher.running) or batcher.loading > 1):
            return False
        batcher.blocks.take(count)
        return True

    def free_place(self, blocks: int, now: float) -> None:
        """Give up such a place and its blocks."""
        self.settle(now)
        self.batcher.loading -= 1
        self.batcher.stuck = False
        self.batcher.blocks.give_back(blocks)
        self._changed(now)

    def pause(self, sequence: SimSequence, now: float) -> None:
        """Take a decode out of the batch once the step that runs is over."""
        self._leaving.append(sequence)
        if self._busy:
            self._changed(now)
        else:
            self._let_leave(now)
            self._attend_left(now)

    def stay(self, sequence: SimSequence, now: float) -> None:
        """Let a decode that is paused, or was about to be, go on here; a paused one as the youngest."""
        if sequence.state == PAUSED:
            self.batcher.loading -= 1
            self.batcher.ready(sequence)
            self._changed(now)
        elif sequence in self._leaving:
            self._leaving.remove(sequence)

    def give_up(self, sequence: SimSequence, now: float) -> None:
        """Free what a paused decode held: it went elsewhere."""
        self.settle(now)
        self.batcher.give_up(sequence)
        self._changed(now)

    def arrive(self, sequence: SimSequence, now: float) -> None:
        """Let a decode go on whose KV came with it into the blocks and the place kept for it."""
        self.settle(now)
        batcher = self.batcher
        sequence.on = self.index
        batcher.know(sequence)
        batcher.loaded(sequence, sequence.computed)
        self._changed(now)

    # steps

    def start(self, now: float) -> None:
        """Begin the next step, if there is anything to do."""
        self._starting = False
        events, batcher, stretch = self._events, self.batcher, self._stretch
        events.last_start_s = now
        events.last_started = self.index
        if not batcher.running and not batcher.waiting:
            return
        batcher.plan(now)
        if batcher.preempted:
            for sequence in batcher.preempted:
                self._listener.preempted(sequence)
                if sequence.moving:
                    self._left.append(sequence)
        if batcher.pulls:
            for sequence in batcher.pulls:
                self._listener.pull(sequence, self.index, now)
        if batcher.chunks:
            stretch.price_chunks(batcher.chunks, batcher.decode, now)
        elif batcher.decode.members:
            stretch.price_decodes(batcher.decode, now)
        else:
            self._attend_left(now)
            if self._stalled_at != self.version and self.lacks_blocks(now):
                self._stalled_at = self.version
                self._events.push(now + PATIENCE_S, EventKind.STALL, self.index, self.version)
            return
        self._busy = True
        done = self._reported = stretch.done
        steps = stretch.planned = done + (batcher.most_steps() if self._leap else 1)
        start_s, first_s, half_s = stretch.start_s, stretch.first_s, stretch.half_s
        self._next_report_s[self._slot] = start_s + (done + 1) * (first_s + half_s * done)
        self.version += 1
        end_s = start_s + steps * (first_s + half_s * (steps - 1))
        heappush(self._heap, (end_s, _STEP_END, self.index, self.version))
        if self._left:
            self._attend_left(now)

    def lacks_blocks(self, now: float) -> int:
        """Return how many blocks the head of the queue lacks where only pins are in its way, else 0."""
        batcher = self.batcher
        head = None if self._busy or batcher.running or batcher.loading else batcher.head(now)
        if head is None:
            return 0
        pin, blocks = head.source, batcher.blocks
        own = pin.blocks if pin is not None and not pin.gone and pin.on == self.index else 0
        return max(0, blocks.for_tokens(head.tokens + 1) - own - blocks.free)

    def end(self, version: int, now: float) -> None:
        """Finish the planned steps, unless they were cut short since: tokens, ends, and what follows."""
        if version != self.version:
            return
        stretch, batcher = self._stretch, self.batcher
        decode, steps = batcher.decode, stretch.planned
        if batcher.chunks or steps > stretch.done + 1:
            complete = batcher.commit(steps - stretch.done)
        else:
            decode.ticks += 1  # all that ``commit`` would do
            complete = ()
        if steps > self._reported:
            self._report_until(steps)
        stretch.done = steps
        self._busy = False
        self._starting = True
        self._next_report_s[self._slot] = NEVER
        if decode.ends and decode.ends[0][0] <= decode.ticks:
            for sequence in decode.ended():
                if sequence.state == READY:  # not aborted meanwhile
                    self._end_leg(sequence, now)
        for sequence in complete:
            if sequence.state == READY:
                if sequence.first_token_s is None:
                    sequence.first_token_s = now
                self._listener.token(sequence, now)
            if sequence.state != READY:
                continue
            if sequence.tokens == sequence.last_token:
                self._end_leg(sequence, now)
            else:
                decode.join(sequence)
        if self._leaving:
            self._let_leave(now)
        if self._left:
            self._attend_left(now)
        heap = self._heap
        if self._events.starting or (heap and heap[0][0] <= now):
            self._events.start(self.index, now)
        else:
            self.start(now)  # it is its turn

    def _between(self, done: int, now: float) -> bool:
        """Stop between two steps if ``now``, by which ``done`` are over, is such a time.

        The next one starts once all has been said that happens at this time. No prompt is complete: the step
        that completes one is the last of its stretch.
        """
        if not self._is_between(done, now):
            return False
        stretch = self._stretch
        self.batcher.commit(done - stretch.done)
        if done > self._reported:
            self._report_until(done)
        stretch.done = stretch.planned = done
        self._busy = False
        self._starting = True
        self._next_report_s[self._slot] = NEVER
        self.version += 1
        self._events.start(self.index, now)
        return True

    def _is_between(self, done: int, now: float) -> bool:
        """Tell whether ``now``, by which ``done`` steps are over, is between two steps that are leapt over.

        Not so once it is the turn of instances behind this one to start their steps: it has started its own.
        """
        stretch = self._stretch
        if not stretch.done < done < stretch.planned or stretch.end_s(done) != now:
            return False
        events = self._events
        return events.last_start_s != now or events.last_started <= self.index

    def _end_leg(self, sequence: SimSequence, now: float) -> None:
        if sequence.moving:
            self._left.append(sequence)
        self._listener.ended(sequence, self.batcher.release(sequence, pin=sequence.hand_over), now)

    def _let_leave(self, now: float) -> None:
        leaving, self._leaving = self._leaving, []
        for sequence in leaving:
            if sequence.moving and sequence.state == DECODING:
                self.batcher.pause(sequence)
                self._listener.paused(sequence, now)
                self._left.append(sequence)

    def _attend_left(self, now: float) -> None:
        left, self._left = self._left, []
        for sequence in left:
            self._attend(sequence, now)

    def _report_until(self, done: int) -> None:
        """Report the steps up to ``done`` that were not yet, the first tokens of newcomers apart."""
        stretch, reported = self._stretch, self._reported
        if self.batcher.newcomers:
            reported += 1
            first_s = stretch.end_s(reported)
            self._listener.stepped(self.index, 1, first_s)
            newcomers, self.batcher.newcomers = self.batcher.newcomers, []
            for sequence in newcomers:
                self._listener.token(sequence, first_s)
        if done > reported:
            end_s = stretch.start_s + done * (stretch.first_s + stretch.half_s * (done - 1))
            self._listener.stepped(self.index, done - reported, end_s)
        self._reported = done

    def settle(self, now: float) -> None:
        """Book the steps that are over, so that nothing is planned beyond the step that runs."""
        stretch = self._stretch
        if not self._busy or stretch.planned == stretch.done + 1:
            return
        done = stretch.done_by(now, self._reported)
        if self._between(done, now):
            return
        done = min(done, stretch.planned - 1)
        if done > stretch.done:
            if done > self._reported:
                self._report_until(done)
            self.batcher.commit(done - stretch.done)
            self.batcher.take_next()
            stretch.done = done
        if stretch.planned > done + 1:
            stretch.planned = done + 1
            self.version += 1
            heappush(self._heap, (stretch.end_s(done + 1), _STEP_END, self.index, self.version))
        self._next_report_s[self._slot] = stretch.end_s(done + 1)

    def _changed(self, now: float) -> None:
        """Plan anew as soon as the step that runs is over."""
        if self._busy:
            stretch = self._stretch
            if stretch.planned > stretch.done + 1:
                done = stretch.done_by(now, self._reported)
                if done > stretch.done and self._between(done, now):
                    return
                steps = done + 1
                if steps < stretch.planned:
                    stretch.planned = steps
                    self.version += 1
                    end_s = stretch.start_s + steps * (stretch.first_s + stretch.half_s * done)
                    heappush(self._heap, (end_s, _STEP_END, self.index, self.version))
        elif not self._starting:
            self._starting = True
            self._events.start(self.index, now)

"""Decodes that leave while they run: the source's side of a migration in stages.

    running -> running   a stage was asked for: its full blocks are copied from beside it
    running -> paused    little was left: it is out of the batch, its blocks are pinned, its state is told
    paused  -> gone      the destination committed: it owns the decode, and the blocks here are freed
    paused  -> running   the destination stays away, or says so: as if nothing had been

Until it pauses a decode holds nothing for its migration, so a destination that dies leaves nothing behind.
What a stage copied of a decode that was preempted meanwhile is void, and the next question is refused for it.
"""

from __future__ import annotations

import math

from tidegate.core.clock import Clock
from tidegate.core.migration import is_last_stage
from tidegate.engines.embedded.scheduler import BatchScheduler
from tidegate.engines.embedded.sequence import TokenSequence
from tidegate.engines.embedded.stages import NotMovable, StageAnswer, StageQuestion

PAUSE_S = 1.0
"""A paused decode goes on here when its destination has not committed by then (ours)."""


class Departures:
    """The paused decodes of an engine. Only the compute thread may use it, but for ``commit``."""

    def __init__(self, scheduler: BatchScheduler, clock: Clock) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._paused: dict[str, tuple[TokenSequence, float]] = {}

    @property
    def next_deadline_s(self) -> float:
        """When the next paused decode goes on here, on the clock; inf without any."""
        return min((deadline_s for _, deadline_s in self._paused.values()), default=math.inf)

    def answer(self, sequence: TokenSequence | None, question: StageQuestion) -> StageAnswer:
        """Say what the destination is to copy next, and pause the decode if that is the last of it."""
        if sequence is None or sequence.pending != 1 or sequence not in self._scheduler.running:
            raise NotMovable("the request does not decode here")
        if question.epoch not in (None, sequence.preemptions):
            raise NotMovable("the decode was preempted meanwhile")
        tokens, blocks, block_tokens = sequence.tokens, sequence.blocks, self._scheduler.pool.block_tokens
        begun = sequence.request.generated + sequence.new_tokens
        if question.tokens > len(tokens) or begun == 0:
            raise NotMovable("the destination's tokens are not the decode's")
        left = sequence.computed - question.blocks * block_tokens
        if not is_last_stage(left, question.stages, block_tokens):
            full = min(sequence.computed // block_tokens, question.room)
            return StageAnswer(
                tokens[question.tokens :], blocks[question.blocks : full], sequence.preemptions
            )
        used = -(-sequence.computed // block_tokens)
        if used > question.room:
            raise NotMovable(f"the decode has outgrown the {question.room} blocks that wait for it")
        self._pause(sequence)
        last = blocks[question.blocks : used]
        return StageAnswer(tokens[question.tokens :], last, sequence.preemptions, sequence.state())

    def commit(self, request_id: str) -> TokenSequence | None:
        """Give a paused decode up; None, from any thread, when it is not paused any more."""
        sequence, _ = self._paused.get(request_id, (None, 0.0))
        return sequence if sequence and self._scheduler.pins.release(_pin_id(request_id)) else None

    def stay(self, request_id: str) -> None:
        """Have a decode go on here unless it was given up."""
        if request_id in self._paused and self._take_back(request_id):
            sequence, _ = self._paused.pop(request_id)
            self._scheduler.running.append(sequence)

    def settle(self) -> list[TokenSequence]:
        """Have decodes go on whose destinations are late; return those that were given up since."""
        now, gone = self._clock.now(), []
        for request_id, (sequence, deadline_s) in list(self._paused.items()):
            if not self._scheduler.pins.pinned(_pin_id(request_id)):
                del self._paused[request_id]
                sequence.take_blocks()
                gone.append(sequence)
            elif deadline_s <= now:
                self.stay(request_id)
        return gone

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._paused

    def end(self, request_id: str) -> bool:
        """Free the blocks of a paused decode that is ended here; False when it was given up before."""
        if not self._take_back(request_id):
            return False
        sequence, _ = self._paused.pop(request_id)
        self._scheduler.pool.release(sequence.take_blocks())
        return True

    def _pause(self, sequence: TokenSequence) -> None:
        request_id = sequence.request.id
        self._scheduler.running.remove(sequence)
        self._scheduler.pins.pin(_pin_id(request_id), sequence.blocks, sequence.computed, lease_s=math.inf)
        self._paused[request_id] = sequence, self._clock.now() + PAUSE_S

    def _take_back(self, request_id: str) -> bool:
        return self._scheduler.pins.take(_pin_id(request_id)) is not None


def _pin_id(request_id: str) -> str:
    """Return a name that no request can have, for only a commit may end such a pin."""
    return f"\0{request_id}"

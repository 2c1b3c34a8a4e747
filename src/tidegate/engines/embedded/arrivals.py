"""A decode that comes here while it runs elsewhere: the destination's side of a migration in stages.

The compute thread has reserved a place and blocks before the source hears of it. A transfer thread then asks
for one stage after the other and copies; the ids that come with each go into the leg's text and cache keys at
once, so that what is left to do while the decode is paused does not grow with its length. Whatever fails
before the commit, the source goes on, at the latest when the connection ends, and what was reserved here is
freed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tidegate.core.migration import LAST_STAGE_BLOCKS
from tidegate.engines.embedded.kv_pull import Done, PeerLink, PullRefused
from tidegate.engines.embedded.sequence import TokenSequence
from tidegate.engines.embedded.stages import StageAnswer, StageQuestion
from tidegate.engines.seam import RunningLeg
from tidegate.protocol.chunks import MovedDecode

AHEAD_BLOCKS = LAST_STAGE_BLOCKS + 2
"""Reserved beyond what is known of the decode, for what it generates until it is asked again (ours)."""


class Takeover:
    """The transfer job that brings one decode here: a ``TransferJob``.

    ``sequence`` has blocks reserved, the first of them filled from the prefix cache. ``more`` reserves blocks
    for so many tokens in all, waiting for the compute thread, and ``wanted`` tells whether the leg still is.
    """

    def __init__(
        self,
        sequence: TokenSequence,
        follows: RunningLeg,
        block_tokens: int,
        more: Callable[[int], bool],
        wanted: Callable[[], bool],
        done: Done,
    ) -> None:
        self.owner = follows.engine_id
        self.done = done
        self.submitted_s = time.monotonic()
        self._sequence = sequence
        self._source_id = follows.request_id
        self._block_tokens = block_tokens
        self._more = more
        self._wanted = wanted
        self._blocks = sequence.cached_tokens // block_tokens
        self._stages = 0
        self._moved_bytes = 0
        self._answer: StageAnswer | None = None

    def open(self, link: PeerLink) -> None:
        """See ``TransferJob.open``."""
        self._ask(link)

    def carry_out(self, link: PeerLink) -> int:
        """See ``TransferJob.carry_out``: copy stages until the decode is here."""
        while True:
            answer = self._answer
            assert answer is not None, "a stage was asked for"
            self._take(link, answer)
            if answer.state is not None:
                self._commit(link, answer)
                return self._moved_bytes
            if not self._more(expected_tokens(self._sequence, self._block_tokens)):
                raise PullRefused("no room for what the decode has grown by")
            self._ask(link)

    def _ask(self, link: PeerLink) -> None:
        if not self._wanted():
            raise PullRefused("the leg has ended")
        sequence = self._sequence
        epoch = None if self._answer is None else self._answer.epoch
        room = len(sequence.blocks)
        asked = (self._source_id, len(sequence.tokens), self._blocks, room, self._stages)
        self._answer = link.stage(self.owner, StageQuestion(*asked, epoch))

    def _take(self, link: PeerLink, answer: StageAnswer) -> None:
        sequence, count = self._sequence, len(answer.block_ids)
        ours = sequence.blocks[self._blocks : self._blocks + count]
        self._moved_bytes += link.copy(answer.block_ids, ours)
        sequence.follow(answer.token_ids, self._block_tokens)
        self._blocks += count
        self._stages += 1

    def _commit(self, link: PeerLink, answer: StageAnswer) -> None:
        assert answer.state is not None
        sequence = self._sequence
        if not self._wanted():
            link.stay(self._source_id)
            raise PullRefused("the leg has ended")
        sequence.restore(answer.state)
        sequence.moved = MovedDecode(sequence.output_position, self._stages, self._moved_bytes)
        if not link.commit(self._source_id):
            raise PullRefused("the decode went on at its source")


def expected_tokens(sequence: TokenSequence, block_tokens: int) -> int:
    """Return for how many tokens blocks are to be reserved before the source is asked again."""
    return len(sequence.tokens) + AHEAD_BLOCKS * block_tokens

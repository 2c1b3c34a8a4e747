"""The places and blocks of decodes that migrate from an instance or to it."""

from __future__ import annotations

from tidegate.dataplane.batcher import Batcher
from tidegate.dataplane.sequence import PAUSED, SimSequence


class MovingDecodes:
    """What a migration does to the ``Batcher`` at either end."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher

    def decoding(self, request: int) -> SimSequence | None:
        """Return the decode of a request; None when it is not in the batch."""
        return next((each for each in self._batcher.decode.members if each.request == request), None)

    def keep_place(self) -> bool:
        """Keep a place for a decode that is to come; False when all are taken."""
        batcher = self._batcher
        if len(batcher.running) + batcher.loading >= batcher.max_num_seqs:
            return False
        batcher.loading += 1
        return True

    def free_place(self, blocks: int) -> None:
        """Give up such a place and the blocks reserved with it."""
        self._batcher.loading -= 1
        self._batcher.stuck = False
        self._batcher.blocks.give_back(blocks)

    def reserve(self, count: int) -> bool:
        """Take blocks for a decode that is to come; False when there is no room."""
        batcher = self._batcher
        if not batcher.blocks.room_for(count, others=bool(batcher.running) or batcher.loading > 1):
            return False
        batcher.blocks.take(count)
        return True

    def pause(self, sequence: SimSequence) -> None:
        """Take a decode out of the batch, with its blocks and its place."""
        batcher = self._batcher
        batcher.decode.leave(sequence)
        del batcher.running[sequence]
        if sequence in batcher.newcomers:
            batcher.newcomers.remove(sequence)
        sequence.state = PAUSED
        batcher.loading += 1

    def resume(self, sequence: SimSequence) -> None:
        """Let a paused decode go on, as the youngest."""
        self._batcher.loading -= 1
        self._batcher.ready(sequence)

    def arrive(self, sequence: SimSequence) -> None:
        """Let a decode go on whose KV came with it into the blocks and the place kept for it."""
        batcher = self._batcher
        batcher.loading -= 1
        sequence.on = batcher.index
        batcher.know(sequence)
        if sequence.shared is not None:
            batcher.blocks.cache.publish(sequence.shared, sequence.computed)
        batcher.ready(sequence)

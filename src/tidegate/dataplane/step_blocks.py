"""The blocks that equal steps of one plan take."""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.dataplane.blocks import Blocks
from tidegate.dataplane.decode_batch import DecodeBatch
from tidegate.dataplane.sequence import SimSequence


class StepBlocks:
    """Counts and takes them: a token per decode and step, and for each prompt in ``chunks`` its ``chunk``."""

    def __init__(self, blocks: Blocks, decode: DecodeBatch) -> None:
        self._blocks = blocks
        self._decode = decode

    def take_for(self, chunks: Sequence[SimSequence], steps: int, after: int) -> None:
        """Take the blocks of the ``steps`` steps of the plan that follow its next ``after`` ones."""
        needed = self._decode.blocks_for(steps, after) if self._decode.members else 0
        for sequence in chunks:
            blocks = self._blocks.for_tokens(sequence.computed + (after + steps) * sequence.chunk)
            needed += blocks - sequence.blocks
            sequence.blocks = blocks
        if needed:
            self._blocks.take(needed)

    def needed_by(self, chunks: Sequence[SimSequence], steps: int) -> int:
        """Return how many blocks the first ``steps`` steps of the plan take beyond those of the first."""
        needed = self._decode.blocks_for(steps - 1, after=1)
        for sequence in chunks:
            needed += self._blocks.for_tokens(sequence.computed + steps * sequence.chunk) - sequence.blocks
        return needed

    def most_that_fit(self, chunks: Sequence[SimSequence], most: int) -> int:
        """Return how many of ``most`` steps find their blocks; the first one has."""
        size, free = self._blocks.block_tokens, self._blocks.free
        rough = 1 + most * chunks[0].chunk // size if chunks else 0
        if len(self._decode.members) * (1 + most // size) + rough <= free:
            return most
        low, high = 1, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.needed_by(chunks, middle) <= free:
                low = middle
            else:
                high = middle - 1
        return low

"""Paged KV of a simulated instance: how many blocks are taken."""

from __future__ import annotations

from tidegate.core.errors import InternalError


class Blocks:
    """Counts blocks. ``reserve`` of them stay free at admission while others run."""

    def __init__(self, capacity_tokens: int, block_tokens: int, reserve: float) -> None:
        self.block_tokens = block_tokens
        self.total = capacity_tokens // block_tokens
        self.free = self.total
        self.most_used = 0
        self._reserve = int(reserve * self.total)

    def for_tokens(self, tokens: int) -> int:
        """Return how many blocks hold ``tokens``."""
        return -(-tokens // self.block_tokens)

    def room_for(self, count: int, *, others: bool) -> bool:
        """Tell whether a newcomer may take ``count`` blocks; ``others`` run beside it."""
        return self.free - count >= (self._reserve if others else 0)

    def take(self, count: int) -> int:
        """Take ``count`` blocks and return that number. Raises InternalError when they are not there."""
        self.free -= count
        if self.free < 0:
            raise InternalError(f"{-self.free} KV blocks more than there are were taken")
        used = self.total - self.free
        if used > self.most_used:
            self.most_used = used
        return count

    def give_back(self, count: int) -> None:
        """Free ``count`` blocks."""
        self.free += count
        if self.free > self.total:
            raise InternalError("more KV blocks were freed than taken")

"""Paged KV of a simulated instance: how many blocks are taken, and which can be found again."""

from __future__ import annotations

from tidegate.core.errors import InternalError
from tidegate.dataplane.prefix import PrefixCache, Shared


class Blocks:
    """Counts blocks. ``free`` ones are not held; some of them may still cache a prefix (``cache``).

    ``reserve`` of them stay free at admission while others run.
    """

    def __init__(self, capacity_tokens: int, block_tokens: int, reserve: float) -> None:
        self.block_tokens = block_tokens
        self.total = capacity_tokens // block_tokens
        self.free = self.total
        self.most_used = 0
        self.cache = PrefixCache()
        self._least_free = self.total
        self.reserve = int(reserve * self.total)

    def for_tokens(self, tokens: int) -> int:
        """Return how many blocks hold ``tokens``."""
        return -(-tokens // self.block_tokens)

    def room_for(self, count: int, *, others: bool) -> bool:
        """Tell whether a newcomer may take ``count`` blocks; ``others`` run beside it."""
        return self.free - count >= (self.reserve if others else 0)

    def find_room(
        self, shared: Shared | None, tokens: int, findable: int, others_need: int, *, others: bool
    ) -> int:
        """Return how many units of the first ``findable`` tokens are here; -1 if ``tokens`` find no room."""
        need, units = -(-tokens // self.block_tokens), 0
        if shared is not None:
            units = self.cache.hits(shared, findable)
            need += self.cache.idle_among(shared, units) - units * shared.unit_blocks
        return units if self.room_for(need + others_need, others=others) else -1

    def take(self, count: int) -> None:
        """Hold ``count`` free blocks. Raises InternalError when there are not as many."""
        free = self.free = self.free - count
        if free < self._least_free:
            if free < 0:
                raise InternalError(f"{-free} KV blocks more than there are were taken")
            self._least_free = free
            self.most_used = self.total - free
        if free < self.cache.idle_blocks:
            self.cache.evict(free)

    def give_back(self, count: int) -> None:
        """Free ``count`` blocks. Raises InternalError when more are free then than there are."""
        self.free += count
        if self.free > self.total:
            raise InternalError("more KV blocks were freed than taken")

    def hold_prefix(self, shared: Shared, count: int) -> None:
        """Hold the first ``count`` units, which the cache has."""
        idle = self.cache.idle_among(shared, count)
        self.cache.hold(shared, count)
        self.take(idle)

    def release(self, count: int, shared: Shared | None) -> None:
        """Free ``count`` blocks, those of the units that ``shared`` holds among them."""
        if shared is not None:
            count -= shared.held_blocks
            count += self.cache.let_go(shared)
        self.give_back(count)

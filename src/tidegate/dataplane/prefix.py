"""Prefix reuse: which hash blocks of a sequence have KV in an instance, and who holds them.

A unit is the smallest run of tokens that is whole in hash blocks and in physical blocks: one hash block where
that is a multiple of the physical one, else their least common multiple. A unit enters the cache once its
tokens are computed, or have arrived; those of an answer when its leg ends: nobody can ask for them before.
While someone holds a unit it stays; then it waits for a reader until its blocks are needed, and the one
freed longest ago goes first; of one sequence the last units go first. Those are vLLM's rules. Ours: a unit is
evicted as a whole, and where two sequences compute the same unit at one time the second keeps its own to
itself. The id of a block names all tokens before it, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Unit:
    """``blocks`` blocks of KV that ``holders`` sequences and pins use."""

    key: int
    blocks: int
    holders: int = 1


class Shared:
    """The units of one sequence.

    ``keys`` are the ids of the units' last blocks; ``held`` are those that it holds in the cache of its
    instance. The first ``published`` need no more entering.
    """

    __slots__ = ("held", "keys", "published", "unit_blocks", "unit_tokens")

    def __init__(self, block_ids: Sequence[int], hash_block_tokens: int, block_tokens: int) -> None:
        self.unit_tokens = math.lcm(hash_block_tokens, block_tokens)
        self.unit_blocks = self.unit_tokens // block_tokens
        per_unit = self.unit_tokens // hash_block_tokens
        self.keys = block_ids[per_unit - 1 :: per_unit]
        self.held: list[Unit] = []
        self.published = 0

    def named_by(self, further: Shared | None) -> Shared:
        """Take the keys of a leg that goes on from these units, and may know what comes behind them."""
        self.keys = self.keys if further is None else further.keys
        return self

    @property
    def held_blocks(self) -> int:
        """Blocks of the units it holds."""
        return len(self.held) * self.unit_blocks


class PrefixCache:
    """The units of one instance. ``idle_blocks`` are those of units that nobody holds."""

    def __init__(self) -> None:
        self.idle_blocks = 0
        self._units: dict[int, Unit] = {}
        self._idle: dict[int, Unit] = {}

    def hits(self, shared: Shared, tokens: int) -> int:
        """Return how many units from the first on are here and lie within the first ``tokens`` tokens."""
        most = min(len(shared.keys), tokens // shared.unit_tokens)
        for at in range(most):
            unit = self._units.get(shared.keys[at])
            if unit is None or unit.blocks != shared.unit_blocks:
                return at
        return most

    def idle_among(self, shared: Shared, count: int) -> int:
        """Return how many blocks of the first ``count`` units nobody holds."""
        return sum(shared.unit_blocks for key in shared.keys[:count] if key in self._idle)

    def hold(self, shared: Shared, count: int) -> None:
        """Hold the first ``count`` units, which are here."""
        for key in shared.keys[:count]:
            unit = self._units[key]
            if unit.holders == 0:
                del self._idle[key]
                self.idle_blocks -= unit.blocks
            unit.holders += 1
            shared.held.append(unit)
        shared.published = count

    def publish(self, shared: Shared, computed: int) -> None:
        """Enter the units within the first ``computed`` tokens, which the sequence has in its own blocks."""
        whole = min(len(shared.keys), computed // shared.unit_tokens)
        for at in range(shared.published, whole):
            key = shared.keys[at]
            if key not in self._units:
                unit = Unit(key, shared.unit_blocks)
                self._units[key] = unit
                shared.held.append(unit)
        if whole > shared.published:
            shared.published = whole

    def let_go(self, shared: Shared) -> int:
        """Hold no unit any more; return how many blocks nobody holds now."""
        freed = 0
        for unit in reversed(shared.held):
            unit.holders -= 1
            if unit.holders == 0:
                self._idle[unit.key] = unit
                freed += unit.blocks
        self.idle_blocks += freed
        shared.held.clear()
        shared.published = 0
        return freed

    def evict(self, most_idle_blocks: int) -> None:
        """Forget idle units, the longest idle first, until they have at most that many blocks."""
        while self.idle_blocks > most_idle_blocks:
            key = next(iter(self._idle))
            self.idle_blocks -= self._idle.pop(key).blocks
            del self._units[key]

"""The sequences that get one token per step: their sums over any number of steps, in closed form."""

from __future__ import annotations

import heapq

from tidegate.dataplane.sequence import Sequence


class DecodeBatch:
    """Members advance together, so a step costs the same whatever their number.

    A member's KV length is its ``base`` plus ``ticks``. Before a step that starts with a full last block it
    needs one more: ``blocks_for`` counts those by the remainders of the bases. ``context`` is the sum of
    the members' lengths with the token that the next step writes. ``changes`` counts who came and went.
    """

    def __init__(self, block_tokens: int) -> None:
        self.ticks = 0
        self.members: dict[Sequence, None] = {}
        self._block_tokens = block_tokens
        self._base_sum = 0
        self._remainders = [0] * block_tokens
        self._ends: list[tuple[int, int, Sequence]] = []
        self.changes = 0

    def __len__(self) -> int:
        return len(self.members)

    @property
    def context(self) -> int:
        """Resident tokens of the next step."""
        return self._base_sum + (self.ticks + 1) * len(self.members)

    def join(self, sequence: Sequence) -> None:
        """Add a sequence with one pending token."""
        sequence.base = sequence.computed - self.ticks
        sequence.end_tick = sequence.last_token - 1 - sequence.base
        self.members[sequence] = None
        self._base_sum += sequence.base
        self._remainders[sequence.base % self._block_tokens] += 1
        self.changes += 1
        heapq.heappush(self._ends, (sequence.end_tick, self.changes, sequence))

    def leave(self, sequence: Sequence) -> None:
        """Take a member out; its lengths and blocks become its own again."""
        del self.members[sequence]
        self.changes += 1
        self._base_sum -= sequence.base
        self._remainders[sequence.base % self._block_tokens] -= 1
        sequence.computed = sequence.base + self.ticks
        sequence.tokens = sequence.computed + 1

    def blocks_for(self, steps: int, after: int = 0) -> int:
        """Return how many blocks the ``steps`` steps that follow the next ``after`` ones must add."""
        size, tick = self._block_tokens, self.ticks + after
        if steps == 1:
            return self._remainders[-tick % size]
        whole, rest = divmod(steps, size)
        partial = 0
        for i in range(rest):
            partial += self._remainders[-(tick + i) % size]
        return whole * len(self.members) + partial

    def steps_to_end(self) -> int:
        """Return after how many steps the first of the members, of which there are some, ends."""
        ends, members = self._ends, self.members
        while True:
            end_tick, _, sequence = ends[0]
            if sequence.end_tick == end_tick and sequence in members:
                return end_tick - self.ticks
            heapq.heappop(ends)  # it left, and may have joined again

    def ended(self) -> list[Sequence]:
        """Take out the members that have their last token, in the order in which they joined."""
        gone: list[Sequence] = []
        if not self._ends or self._ends[0][0] > self.ticks:
            return gone
        while self.members and self.steps_to_end() == 0:
            gone.append(heapq.heappop(self._ends)[2])
            self.leave(gone[-1])
        return gone

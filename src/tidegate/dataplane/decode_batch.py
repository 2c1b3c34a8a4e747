"""The sequences that get one token per step: their sums over any number of steps, in closed form."""

from __future__ import annotations

from heapq import heappop, heappush
from math import inf

from tidegate.dataplane.sequence import DECODING, READY, SimSequence
from tidegate.policies.dues import TokenDues


class DecodeBatch:
    """Members advance together, so a step costs the same whatever their number.

    A member's KV length is its ``base`` plus ``ticks``. Before a step that starts with a full last block it
    needs one more: ``blocks_for`` counts those by the ``remainders`` of the bases. ``base_sum`` is the sum of
    the bases, and ``changes`` counts who came and went.
    ``ends`` is a heap of (tick, turn, member) by the ticks at which members end, those of one tick in the
    order in which they joined; who left may still be there. ``dues``, where somebody asks for them, are those
    of the members that attain their targets so far.
    """

    def __init__(self, block_tokens: int, dues: TokenDues | None = None) -> None:
        self.ticks = 0
        self.dues = dues
        self.members: dict[SimSequence, None] = {}
        self._block_tokens = block_tokens
        self.base_sum = 0
        self.remainders = [0] * block_tokens
        self.ends: list[tuple[int, int, SimSequence]] = []
        self.changes = 0

    def join(self, sequence: SimSequence) -> None:
        """Have a sequence with one pending token take part from the next step on."""
        sequence.state = DECODING
        base = sequence.base = sequence.computed - self.ticks
        end_tick = sequence.last_token - 1 - base
        self.members[sequence] = None
        self.base_sum += base
        self.remainders[base % self._block_tokens] += 1
        self.changes += 1
        sequence.turn = self.changes
        heappush(self.ends, (end_tick, self.changes, sequence))
        if self.dues is not None and sequence.attains:
            self._count_due(sequence, self.dues)

    def leave(self, sequence: SimSequence) -> None:
        """Take a member out; its lengths and blocks become its own again."""
        base = sequence.base
        del self.members[sequence]
        self.changes += 1
        self.base_sum -= base
        self.remainders[base % self._block_tokens] -= 1
        computed = sequence.computed = base + self.ticks
        sequence.tokens = computed + 1
        if sequence.due_key is not None:
            assert self.dues is not None
            self.dues.leave(sequence.due_key)
            sequence.due_key = None

    def _count_due(self, sequence: SimSequence, dues: TokenDues) -> None:
        ticket, first_s = sequence.ticket, sequence.first_token_s
        assert ticket is not None and first_s is not None
        if ticket.tpot_s < inf:
            dues.steps = self.ticks
            number = sequence.generated + sequence.computed + 1 - sequence.prompt
            sequence.due_key = dues.join(first_s, ticket.tpot_s, number)

    def blocks_for(self, steps: int, after: int = 0) -> int:
        """Return how many blocks the ``steps`` steps that follow the next ``after`` ones must add."""
        size, remainders = self._block_tokens, self.remainders
        last = -(self.ticks + after) % size  # of the first of the steps; each further one is one less
        if steps == 1:
            return remainders[last]
        whole, rest = divmod(steps, size)
        first = last + 1 - rest
        if first >= 0:
            partial = sum(remainders[first : last + 1])
        else:
            partial = sum(remainders[: last + 1]) + sum(remainders[first:])
        return whole * len(self.members) + partial

    def steps_to_end(self) -> int:
        """Return after how many steps the first of the members, of which there are some, ends."""
        ends, members = self.ends, self.members
        while True:
            end_tick, turn, sequence = ends[0]
            if sequence.turn == turn and sequence in members:
                return end_tick - self.ticks
            heappop(ends)  # it left, and may have joined again, perhaps to end at the same tick

    def ended(self) -> list[SimSequence]:
        """Take out the members that have their last token, in the order in which they joined.

        They still hold their blocks.
        """
        gone: list[SimSequence] = []
        while self.members and self.steps_to_end() == 0:
            sequence = heappop(self.ends)[2]
            self.leave(sequence)
            sequence.state = READY
            gone.append(sequence)
        return gone

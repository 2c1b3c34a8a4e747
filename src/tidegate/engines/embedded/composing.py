"""A step while its tokens are chosen."""

from __future__ import annotations

from math import inf

from tidegate.costs.profile import Profile
from tidegate.engines.embedded.model import Chunk
from tidegate.engines.embedded.sequence import TokenSequence
from tidegate.policies.chunks import ChunkBudget, NextStep
from tidegate.policies.dues import TokenDues


class ComposedStep:
    """Who takes part: ``singles`` with their one pending token, prompts with ``chunks``.

    ``alone``: the ticket of one of these keeps other prompts out of the step. ``steps_since``: as in
    ``NextStep``.
    """

    def __init__(
        self, budget: ChunkBudget, profile: Profile, most_tokens: int, steps_since: int, now: float
    ) -> None:
        self.singles: list[TokenSequence] = []
        self.chunks: list[Chunk] = []
        self.chunk_tokens = 0
        self.alone = False
        self._attention = 0.0
        self._due_s = inf
        self._budget = budget
        self._profile = profile
        self._steps_since = steps_since
        self._most_tokens = most_tokens
        self._now = now
        self._dues: TokenDues | None = None

    @property
    def left(self) -> int:
        """What the engine's limit leaves."""
        return self._most_tokens - len(self.singles) - self.chunk_tokens

    def room(self, cached_tokens: int) -> int:
        """Return how much of a prompt, behind ``cached_tokens``, may join; none where it is not positive."""
        if self._budget.steady:
            return self.left
        return min(self.left, self._budget.tokens(self._step(), cached_tokens))

    @property
    def next_s(self) -> float:
        """When a prompt that joins now begins: behind those in the step, if the budget goes by time."""
        return self._now if self._budget.steady or not self.chunk_tokens else self._step().ends_s

    def _step(self) -> NextStep:
        if self._dues is None:
            self._dues = dues_of(self.singles)
        context = sum([single.computed + 1 for single in self.singles])
        return NextStep(
            self._now,
            len(self.singles),
            context,
            self._dues,
            self._profile.mixed,
            self._profile.step,
            0.0,
            self._most_tokens,
            self._steps_since,
            self.chunk_tokens,
            self._attention,
            self._due_s,
        )

    def add_single(self, sequence: TokenSequence) -> None:
        """Have a sequence with one pending token take part."""
        self.singles.append(sequence)
        self._dues = None

    def add_chunk(self, sequence: TokenSequence, least: int = 0) -> None:
        """Have a prompt take part with as much as there is room for, ``least`` tokens in any case."""
        room = max(least, self.room(sequence.computed))
        if room <= 0:
            return
        ticket = sequence.request.ticket
        bound = None if ticket is None else ticket.chunk_tokens
        count = min(sequence.pending, room, bound or room)
        self.chunks.append(Chunk(sequence, count))
        self.alone = bound is not None
        if self._budget.steady:
            self.chunk_tokens += count
            return
        due_s = inf
        is_first = ticket is not None and ticket.first_token_s is None and sequence.first_token_s is None
        if ticket is not None and is_first and count == sequence.pending:
            due_s = ticket.on_clock(sequence.submitted_s).deadline_s
        step = self._step().with_prompt(count, sequence.computed, due_s)
        self.chunk_tokens, self._attention, self._due_s = step.chunk_tokens, step.attention, step.due_s


def dues_of(decodes: list[TokenSequence]) -> TokenDues:
    """Return the dues of the decodes whose first tokens were in time."""
    dues = TokenDues()
    for sequence in decodes:
        ticket = sequence.request.ticket
        if ticket is None:
            continue
        ticket = ticket.on_clock(sequence.submitted_s)
        first_s = sequence.first_token_s if ticket.first_token_s is None else ticket.first_token_s
        if first_s is not None and first_s <= ticket.deadline_s and ticket.tpot_s < float("inf"):
            dues.join(first_s, ticket.tpot_s, sequence.output_position)
    return dues

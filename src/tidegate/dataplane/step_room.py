"""How much of prompts the step that a simulated instance composes may still carry."""

from __future__ import annotations

from math import inf

from tidegate.dataplane.decode_batch import DecodeBatch
from tidegate.dataplane.replica import Replica
from tidegate.policies.chunks import ChunkBudget, NextStep


class StepRoom:
    """The engine's limit of tokens, and within it what a chunk budget says.

    ``chunk_tokens`` of prompts are in the step. ``steady``: nothing but the limit counts.
    """

    def __init__(self, budget: ChunkBudget, replica: Replica, decode: DecodeBatch) -> None:
        self.steady = budget.steady
        self.chunk_tokens = 0
        self._attention = 0.0
        self._now = 0.0
        self._due_s = inf
        self._most_tokens = replica.engine.max_batch_tokens
        self._host_s = replica.engine.host_s
        self._cost = replica.profile.mixed
        self._decode_cost = replica.profile.step
        self._last_ticks = 0
        self._budget = budget
        self._decode = decode

    def begin(self, now: float) -> None:
        """Begin with an empty step."""
        self._now, self.chunk_tokens, self._attention, self._due_s = now, 0, 0.0, inf

    @property
    def left(self) -> int:
        """What the engine's limit leaves."""
        return self._most_tokens - len(self._decode.members) - self.chunk_tokens

    def for_prompt(self, cached_tokens: int) -> int:
        """Return how much of a prompt, behind ``cached_tokens``, may join; none where it is not positive."""
        return self.left if self.steady else min(self.left, self._budget.tokens(self._step(), cached_tokens))

    @property
    def next_s(self) -> float:
        """When a prompt that joins now begins: behind those in the step, if the budget goes by time."""
        return self._now if self.steady or not self.chunk_tokens else self._step().ends_s

    def _step(self) -> NextStep:
        decode = self._decode
        decodes, dues = len(decode.members), decode.dues
        assert dues is not None, "a budget that is not steady goes by dues"
        dues.steps = decode.ticks
        context = decode.base_sum + (decode.ticks + 1) * decodes
        return NextStep(
            self._now,
            decodes,
            context,
            dues,
            self._cost,
            self._decode_cost,
            self._host_s,
            self._most_tokens,
            decode.ticks - self._last_ticks,
            self.chunk_tokens,
            self._attention,
            self._due_s,
        )

    def add(self, tokens: int, cached_tokens: int, due_s: float) -> None:
        """Count a chunk, as ``NextStep.with_prompt`` does."""
        if self.steady:
            self.chunk_tokens += tokens
            return
        step = self._step().with_prompt(tokens, cached_tokens, due_s)
        self.chunk_tokens, self._attention, self._due_s = step.chunk_tokens, step.attention, step.due_s
        self._last_ticks = self._decode.ticks + 1

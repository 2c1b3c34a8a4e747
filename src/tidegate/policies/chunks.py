"""How many tokens of prompts a step may carry beside the decodes of its instance."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, sqrt
from typing import NamedTuple, Protocol

from tidegate.costs.forms import MixedCost, StepCost, attention_work
from tidegate.policies.dues import TokenDues
from tidegate.policies.registry import Registry

USUAL_PROMPT, USUAL_ANSWER = 1155.0, 211.0
"""Mean tokens of prompts and answers where nothing is known of the traffic: those of Azure's conversations of
2023 (Splitwise, the preset ``azure-conv``)."""
TILE_TOKENS = 128
"""A matrix product takes whole tiles of so many rows (Sarathi-Serve, on tile quantisation)."""
MOST_TOKENS = 8192
"""The largest budget that is chosen: that of vLLM itself on GPUs of 80 GB."""


class NextStep(NamedTuple):
    """A step as far as it is composed.

    It begins at ``now`` with ``decodes`` that hold ``context_tokens`` once it is over, and carries
    ``chunk_tokens`` of prompts of ``attention`` work. ``dues`` are those of its decodes. ``cost`` says what
    it takes with prompts, ``decode_cost`` without, both beside ``host_s``. ``most_tokens`` is the engine's
    limit of tokens. There were ``steps_since`` the last one with prompts. ``due_s`` is the first deadline of
    prompts that end with the step and are in time so far, infinite without one.
    """

    now: float
    decodes: int
    context_tokens: float
    dues: TokenDues
    cost: MixedCost
    decode_cost: StepCost
    host_s: float
    most_tokens: int
    steps_since: int
    chunk_tokens: int = 0
    attention: float = 0.0
    due_s: float = inf

    @property
    def ends_s(self) -> float:
        """When it ends with what it carries; before that no other prompt begins but in it."""
        tokens = self.decodes + self.chunk_tokens
        return self.now + self.host_s + float(self.cost.seconds(tokens, self.attention, self.context_tokens))

    def with_prompt(self, tokens: int, cached_tokens: int, due_s: float) -> NextStep:
        """Return it with ``tokens`` of a prompt, behind ``cached_tokens``; ``due_s`` is the deadline of a
        prompt that is complete with them, else infinite."""
        attention = self.attention + attention_work(tokens, cached_tokens)
        step = self._replace(chunk_tokens=self.chunk_tokens + tokens, attention=attention)
        return step._replace(due_s=due_s) if due_s < self.due_s and step.ends_s <= due_s else step

    @property
    def room_tokens(self) -> int:
        """What the engine's limit leaves for prompts."""
        return self.most_tokens - self.decodes - self.chunk_tokens


class ChunkBudget(Protocol):
    """Says for each prompt in turn how much of it joins a step."""

    @property
    def name(self) -> str:
        """That in ``CHUNKS``."""
        ...

    @property
    def steady(self) -> bool:
        """Whether only the engine's limit counts, so that equal batches get equal chunks at any time."""
        ...

    def tokens(self, step: NextStep, cached_tokens: int) -> int:
        """Return the most tokens of the next prompt, ``cached_tokens`` of which have KV, that may join
        ``step``; none where it is not positive. At most ``step.room_tokens``."""
        ...


@dataclass(frozen=True, slots=True)
class FixedBudget:
    """The engine's limit, as in vLLM and Sarathi-Serve."""

    name: str = "fixed"
    steady: bool = True

    def tokens(self, step: NextStep, cached_tokens: int) -> int:
        """See ``ChunkBudget.tokens``."""
        return step.room_tokens


@dataclass(frozen=True, slots=True)
class SlackBudget:
    """As much as lets the next token of nearly every decode be in time, and the first ones that come with the
    step.

    - *Dues*: a step may last until the due (``TokenDues``) that ``behind_share`` of the decodes are before.
      Those whose first token was late have none, and those that are more than ``recoverable_tokens`` of
      their targets behind are given up: they bind nothing. What decodes have won is spent on one long chunk.
    - *Chunk*: the cost of a mixed step solved for its length, less ``safety`` for the form's error. A step
      may be longer than without chunk by ``least_share`` of that in any case, so that prompts never starve.
    - *Waiting*: a step with a chunk costs more than one without by more than the chunk's own work, most where
      decodes hold much context. Unless the chunk's work is ``worth`` times as much, the decodes go on alone
      and win time for a longer one, for at most ``patient_steps`` steps.
    - *First tokens*: they come with the step's end, so no prompt joins, or only a part of it, by which one
      that the step completes would miss its deadline.
    - *Prompts alone*: without decodes no further prompt joins once that would save less than ``saved_share``
      of the step's time, for who comes now waits for its end.

    ``safety`` is the median error of the packaged fits; the others were chosen by measurement
    (docs/policies/chunks.md).
    """

    name: str = "slack"
    steady: bool = False
    safety: float = 0.02
    behind_share: float = 0.05
    recoverable_tokens: float = 4.0
    least_share: float = 0.25
    worth: float = 3.0
    patient_steps: int = 16
    saved_share: float = 0.05

    def tokens(self, step: NextStep, cached_tokens: int) -> int:
        """See ``ChunkBudget.tokens``."""
        room = step.room_tokens
        others, work = step.decodes + step.chunk_tokens, step.attention
        if step.due_s < inf:
            first_s = (step.due_s - step.now) * (1.0 - self.safety) - step.host_s
            chunk = longest_chunk(step.cost, first_s, others, step.context_tokens, cached_tokens, work)
            room = min(room, chunk)
        if not step.decodes:
            return 0 if step.chunk_tokens and self._full(step) else room
        bare_s = float(step.cost.seconds(step.decodes, 0.0, step.context_tokens))
        ends_s = step.now + step.host_s + bare_s
        due_s = step.dues.behind_first(self.behind_share, ends_s, self.recoverable_tokens)
        if due_s == inf:
            return room
        left_s = (due_s - step.now) * (1.0 - self.safety) - step.host_s
        if not step.chunk_tokens and step.steps_since < self.patient_steps:
            overhead_s = bare_s - float(step.decode_cost.seconds(step.decodes, step.context_tokens))
            if left_s - bare_s < self.worth * overhead_s:
                return 0
        left_s = max(left_s, (1.0 + self.least_share) * bare_s)
        return min(room, longest_chunk(step.cost, left_s, others, step.context_tokens, cached_tokens, work))

    def _full(self, step: NextStep) -> bool:
        """Tell whether prompts save little by sharing a step that has these already."""
        cost, tokens = step.cost, float(step.chunk_tokens)
        again_s = step.host_s + max(0.0, float(cost.a_s) - float(cost.b_s) * float(cost.n0))
        takes_s = step.host_s + float(cost.seconds(tokens, step.attention, 0.0))
        return tokens >= float(cost.n0) and again_s <= self.saved_share * takes_s


def longest_chunk(
    cost: MixedCost,
    seconds: float,
    others: int,
    context_tokens: float,
    cached_tokens: int,
    attention: float = 0.0,
) -> int:
    """Return how many tokens of a prompt, behind ``cached_tokens``, may join a step so that ``cost`` says at
    most ``seconds``; 0 where none may. The form solved for a chunk's length.

    The step has ``others`` already: decodes, which hold ``context_tokens``, and chunks of ``attention`` work.
    """
    b_s, c_s, n0 = float(cost.b_s), float(cost.c_s), float(cost.n0)
    fixed_s = float(cost.a_s) + c_s * attention + float(cost.d_s) * context_tokens
    left_s = seconds - fixed_s
    if left_s <= b_s * max(0.0, others - n0):
        return 0
    # Within the first n0 tokens of a step only attention costs; beyond them each token costs b as well.
    free = max(0.0, n0 - others)
    linear_s, spent_s = c_s * cached_tokens, 0.0
    if c_s * free * (0.5 * free + cached_tokens) < left_s:
        linear_s += b_s
        spent_s = b_s * (others - n0)  # negative where some of the first n0 are left
    left_s -= spent_s
    if c_s == 0.0:
        return int(min(left_s / linear_s, 2.0**31)) if linear_s > 0 else 2**31
    root = sqrt(linear_s * linear_s + 2.0 * c_s * left_s)
    return int(2.0 * left_s / (linear_s + root))


class StepBudget(NamedTuple):
    """What a step carries at most on an engine that is told so once: ``tokens``, of which ``decodes`` are one
    each where it is full. ``fits``: such a step keeps the target that it was chosen for."""

    tokens: int
    decodes: int
    fits: bool


def budget_for(
    cost: MixedCost, tpot_s: float, prompt_tokens: float = USUAL_PROMPT, answer_tokens: float = USUAL_ANSWER
) -> StepBudget:
    """Return the budget of an engine that has one for all steps: the largest with which a full step lasts no
    longer than ``tpot_s``, beside the decodes that full steps leave resident.

    Where every step is full, an instance takes tokens of prompts and of answers in the ratio in which
    requests have them, on average ``prompt_tokens`` and ``answer_tokens``: that share of a step are decodes.
    Each holds its prompt and half of its answer, and half of the prompt in the step has KV. Whole tiles of
    ``TILE_TOKENS``, at most ``MOST_TOKENS``, and at least a tile, whatever the target.
    """
    held_tokens = prompt_tokens + 0.5 * answer_tokens
    share = answer_tokens / (prompt_tokens + answer_tokens)

    def is_late(tokens: int) -> bool:
        decodes = int(share * tokens)
        chunk = longest_chunk(cost, tpot_s, decodes, decodes * held_tokens, int(0.5 * prompt_tokens))
        return decodes + chunk < tokens

    tiles = bisect_left(range(TILE_TOKENS, MOST_TOKENS + 1, TILE_TOKENS), True, key=is_late)
    tokens = max(tiles, 1) * TILE_TOKENS
    return StepBudget(tokens, int(share * tokens), tiles > 0)


CHUNKS: Registry[Callable[[], ChunkBudget]] = Registry("chunk budget", group="tidegate.chunks")
"""Factories of chunk budgets. A third party names one under the entry point group ``tidegate.chunks``."""

CHUNKS.register("fixed")(FixedBudget)
CHUNKS.register("slack")(SlackBudget)

FIXED = FixedBudget()


def known_budget(chunks: ChunkBudget | None, most_tokens: int) -> int:
    """Return what every step of an engine may have: its limit ``most_tokens``, without ``chunks`` or where
    they keep to it; 0 where each step has a budget of its own."""
    return most_tokens if chunks is None or chunks.steady else 0


def make_chunks(name: str) -> ChunkBudget:
    """Return the chunk budget ``name``. Raises ConfigError for an unknown one, listing those that exist."""
    return CHUNKS.get(name)()

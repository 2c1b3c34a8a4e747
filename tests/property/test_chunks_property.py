"""Chunk budgets: the inverted cost form, and the dues of decodes against those counted one by one."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tidegate.costs.forms import MixedCost, StepCost, attention_work
from tidegate.policies.chunks import (
    MOST_TOKENS,
    TILE_TOKENS,
    NextStep,
    SlackBudget,
    StepBudget,
    budget_for,
    longest_chunk,
)
from tidegate.policies.dues import TokenDues

COSTS = st.builds(
    MixedCost,
    st.floats(0.0, 0.02),
    st.floats(1e-6, 1e-4),
    st.sampled_from([0.0, 1e-10, 8e-10, 1e-8]),
    st.floats(0.0, 1e-7),
    st.sampled_from([0.0, 320.0, 2000.0]),
)
STEPS = st.builds(
    NextStep,
    st.just(0.0),
    st.integers(1, 600),
    st.floats(0.0, 4e5),
    st.builds(TokenDues),
    COSTS,
    st.builds(StepCost, st.floats(0.0, 0.02), st.just(0.0), st.floats(0.0, 5e-8)),
    st.just(0.0),
    st.just(8192),
    st.integers(0, 20),
    st.integers(0, 3000),
    st.floats(0.0, 1e7),
    st.just(math.inf),
)


@given(step=STEPS, seconds=st.floats(0.0, 0.5), cached=st.integers(0, 50_000))
def test_the_longest_chunk_is_in_time_and_one_token_more_is_not(
    step: NextStep, seconds: float, cached: int
) -> None:
    def takes_s(tokens: int) -> float:
        attention = step.attention + attention_work(tokens, cached)
        carried = step.decodes + step.chunk_tokens + tokens
        return float(step.cost.seconds(carried, attention, step.context_tokens))

    longest = longest_chunk(
        step.cost, seconds, step.decodes + step.chunk_tokens, step.context_tokens, cached, step.attention
    )
    assert longest == 0 or takes_s(longest) <= seconds + 1e-9
    assert takes_s(longest + 2) > seconds - 1e-9


@given(
    what=st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 9), st.sampled_from([0.025, 0.05, 0.5])), max_size=60
    ),
    behind=st.sampled_from([0.0, 2.5]),
    share=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_dues_are_those_of_each_decode(
    what: list[tuple[int, int, float]], behind: float, share: float
) -> None:
    dues, decodes, keys, now = TokenDues(), {}, {}, 0.0
    for turn, (kind, number, tpot_s) in enumerate(what):
        if kind < 5:
            decodes[turn] = [now, number, tpot_s]
            keys[turn] = dues.join(now, tpot_s, number)
        elif kind < 7 and decodes:
            oldest = min(decodes)
            del decodes[oldest]
            dues.leave(keys[oldest])
        else:
            now += 0.03 * number
            dues.steps += number
            for each in decodes.values():
                each[1] += number
        due_s = [(first + k * target, behind * target) for first, k, target in decodes.values()]
        for at_s in (now - 1.0, now + 0.0101, now + 1.0):
            bound = sorted(due for due, grace in due_s if due > at_s - grace)[int(share * len(due_s)) :]
            assert math.isclose(dues.behind_first(share, at_s, behind), min(bound, default=math.inf))


@given(step=STEPS, tpot_s=st.floats(0.01, 0.2))
def test_a_slack_budget_keeps_the_next_token_in_time_or_carries_the_least(
    step: NextStep, tpot_s: float
) -> None:
    dues, budget = TokenDues(), SlackBudget()
    dues.join(0.0, tpot_s, 1)
    step = step._replace(dues=dues, chunk_tokens=0, attention=0.0)
    tokens = budget.tokens(step, 0)
    assert tokens <= step.room_tokens
    bare_s = float(step.cost.seconds(step.decodes, 0.0, step.context_tokens))
    carried_s = step.cost.seconds(step.decodes + tokens, attention_work(tokens, 0), step.context_tokens)
    if bare_s - tpot_s > budget.recoverable_tokens * tpot_s:
        assert tokens == step.room_tokens  # what is too late anyway binds nothing
    elif tokens > 0 or step.steps_since >= budget.patient_steps:
        assert carried_s <= max(tpot_s, (1.0 + budget.least_share) * bare_s) + 1e-9


@given(step=STEPS)
def test_prompts_alone_share_a_step_until_that_saves_little(step: NextStep) -> None:
    budget = SlackBudget()
    alone = step._replace(decodes=0, context_tokens=0.0, chunk_tokens=0, attention=0.0)
    assert budget.tokens(alone, 0) == alone.room_tokens
    taken = alone._replace(chunk_tokens=step.chunk_tokens, attention=step.attention)
    cost = step.cost
    if 0 < taken.chunk_tokens < cost.n0:
        assert budget.tokens(taken, 0) == taken.room_tokens
    full = alone._replace(chunk_tokens=8000, attention=attention_work(8000, 0))
    per_step_s = max(0.0, float(cost.a_s) - float(cost.b_s) * float(cost.n0))
    saves = per_step_s / float(cost.seconds(8000, full.attention, 0.0))
    assert (budget.tokens(full, 0) == 0) == (saves <= budget.saved_share)


@given(
    step=STEPS,
    tokens=st.integers(1, 3000),
    due_s=st.floats(0.0, 0.5),
    cached=st.integers(0, 50_000),
    decodes=st.booleans(),
)
def test_nothing_joins_a_step_by_which_a_prompt_in_it_misses(
    step: NextStep, tokens: int, due_s: float, cached: int, decodes: bool
) -> None:
    step = step._replace(chunk_tokens=0, attention=0.0)
    if not decodes:
        step = step._replace(decodes=0, context_tokens=0.0)
    taken = step.with_prompt(tokens, 0, due_s)
    assert (taken.due_s == due_s) == (taken.ends_s <= due_s)
    more = SlackBudget().tokens(taken, cached)
    if more > 0 and taken.due_s == due_s:
        assert taken.with_prompt(more, cached, math.inf).ends_s <= due_s
    assert taken.with_prompt(1, 0, due_s - 1.0).due_s == taken.due_s, "who is late already binds nothing"


BUDGETED = st.builds(
    MixedCost,
    st.floats(0.0, 0.02),
    st.floats(1e-6, 1e-3),
    st.sampled_from([0.0, 8e-10, 1e-8]),
    st.floats(0.0, 1e-7),
    st.sampled_from([0.0, 320.0, 2000.0]),
)
MEANS = st.floats(1.0, 5000.0)


@given(cost=BUDGETED, tpot_s=st.floats(0.002, 0.5), prompt=MEANS, answer=MEANS)
def test_a_full_step_of_the_budget_keeps_the_target_and_a_tile_more_does_not(
    cost: MixedCost, tpot_s: float, prompt: float, answer: float
) -> None:
    budget = budget_for(cost, tpot_s, prompt, answer)
    assert budget.tokens % TILE_TOKENS == 0 and TILE_TOKENS <= budget.tokens <= MOST_TOKENS

    def takes_s(tokens: int) -> float:
        decodes = int(answer / (prompt + answer) * tokens)
        chunk, held = tokens - decodes, decodes * (prompt + 0.5 * answer)
        return float(cost.seconds(tokens, attention_work(chunk, int(0.5 * prompt)), held))

    if budget.fits:
        assert takes_s(budget.tokens) <= tpot_s + 1e-9
    if not budget.fits or budget.tokens < MOST_TOKENS:
        more = budget.tokens + (TILE_TOKENS if budget.fits else 0)
        assert takes_s(more + 2) > tpot_s - 1e-9, "chunks are right to 2 tokens"


@given(cost=BUDGETED, tpot_s=st.floats(0.002, 0.3), more=st.floats(1.0, 4.0), prompt=MEANS, answer=MEANS)
def test_budgets_grow_with_the_target_and_shrink_with_what_decodes_hold(
    cost: MixedCost, tpot_s: float, more: float, prompt: float, answer: float
) -> None:
    def tokens(tpot_s: float, prompt: float, answer: float) -> int:
        found: StepBudget = budget_for(cost, tpot_s, prompt, answer)
        return found.tokens

    here = tokens(tpot_s, prompt, answer)
    assert tokens(more * tpot_s, prompt, answer) >= here
    # As many decodes of the same share of the step, each of which holds more.
    assert tokens(tpot_s, more * prompt, more * answer) <= here

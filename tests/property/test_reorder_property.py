"""AMPD's reordering: what it promises of deadlines and of delay."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.policies.ampd.reorder import (
    Arrange,
    ReorderedQueue,
    best_permutation,
    in_time,
    most_in_time,
)
from tidegate.policies.order import Ticket

eighths = st.integers(0, 40).map(lambda count: count / 8)
"""Few values, all exact in floating point, so that ties and touched limits are common."""
moves = st.one_of(
    st.tuples(st.just("push"), eighths, eighths),
    st.tuples(st.sampled_from(["pop", "pop", "remove"]), eighths, eighths),
)
ARRANGED = [(best_permutation, 3, 3), (best_permutation, 4, 2), (most_in_time, 8, 3), (most_in_time, 64, 2)]


@pytest.mark.parametrize(("arrange", "window", "most"), ARRANGED)
@given(history=st.lists(moves, max_size=60))
def test_no_serving_loses_a_deadline_of_the_window_or_delays_a_task_too_often(
    arrange: Arrange, window: int, most: int, history: list[tuple[str, float, float]]
) -> None:
    queue: ReorderedQueue[int] = ReorderedQueue(arrange, window, most)
    tickets: dict[int, Ticket] = {}
    moved_back: dict[int, int] = {}
    now = 0.0
    for turn, (kind, first, second) in enumerate([*history, *[("pop", 0.125, 0.0)] * len(history)]):
        if kind == "push":
            tickets[turn] = Ticket(now, now + first, second)
            queue.push(turn, tickets[turn])
        elif kind == "remove" and len(queue):
            assert queue.remove(next(iter(queue)))
        elif len(queue):
            now += first
            before = list(queue)
            said = queue.head(now)
            served = queue.pop(now)
            assert said == served
            after = [served, *queue]
            assert sorted(after) == sorted(before) and after[window:] == before[window:]
            met = [in_time([tickets[item] for item in islice(line, window)], now) for line in (before, after)]
            assert met[1] >= met[0]
            assert after == before or met[1] > met[0], "a tie leaves the line as it stands"
            for place, item in enumerate(after):
                moved_back[item] = moved_back.get(item, 0) + (place > before.index(item))
    assert max(moved_back.values(), default=0) <= most


@given(
    tickets=st.lists(st.tuples(eighths, eighths).map(lambda pair: Ticket(0.0, *pair)), min_size=2, max_size=5)
)
def test_the_most_that_can_be_in_time_are_those_of_the_best_permutation(tickets: list[Ticket]) -> None:
    free = [False] * len(tickets)
    found = [arrange(tickets, free, 0.0) for arrange in (best_permutation, most_in_time)]
    counts = [in_time([tickets[at] for at in places or range(len(tickets))], 0.0) for places in found]
    assert counts[0] == counts[1]


def test_a_long_prompt_lets_short_ones_pass_until_it_is_locked() -> None:
    queue: ReorderedQueue[str] = ReorderedQueue(best_permutation, 3, 3)
    queue.push("long", Ticket(0.0, 9.0, 9.5))
    for turn in range(5):
        queue.push(f"short{turn}", Ticket(0.0, turn + 1.0, 1.0))
    served = [queue.pop(float(turn)) for turn in range(6)]
    assert served == ["short0", "short1", "short2", "short3", "long", "short4"]

"""Orders against their definitions, read plainly over all that waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.policies.order import Ticket, WaitingQueue
from tidegate.policies.orders import ORDERS, make_order

BOUND = 3.0
NAMES = ("fifo", "edf", "sjf", "feasible-first")
tenths = st.integers(0, 40).map(lambda tenths: tenths / 8)
"""Few values, all exact in floating point, so that ties and touched limits are common."""


@dataclass(frozen=True)
class Waiting:
    """One request of the plain reading; ``turn`` counts pushes."""

    turn: int
    ticket: Ticket


pushes = st.tuples(st.just("push"), tenths, tenths)
others = st.tuples(st.sampled_from(["pop", "pop", "remove", "front", "continued"]), tenths, st.integers(0, 5))
histories = st.lists(st.one_of(pushes, others), max_size=60)


def starved_since(entry: Waiting) -> float:
    ticket = entry.ticket
    return ticket.arrival_s + BOUND * (ticket.deadline_s - ticket.arrival_s)


def hopeless(entry: Waiting, now: float) -> bool:
    return now + entry.ticket.work_s > entry.ticket.deadline_s


def plainly(name: str, waiting: list[Waiting], now: float) -> Waiting:
    """Return who is next by the definition of the order."""
    if name == "fifo":
        return min(waiting, key=lambda entry: entry.turn)
    starved = [entry for entry in waiting if now > starved_since(entry)]
    if starved:
        return min(starved, key=lambda entry: (starved_since(entry), entry.turn))
    keys: dict[str, Callable[[Waiting], tuple[object, ...]]] = {
        "edf": lambda entry: (entry.ticket.deadline_s, entry.turn),
        "sjf": lambda entry: (entry.ticket.work_s, entry.turn),
        "feasible-first": lambda entry: (
            (True, entry.turn) if hopeless(entry, now) else (False, entry.ticket.deadline_s, entry.turn)
        ),
    }
    return min(waiting, key=keys[name])


@pytest.mark.parametrize("name", NAMES)
@given(history=histories)
def test_every_order_serves_what_its_definition_says(
    name: str, history: list[tuple[str, float, float]]
) -> None:
    queue: WaitingQueue[int] = make_order(name, starvation_bound=BOUND).queue()
    front: list[int] = []
    waiting: dict[int, Waiting] = {}
    now = 0.0

    def serve() -> None:
        expected = front[0] if front else plainly(name, list(waiting.values()), now).turn
        assert queue.head(now) == expected
        assert queue.pop(now) == expected
        if front:
            front.pop(0)
        else:
            del waiting[expected]

    for turn, (kind, first, second) in enumerate(history):
        if kind == "push":
            ticket = Ticket(now, now + first + 0.125, second)
            queue.push(turn, ticket)
            waiting[turn] = Waiting(turn, ticket)
            continue
        now += first
        present = [*front, *waiting]
        if kind == "front":
            queue.push_front(turn)
            front.insert(0, turn)
        elif kind == "continued":
            queue.push_continued(turn)
            front.append(turn)
        elif kind == "remove" and present:
            gone = present[int(second) % len(present)]
            assert queue.remove(gone)
            assert not queue.remove(gone)
            if gone in waiting:
                del waiting[gone]
            else:
                front.remove(gone)
        elif present:
            serve()
        assert list(queue) == [*front, *waiting]
        assert len(queue) == len(front) + len(waiting)
    while front or waiting:
        serve()
    assert queue.head(now) is None


@pytest.mark.parametrize("name", NAMES)
def test_the_past_is_forgotten(name: str) -> None:
    """One request that waits on must not keep every later one in memory."""
    queue: WaitingQueue[int] = make_order(name).queue()
    queue.push(-1, Ticket(0.0, 1e9, 1e6))
    for turn in range(5000):
        queue.push(turn, Ticket(0.0, 1.0, 0.1))
        queue.remove(turn)
    heaps = [heap for key, heap in vars(queue).items() if hasattr(heap, "top")]
    lines = [line for line in vars(queue).values() if isinstance(line, deque)]
    assert all(len(heap._heap) <= 128 for heap in heaps) and all(len(line) <= 128 for line in lines)
    assert list(queue) == [-1]


def test_every_registered_order_has_its_name() -> None:
    assert set(NAMES) <= set(ORDERS.names())
    assert all(make_order(name).name == name for name in ORDERS.names())

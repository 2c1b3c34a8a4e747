"""Orders against their definitions, read plainly over all that waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.policies import order
from tidegate.policies.order import Ticket, WaitingQueue
from tidegate.policies.orders import ORDERS, make_order

BOUND = 3.0
NAMES = ("fifo", "edf", "sjf", "feasible-first", "feasible-sjf", "length-aware")
tenths = st.integers(0, 40).map(lambda tenths: tenths / 8)
"""Few values, all exact in floating point, so that ties and touched limits are common."""


@dataclass(frozen=True, eq=False)
class Waiting:
    """One request of the plain reading; ``turn`` counts pushes. ``before`` waited when it came, and
    ``allowed_s`` of work may overtake it."""

    turn: int
    ticket: Ticket
    before: tuple[Waiting, ...] = ()
    allowed_s: float = 0.0

    @classmethod
    def after(cls, turn: int, ticket: Ticket, before: Collection[Waiting]) -> Waiting:
        work_s = sum(each.ticket.work_s for each in before)
        allowed_s = order.OVERTAKEN * work_s + order.SLACK * (ticket.deadline_s - ticket.arrival_s)
        return cls(turn, ticket, tuple(before), allowed_s)


def overtaken_s(entry: Waiting, gone: list[Waiting]) -> float:
    return sum(each.ticket.work_s for each in gone if each.turn > entry.turn)


pushes = st.tuples(st.just("push"), tenths, tenths)
others = st.tuples(st.sampled_from(["pop", "pop", "remove", "front", "continued"]), tenths, st.integers(0, 5))
histories = st.lists(st.one_of(pushes, others), max_size=60)


def starved_since(entry: Waiting) -> float:
    ticket = entry.ticket
    return ticket.arrival_s + BOUND * (ticket.deadline_s - ticket.arrival_s)


def hopeless(entry: Waiting, now: float) -> bool:
    return now + entry.ticket.work_s > entry.ticket.deadline_s


def plainly(name: str, waiting: list[Waiting], now: float, gone: list[Waiting]) -> Waiting:
    """Return who is next by the definition of the order; ``gone`` were served, or withdrawn."""
    if name == "fifo":
        return min(waiting, key=lambda entry: entry.turn)
    starved = [entry for entry in waiting if now > starved_since(entry)]
    if starved:
        return min(starved, key=lambda entry: (starved_since(entry), entry.turn))
    if name == "length-aware":
        oldest = min(waiting, key=lambda entry: entry.turn)
        shortest = min(waiting, key=lambda entry: (entry.ticket.work_s, entry.turn))
        over_s = overtaken_s(oldest, gone) + shortest.ticket.work_s
        return oldest if over_s > oldest.allowed_s else shortest
    keys: dict[str, Callable[[Waiting], tuple[object, ...]]] = {
        "edf": lambda entry: (entry.ticket.deadline_s, entry.turn),
        "sjf": lambda entry: (entry.ticket.work_s, entry.turn),
        "feasible-first": lambda entry: (
            (True, entry.turn) if hopeless(entry, now) else (False, entry.ticket.deadline_s, entry.turn)
        ),
        "feasible-sjf": lambda entry: (
            (True, entry.turn) if hopeless(entry, now) else (False, entry.ticket.work_s, entry.turn)
        ),
    }
    return min(waiting, key=keys[name])


@pytest.mark.parametrize("name", NAMES)
@given(history=histories)
def test_every_order_serves_what_its_definition_says(
    name: str, history: list[tuple[str, float, float]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:  # to shares that are exact in floating point
        patch.setattr(order, "OVERTAKEN", 0.25)
        patch.setattr(order, "SLACK", 0.125)
        serve_all(name, history)


def serve_all(name: str, history: list[tuple[str, float, float]]) -> None:
    queue: WaitingQueue[int] = make_order(name, starvation_bound=BOUND).queue()
    front: list[int] = []
    waiting: dict[int, Waiting] = {}
    gone: list[Waiting] = []
    now = 0.0

    def serve() -> None:
        expected = front[0] if front else plainly(name, list(waiting.values()), now, gone).turn
        assert queue.head(now) == expected
        assert queue.pop(now) == expected
        if front:
            front.pop(0)
        else:
            gone.append(waiting.pop(expected))

    for turn, (kind, first, second) in enumerate(history):
        if kind == "push":
            ticket = Ticket(now, now + first + 0.125, second)
            queue.push(turn, ticket)
            waiting[turn] = Waiting.after(turn, ticket, waiting.values())
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
            left = present[int(second) % len(present)]
            assert queue.remove(left)
            assert not queue.remove(left)
            if left in waiting:
                gone.append(waiting.pop(left))
            else:
                front.remove(left)
        elif present:
            serve()
        assert list(queue) == [*front, *waiting]
        assert len(queue) == len(front) + len(waiting)
    while front or waiting:
        serve()
    assert queue.head(now) is None


@given(
    events=st.lists(st.one_of(st.none(), st.tuples(st.floats(0.01, 2.0), st.floats(0.1, 10.0))), max_size=80)
)
def test_length_aware_lets_nobody_be_overtaken_by_more_than_was_allowed(
    events: list[tuple[float, float] | None],
) -> None:
    """The bound against starvation: whatever comes, and whenever."""
    queue: WaitingQueue[Waiting] = make_order("length-aware").queue()
    waiting: list[Waiting] = []
    gone: list[Waiting] = []
    for turn, event in enumerate([*events, *[None] * len(events)]):
        if event is not None:
            work_s, target_s = event
            entry = Waiting.after(turn, Ticket(0.0, target_s, work_s), waiting)
            queue.push(entry, entry.ticket)
            waiting.append(entry)
        elif waiting:
            entry = queue.pop(0.0)
            waiting.remove(entry)
            most_s = max(each.allowed_s for each in (entry, *entry.before))
            assert overtaken_s(entry, gone) <= most_s + 1e-9
            gone.append(entry)


def test_length_aware_shares_a_step_as_far_as_prompts_wait() -> None:
    queue: WaitingQueue[str] = make_order("length-aware").queue()
    for name, tokens in (("long", 1200), ("short", 300), ("other", 400)):
        queue.push(name, Ticket(0.0, 100.0, tokens / 1000, tokens, 1000.0))
    assert (queue.head(0.0), queue.head(0.0, 1200), queue.head(0.0, 1201)) == ("short", "short", None)
    queue.remove("short")
    assert (queue.head(0.0, 300), queue.head(0.0, 600), queue.head(0.0, 601)) == ("other", "other", None)
    queue.remove("other")
    assert (queue.head(0.0), queue.head(0.0, 1)) == ("long", None)
    queue.push_continued("begun")
    assert queue.head(0.0, 8000) == "begun"


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

"""Reordering the first waiting prefills so that more of them meet their deadlines (AMPD, Algorithm 2)."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from itertools import islice, permutations
from typing import TypeVar

from tidegate.policies.order import Ticket, WaitingQueue

T = TypeVar("T")

Arrange = Callable[[Sequence[Ticket], Sequence[bool], float], Sequence[int] | None]
"""Returns the order in which to serve the first tasks of a line from ``now`` on, as their places in it; None
for the order in which they stand. Those that are locked (the second argument) do not come later than they
stand."""


class ReorderedQueue(WaitingQueue[T]):
    """Serves the line in the order in which it stands, but before each serving rearranges its first
    ``window`` tasks where that has more of them meet their deadlines.

    A task that a rearrangement moves back is postponed; after ``postponements`` of those it is locked. Only
    ``pop`` rearranges: ``head`` says what it would serve. Both cost what ``arrange`` does.
    """

    def __init__(self, arrange: Arrange, window: int, postponements: int) -> None:
        super().__init__()
        self._arrange = arrange
        self._window = window
        self._most = postponements
        self._postponed: dict[T, int] = {}

    def head(self, now: float, batched: int = 0) -> T | None:
        if self._front or len(self._line) < 2:
            return super().head(now)
        places = self._places(now)
        return next(islice(self._line, places[0] if places else 0, None))

    def pop(self, now: float) -> T:
        if not self._front and (places := self._places(now)):
            standing = list(islice(self._line, self._window))
            for later, place in enumerate(places):
                if later > place:
                    self._postponed[standing[place]] = self._postponed.get(standing[place], 0) + 1
            for place in reversed(places):
                self._line.move_to_end(standing[place], last=False)
        item = super().pop(now)
        self._postponed.pop(item, None)
        return item

    def remove(self, item: T) -> bool:
        self._postponed.pop(item, None)
        return super().remove(item)

    def _places(self, now: float) -> Sequence[int] | None:
        if len(self._line) < 2:
            return None
        tickets = list(islice(self._line.values(), self._window))
        postponed, most = self._postponed, self._most
        locked = [postponed.get(item, 0) >= most for item in islice(self._line, self._window)]
        return self._arrange(tickets, locked, now)


def in_time(tickets: Sequence[Ticket], now: float) -> int:
    """Return how many meet their deadlines when they are served one after the other from ``now`` on."""
    met = 0
    for ticket in tickets:
        now += ticket.work_s
        met += now <= ticket.deadline_s
    return met


def best_permutation(tickets: Sequence[Ticket], locked: Sequence[bool], now: float) -> Sequence[int] | None:
    """Return the permutation with most in time, None where none has more than the standing order.

    Algorithm 2 (section 4.6): all permutations, the first of the best in lexicographic order. Its deadline is
    that of the TTFT, which counts from arrival; the paper counts from when the task was queued.
    """
    most, best = in_time(tickets, now), None
    if most == len(tickets):
        return None
    for places in permutations(range(len(tickets))):
        if any(locked[place] and later > place for later, place in enumerate(places)):
            continue
        met = in_time([tickets[place] for place in places], now)
        if met > most:
            most, best = met, places
    return best


def most_in_time(tickets: Sequence[Ticket], locked: Sequence[bool], now: float) -> Sequence[int] | None:
    """Return the most that can be in time, by least slack, then the others as they stand; None where that
    is no more than in the standing order.

    Ours, for lines too long to try all permutations: Moore 1968 finds a largest set that can be in time by
    dropping, whenever one is late, the longest so far; served by deadline all of it is. Kairos (2605.02329)
    orders by slack over length, which promises no number. What stands up to the last locked task stays.
    """
    fixed = max((place + 1 for place, held in enumerate(locked) if held), default=0)
    standing = in_time(tickets, now)
    if standing == len(tickets):
        return None
    start_s = now + sum(ticket.work_s for ticket in tickets[:fixed])
    chosen: list[tuple[float, int]] = []
    ends_s = start_s
    for _, place in sorted((tickets[place].deadline_s, place) for place in range(fixed, len(tickets))):
        insort(chosen, (tickets[place].work_s, place))
        ends_s += tickets[place].work_s
        if ends_s > tickets[place].deadline_s:
            ends_s -= chosen.pop()[0]
    kept = {place for _, place in chosen}
    by_slack = sorted(kept, key=lambda place: (tickets[place].deadline_s, place))
    others = [place for place in range(fixed, len(tickets)) if place not in kept]
    places = [*range(fixed), *by_slack, *others]
    return places if in_time([tickets[place] for place in places], now) > standing else None

"""Requests that wait to be placed: those that a policy holds, and those that a failure delays."""

from __future__ import annotations

from collections.abc import Callable

from tidegate.control.effects import Effects
from tidegate.control.live_request import LiveRequest
from tidegate.policies.order import Order, Ticket, WaitingQueue
from tidegate.policies.shares import shared_queue


class HeldRequests:
    """Held requests in the system's order, and failed ones that wait for the fleet's word on an instance."""

    def __init__(self, order: Order) -> None:
        self._queue: WaitingQueue[LiveRequest] = shared_queue(order)
        self._awaiting_word: dict[LiveRequest, tuple[str, float]] = {}
        self._asked: LiveRequest | None = None
        self._kept: list[tuple[Ticket, bool]] = []

    def __len__(self) -> int:
        return len(self._queue) + len(self._awaiting_word)

    def hold(self, live: LiveRequest, ticket: Ticket, *, with_all_behind: bool = False) -> None:
        """Have a request wait until it is asked for again; ``with_all_behind``: nobody behind it in the order
        can be placed before."""
        if live is self._asked:
            self._kept.append((ticket, with_all_behind))
        else:
            self._queue.push(live, ticket)

    def await_word(self, live: LiveRequest, instance_id: str, until_s: float) -> None:
        """Have a failed request wait until the fleet reports the instance down, at most until ``until_s``.

        Without this a request would spend its replays on a dead instance before anybody noticed.
        """
        self._awaiting_word[live] = (instance_id, until_s)

    def confirmed_down(self, instance_id: str) -> list[LiveRequest]:
        """Take those that waited for word on an instance."""
        return self._take([live for live, (on, _) in self._awaiting_word.items() if on == instance_id])

    def overdue(self, now: float) -> list[LiveRequest]:
        """Take those that have waited for word long enough, and those whose deadline has passed."""
        late = [live for live in self._queue if live.deadline_s <= now]
        for live in late:
            self._queue.remove(live)
        waited = [live for live, (_, until_s) in self._awaiting_word.items() if until_s <= now]
        return late + self._take(waited)

    def ask_again(self, now: float, place: Callable[[LiveRequest], Effects]) -> Effects:
        """Have ``place`` ask for the held requests, in order, up to one that is held with all behind it.

        Those that wait for word on an instance are not asked for. One that is held again keeps its place if
        it holds the others back, else it comes behind those that wait already.
        """
        effects: Effects = []
        again: list[tuple[LiveRequest, Ticket]] = []
        while (head := self._queue.head(now)) is not None:
            self._asked = head
            effects += place(head)
            self._asked = None
            ticket, with_all_behind = self._kept.pop() if self._kept else (None, False)
            if with_all_behind:
                break
            if ticket is None:
                self._queue.pop(now)
            else:
                self._queue.remove(head)
                again.append((head, ticket))
        for live, ticket in again:
            self._queue.push(live, ticket)
        return effects

    def remove(self, live: LiveRequest) -> None:
        """Forget a request, whether or not it waits."""
        self._queue.remove(live)
        self._awaiting_word.pop(live, None)

    def _take(self, lives: list[LiveRequest]) -> list[LiveRequest]:
        for live in lives:
            del self._awaiting_word[live]
        return lives

"""Requests that wait to be placed: those that a policy holds, and those that a failure delays."""

from __future__ import annotations

from tidegate.control.live_request import LiveRequest
from tidegate.policies.order import Order, Ticket, WaitingQueue


class HeldRequests:
    """Held requests in the system's order, and failed ones that wait for the fleet's word on an instance."""

    def __init__(self, order: Order) -> None:
        self._queue: WaitingQueue[LiveRequest] = order.queue()
        self._awaiting_word: dict[LiveRequest, tuple[str, float]] = {}

    def __len__(self) -> int:
        return len(self._queue) + len(self._awaiting_word)

    def hold(self, live: LiveRequest, ticket: Ticket) -> None:
        """Have a request wait until it is taken again."""
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
        """Take those that have waited for word long enough."""
        return self._take([live for live, (_, until_s) in self._awaiting_word.items() if until_s <= now])

    def take_all(self, now: float) -> list[LiveRequest]:
        """Take every held request, in order. Those that wait for word on an instance stay."""
        return [self._queue.pop(now) for _ in range(len(self._queue))]

    def remove(self, live: LiveRequest) -> None:
        """Forget a request, whether or not it waits."""
        self._queue.remove(live)
        self._awaiting_word.pop(live, None)

    def _take(self, lives: list[LiveRequest]) -> list[LiveRequest]:
        for live in lives:
            del self._awaiting_word[live]
        return lives

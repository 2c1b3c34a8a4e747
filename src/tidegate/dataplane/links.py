"""KV on the way: links that share their bandwidth among the transfers on them."""

from __future__ import annotations

import heapq

from tidegate.costs.forms import TransferCost


class Link:
    """One link. Transfers that are on it at one time get equal shares of its bandwidth.

    ``latency_s`` passes before a transfer enters. Progress is kept as bytes per transfer since the link
    began (``_level``): a transfer that enters at level v with n bytes ends at level v + n, whatever comes
    and goes meanwhile.
    """

    def __init__(self, cost: TransferCost) -> None:
        self.latency_s = float(cost.latency_s)
        self.version = 0
        self._bytes_per_s = float(cost.bytes_per_s)
        self._level = 0.0
        self._at_s = 0.0
        self._ends: list[tuple[float, int]] = []

    def enter(self, request: int, n_bytes: float, now: float) -> None:
        """Begin to move ``n_bytes`` for ``request``."""
        self._advance(now)
        heapq.heappush(self._ends, (self._level + n_bytes, request))

    def next_end_s(self) -> float | None:
        """Return when the next transfer ends if none enters before; None while idle."""
        if not self._ends:
            return None
        left = max(0.0, self._ends[0][0] - self._level)
        return self._at_s + left * len(self._ends) / self._bytes_per_s

    def leave(self, now: float) -> int:
        """Take out the transfer that ends at ``now`` and return its request."""
        self._advance(now)
        level, request = heapq.heappop(self._ends)
        self._level = level if self._ends else 0.0
        return request

    def cancel(self, request: int, now: float) -> None:
        """Take out a transfer that is not to end."""
        self._advance(now)
        self._ends = [end for end in self._ends if end[1] != request]
        heapq.heapify(self._ends)
        if not self._ends:
            self._level = 0.0

    def _advance(self, now: float) -> None:
        if self._ends:
            self._level += (now - self._at_s) * self._bytes_per_s / len(self._ends)
        self._at_s = now

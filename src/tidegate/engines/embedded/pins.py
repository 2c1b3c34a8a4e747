"""The KV of finished requests that a peer may still pull, each under a lease."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from tidegate.core.clock import Clock
from tidegate.engines.serving.types import PinnedKv


class Pins:
    """The pins of an instance. Any thread may ask and release; only the compute thread pins and collects.

    A released or expired pin's blocks stay untouched until the compute thread collects them, so a
    ``release`` that answers True vouches for everything read before it.
    """

    def __init__(self, lease_s: float, clock: Clock, wake: Callable[[], None]) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._wake = wake
        self._lock = threading.Lock()
        self._pins: dict[str, PinnedKv] = {}
        self._returned: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return len(self._pins)

    def pin(self, request_id: str, block_ids: Sequence[int], num_tokens: int) -> PinnedKv:
        """Take over the caller's hold on the blocks for one lease; an older pin of the id ends."""
        pin = PinnedKv(request_id, tuple(block_ids), num_tokens, self._clock.now() + self._lease_s)
        with self._lock:
            older = self._pins.pop(request_id, None)
            if older is not None:
                self._returned.append(older.block_ids)
            self._pins[request_id] = pin
        return pin

    def pinned(self, request_id: str) -> PinnedKv | None:
        """Return the pin while its lease runs."""
        with self._lock:
            pin = self._pins.get(request_id)
        return pin if pin is not None and pin.deadline_s > self._clock.now() else None

    def release(self, request_id: str) -> bool:
        """End the pin; True when its blocks were untouched until now."""
        with self._lock:
            pin = self._pins.pop(request_id, None)
            if pin is not None:
                self._returned.append(pin.block_ids)
        if pin is not None:
            self._wake()
        return pin is not None

    def take(self, request_id: str) -> PinnedKv | None:
        """End the pin and hand its hold on the blocks to the caller."""
        with self._lock:
            return self._pins.pop(request_id, None)

    def collect(self) -> list[tuple[int, ...]]:
        """Return the blocks of pins that were released or have expired; the caller drops their hold."""
        now = self._clock.now()
        with self._lock:
            for request_id in [key for key, pin in self._pins.items() if pin.deadline_s <= now]:
                self._returned.append(self._pins.pop(request_id).block_ids)
            returned, self._returned = self._returned, []
        return returned

    def held_blocks(self) -> list[int]:
        """Return every pinned block, repeated as often as it is pinned."""
        with self._lock:
            held = [block for pin in self._pins.values() for block in pin.block_ids]
            return held + [block for blocks in self._returned for block in blocks]

    def next_deadline_s(self) -> float | None:
        """Return when the next lease ends, on the clock; None without pins."""
        with self._lock:
            return min((pin.deadline_s for pin in self._pins.values()), default=None)

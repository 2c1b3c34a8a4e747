"""Time that a test sets."""

from __future__ import annotations


class VirtualClock:
    """A Clock that stands still until told to move."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def now(self) -> float:
        """Return the time last set."""
        return self._now

    def set(self, now: float) -> None:
        """Move to ``now``. Raises ValueError when that lies in the past."""
        if now < self._now:
            raise ValueError(f"a clock cannot go back from {self._now} to {now}")
        self._now = now

    def advance(self, seconds: float) -> float:
        """Move forward by ``seconds`` and return the new time."""
        self.set(self._now + seconds)
        return self._now

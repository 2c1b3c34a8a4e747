"""Time as an injected object, so that decisions never read a clock themselves."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic source of seconds."""

    def now(self) -> float:
        """Return seconds since an arbitrary fixed origin; never decreases."""
        ...


class WallClock:
    """The machine's monotonic clock."""

    now = staticmethod(time.monotonic)

"""When instances that leap next have something to tell."""

from __future__ import annotations

import math
from typing import Final

NEVER: Final = math.inf
GROUP: Final = 32
"""Instances whose earliest time is kept as one number. Looking at n instances then costs n / 32, and 32 for
each group where something is due: less than a heap, which has to learn of every stretch."""


class Due:
    """The times of many, and quickly whose have come."""

    def __init__(self, count: int) -> None:
        self._at_s = [NEVER] * count
        self._earliest_s = [NEVER] * (-(-count // GROUP))

    def set(self, index: int, at_s: float) -> None:
        """Replace the time of one."""
        self._at_s[index] = at_s
        group = index // GROUP
        if at_s < self._earliest_s[group]:
            self._earliest_s[group] = at_s

    def by(self, now: float) -> list[int]:
        """Return whose times are at most ``now``, ascending. Each of them is to be ``set`` anew."""
        found: list[int] = []
        for group, earliest_s in enumerate(self._earliest_s):
            if earliest_s <= now:
                first = group * GROUP
                earliest_s = NEVER
                for index, at_s in enumerate(self._at_s[first : first + GROUP], first):
                    if at_s <= now:
                        found.append(index)
                    elif at_s < earliest_s:
                        earliest_s = at_s
                self._earliest_s[group] = earliest_s
        return found

"""The short notations of settings and options: ``PROFILE:N``, ``P:D`` and ``A..B``."""

from __future__ import annotations

import re
from typing import NamedTuple

from tidegate.core.errors import ConfigError


class FleetRange(NamedTuple):
    """The least and the most instances of a fleet."""

    least: int
    most: int

    @property
    def ceiling(self) -> int | None:
        """What the fleet may grow to; None for one of a given size, which nothing bounds."""
        return self.most if self.most > self.least else None

    def spares(self, split: tuple[int, int] | None) -> int:
        """Return how many are not up at the start: a fleet begins with its least, or with those of a split.

        Raises ConfigError for a split of fewer or more instances than there can be.
        """
        first = self.least if split is None else sum(split)
        if not self.least <= first <= self.most:
            raise ConfigError(f"the split adds up to {first}, and instances are {self.least} to {self.most}")
        return self.most - first

    def __str__(self) -> str:
        return f"{self.least}..{self.most}" if self.most > self.least else str(self.least)


def parse_split(text: str) -> tuple[int, int]:
    """Read ``P:D``, the numbers of prefill and decode instances. Raises ValueError."""
    found = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if not found or not int(found[1]) or not int(found[2]):
        raise ValueError("expected P:D, prefill and decode instances, each at least 1, as in 1:3")
    return int(found[1]), int(found[2])


def parse_counted(text: str) -> tuple[str, int | None]:
    """Read ``PROFILE:N`` or ``PROFILE``, whose count is None; a profile's name may hold colons."""
    found = re.fullmatch(r"(.+):([0-9]+)", text.strip())
    return (found[1], int(found[2])) if found else (text.strip(), None)


def parse_range(text: str) -> FleetRange:
    """Read ``A..B``, the least and the most instances of a fleet, or ``N``, which is both. Raises
    ValueError."""
    found = re.fullmatch(r"([0-9]+)(?:\.\.([0-9]+))?", text.strip())
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise ValueError(
            "expected N instances, or A..B, the least and the most of them, at least 1, as in 2..8"
        )
    return FleetRange(least, most)


def parse_ranged(text: str) -> tuple[str, FleetRange | None]:
    """Read ``PROFILE:A..B``, ``PROFILE:N`` or ``PROFILE``, which has no range. Raises ValueError."""
    name, colon, count = text.strip().rpartition(":")
    if not colon or not re.fullmatch(r"[0-9.]+", count):
        return text.strip(), None
    return name, parse_range(count)

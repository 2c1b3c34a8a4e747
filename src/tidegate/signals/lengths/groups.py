"""Groups of requests whose answers are alike: which rows of counts a request belongs to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from tidegate.core.request import Request

Key = tuple[object, ...]
PROMPT, TENANT, SESSION = "prompt", "tenant", "session"
FEATURES = (PROMPT, TENANT, SESSION)


class Level(NamedTuple):
    """Groups by ``features`` together, each part of a group of the level before. ``weight`` is how many
    answers that one counts for in a group of this level: the lesser, the sooner its own answers tell."""

    features: tuple[str, ...]
    weight: float


def key_of(request: Request, features: Sequence[str]) -> Key | None:
    """Return the group of a request by some features; None where it does not have one of them."""
    values: list[object] = []
    for feature in features:
        if feature == PROMPT:
            values.append((request.prompt_tokens - request.generated).bit_length())
        elif feature == TENANT:
            values.append(request.tenant)
        else:
            values.append((request.tenant, request.session) if request.session else "")
    return None if "" in values else (*features, *values)


class Groups:
    """Gives rows to groups, at most ``rows`` of them; row 0 is the group of all requests.

    The group that was used longest ago loses its row to a new one, unless a live request is in it. Where no
    row is to be had, a request belongs to the larger group alone. ``parent`` is the row of the larger group,
    ``level`` the level (1 is the first), both by row.
    """

    def __init__(self, levels: Sequence[Level], rows: int) -> None:
        self.levels = tuple(levels)
        self.parent = [0] * rows
        self.level = [0] * rows
        self._users = [0] * rows
        self._rows: OrderedDict[Key, int] = OrderedDict()
        self._free = list(range(rows - 1, 0, -1))
        self._keys: dict[int, Key] = {}
        self.created: list[int] = []

    def enter(self, request: Request) -> tuple[int, ...]:
        """Take a live request into its groups; return their rows, the largest group's first. Rows that are
        taken from other groups are in ``evicted`` until the caller empties it."""
        rows = [0]
        for number, level in enumerate(self.levels, 1):
            key = key_of(request, level.features)
            if key is None:
                continue
            row = self._rows.get(key)
            if row is None:
                row = self._new_row(rows)
                if row is None:
                    break
                self._rows[key], self._keys[row] = row, key
                self.parent[row], self.level[row] = rows[-1], number
                self.created.append(row)
            rows.append(row)
        for row in reversed(rows[1:]):  # a larger group is used after those in it: they go first
            self._rows.move_to_end(self._keys[row])
            self._users[row] += 1
        return tuple(rows)

    def leave(self, rows: Sequence[int]) -> None:
        """Say that a live request which ``enter`` gave these rows has ended."""
        for row in rows[1:]:
            self._users[row] -= 1

    def _new_row(self, kept: Sequence[int]) -> int | None:
        if self._free:
            return self._free.pop()
        for key, row in self._rows.items():
            if not self._users[row] and row not in kept:
                del self._rows[key], self._keys[row]
                return row
        return None

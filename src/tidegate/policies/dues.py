"""When the next tokens of an instance's decodes are due."""

from __future__ import annotations

from math import inf

import numpy as np

from tidegate.costs.forms import Values


class TokenDues:
    """The dues of decodes that get one token per step, all of them.

    An answer attains its TPOT target if its last token comes by ``first_token_s + k * tpot_s``, k tokens
    behind the first, and it may end at any token: so token k is due then. The owner keeps ``steps``, how many
    there were. Asking costs a pass over arrays, the rest O(1).
    """

    def __init__(self) -> None:
        self.steps = 0
        self._slots: dict[int, int] = {}
        self._keys: list[int] = []
        self._joined = 0
        self._first_s = np.empty(16)
        self._tpot_s = np.empty(16)
        self._offsets = np.empty(16)
        self._last: tuple[tuple[float, ...], float] = ((), inf)

    def join(self, first_token_s: float, tpot_s: float, number: int) -> int:
        """Count a decode whose next token is the ``number``-th behind its first; return the key that it
        leaves with."""
        slot = len(self._keys)
        if slot == len(self._first_s):
            self._first_s, self._tpot_s, self._offsets = (
                np.concatenate([column, np.empty(slot)])
                for column in (self._first_s, self._tpot_s, self._offsets)
            )
        self._first_s[slot], self._tpot_s[slot] = first_token_s, tpot_s
        self._offsets[slot] = number - self.steps
        self._joined += 1
        self._keys.append(self._joined)
        self._slots[self._joined] = slot
        return self._joined

    def leave(self, key: int) -> None:
        """Count a decode no longer."""
        slot, last = self._slots.pop(key), len(self._keys) - 1
        moved = self._keys.pop()
        if slot != last:
            self._keys[slot] = moved
            self._slots[moved] = slot
            for column in (self._first_s, self._tpot_s, self._offsets):
                column[slot] = column[last]

    def __len__(self) -> int:
        return len(self._keys)

    def behind_first(self, share: float, at_s: float, recoverable_tokens: float) -> float:
        """Return the due that ``share`` of all are before, rounded down; infinity without any.

        Those that are more than ``recoverable_tokens`` of their decode's targets before ``at_s`` are given
        up: the one returned is not among them. Every prompt of a step asks the same: the last answer is kept.
        """
        count = len(self._keys)
        if not count:
            return inf
        asked = (self.steps, self._joined, count, share, at_s, recoverable_tokens)
        if asked != self._last[0]:
            self._last = asked, self._behind_first(count, share, at_s, recoverable_tokens)
        return self._last[1]

    def _behind_first(self, count: int, share: float, at_s: float, recoverable_tokens: float) -> float:
        tpot_s = self._tpot_s[:count]
        dues: Values = self._first_s[:count] + (self._offsets[:count] + self.steps) * tpot_s
        bound = dues[dues > at_s - recoverable_tokens * tpot_s]
        at = int(share * count)
        if at >= len(bound):
            return inf
        return float(np.partition(bound, at)[at] if at else bound.min())

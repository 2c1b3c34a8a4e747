"""When the next tokens of an instance's decodes are due."""

from __future__ import annotations

from bisect import bisect_right, insort
from math import inf


class TokenDues:
    """The dues of decodes that get one token per step, all of them.

    An answer attains its TPOT target if its last token comes by ``first_token_s + k * tpot_s``, k tokens
    behind the first, and it may end at any token: so token k is due then. With every step all dues move on
    by their targets, so that what a decode is filed under, its due less that of the steps so far, stays as
    it is; the owner keeps ``steps``, how many there were. Joining, leaving and asking cost a search of a
    sorted list per target.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._keys: dict[float, list[float]] = {}

    def join(self, first_token_s: float, tpot_s: float, number: int) -> float:
        """Count a decode whose next token is the ``number``-th behind its first; return the key that it
        leaves with."""
        key = first_token_s + (number - self.steps) * tpot_s
        insort(self._keys.setdefault(tpot_s, []), key)
        return key

    def leave(self, key: float, tpot_s: float) -> None:
        """Count a decode no longer."""
        keys = self._keys[tpot_s]
        del keys[bisect_right(keys, key) - 1]
        if not keys:
            del self._keys[tpot_s]

    def __len__(self) -> int:
        return sum(map(len, self._keys.values()))

    def first_behind(self, at_s: float, tokens: float) -> float:
        """Return the first due that is not more than ``tokens`` of its decode's targets before ``at_s``;
        infinity without any."""
        first_s = inf
        for tpot_s, keys in self._keys.items():
            moved_s = self.steps * tpot_s
            at = bisect_right(keys, at_s - moved_s - tokens * tpot_s)
            if at < len(keys) and keys[at] + moved_s < first_s:
                first_s = keys[at] + moved_s
        return first_s

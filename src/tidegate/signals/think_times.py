"""How long clients think between two turns of a session, and so for how long its KV is worth expecting.

Continuum (arXiv 2511.02230) keeps KV across tool calls for a time that it predicts. Ours: the time is a
quantile of the pauses that were observed, of the tenant's own where there are enough of them. A pause counts
for less the more came after it. Pure: the same pauses give the same times.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

BINS_PER_OCTAVE = 4
LEAST_S = 0.01
BINS = 4 * 24
"""Quarter octaves from 10 ms to two days."""
HALF_LIFE = 512
"""A pause counts for half after so many more of its group (ours)."""
ENOUGH = 16
"""Pauses from which on a group is asked (ours)."""
QUANTILE = 0.95
MARGIN = 2.0
"""KV is expected for so many times the quantile of the pauses (ours)."""
LEAST_TTL_S = 60.0
"""KV is expected for at least so long: what stays in a prefix cache for nothing costs nothing (ours)."""
UNLEARNT_S = 600.0
"""For how long it is expected before there are enough pauses (ours)."""
MOST_GROUPS = 1024

_EDGES_S: NDArray[np.float64] = LEAST_S * 2.0 ** (np.arange(1, BINS + 1) / BINS_PER_OCTAVE)


class Pauses:
    """A decaying histogram of pauses, over quarter octaves."""

    def __init__(self) -> None:
        self._counts: NDArray[np.float64] = np.zeros(BINS)
        self._weight = 1.0
        self._total = 0.0
        self.seen = 0

    def add(self, pause_s: float) -> None:
        """Count a pause; those before it count for a little less."""
        at = 0 if pause_s <= LEAST_S else int(math.log2(pause_s / LEAST_S) * BINS_PER_OCTAVE)
        self._counts[min(at, BINS - 1)] += self._weight
        self._total += self._weight
        self.seen += 1
        self._weight *= 2.0 ** (1.0 / HALF_LIFE)
        if self._weight > 2.0**64:
            self._counts /= self._weight
            self._total /= self._weight
            self._weight = 1.0

    def quantile_s(self, share: float) -> float:
        """Return a pause that ``share`` of them do not exceed, to the upper edge of its bin."""
        at = int(np.searchsorted(np.cumsum(self._counts), share * self._total))
        return float(_EDGES_S[min(at, BINS - 1)])

    def longer(self, than_s: float) -> float:
        """Return the share of pauses in bins that end behind ``than_s``."""
        at = int(np.searchsorted(_EDGES_S, than_s, side="right"))
        return float(self._counts[at:].sum() / self._total) if self._total else 1.0


class ThinkTimes:
    """The pauses before later turns, of all tenants and of each that had enough of late."""

    def __init__(self) -> None:
        self._all = Pauses()
        self._of: dict[str, Pauses] = {}

    def observed(self, tenant: str, pause_s: float) -> None:
        """Take note that a turn came ``pause_s`` after the end of the one before it."""
        self._all.add(pause_s)
        own = self._of.pop(tenant, None) or Pauses()
        self._of[tenant] = own  # the longest unheard of is first
        own.add(pause_s)
        if len(self._of) > MOST_GROUPS:
            del self._of[next(iter(self._of))]

    def ttl_s(self, tenant: str) -> float:
        """Return for how long after a turn the next one is worth waiting for."""
        pauses = self._asked(tenant)
        return UNLEARNT_S if pauses is None else max(LEAST_TTL_S, MARGIN * pauses.quantile_s(QUANTILE))

    def returns(self, tenant: str, idle_s: float) -> float:
        """Return the share of pauses at least as long as ``idle_s``: how likely it is that a session which
        has been idle for so long goes on, as seen from the pauses of those that did."""
        pauses = self._asked(tenant)
        return 1.0 if pauses is None else min(1.0, pauses.longer(idle_s))

    def _asked(self, tenant: str) -> Pauses | None:
        own = self._of.get(tenant)
        if own is not None and own.seen >= ENOUGH:
            return own
        return self._all if self._all.seen >= ENOUGH else None

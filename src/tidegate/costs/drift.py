"""How far an instance's times are from what its profile predicts."""

from __future__ import annotations

import math

HALF_LIFE = 32
"""An observation counts half after so many later ones (ours)."""
FEWEST = 8
"""Observations without which a ratio says nothing (ours)."""
MOST_RATIO = 8.0
"""One observation counts as at most so many times slower or faster: a stall is not a drift (ours)."""
FOLLOWED = 1.25
"""A profile measured at an engine's start is rescaled when it is off by more than this factor (ours)."""
DRIFTED = 1.5
"""A profile that is off by more than this factor, either way, should be measured again (ours)."""


class ProfileDrift:
    """Observed over predicted seconds, as a geometric mean that fades: twice as slow and as fast cancel."""

    __slots__ = ("_logs", "_weight", "observations")

    def __init__(self) -> None:
        self.observations = 0
        self._logs = 0.0
        self._weight = 0.0

    def observe(self, predicted_s: float, observed_s: float) -> None:
        """Take one pair in; pairs that are not two positive times are left out."""
        if not (0.0 < predicted_s < math.inf and 0.0 < observed_s < math.inf):
            return
        most = math.log(MOST_RATIO)
        fade = 0.5 ** (1.0 / HALF_LIFE)
        self._logs = fade * self._logs + min(most, max(-most, math.log(observed_s / predicted_s)))
        self._weight = fade * self._weight + 1.0
        self.observations += 1

    @property
    def ratio(self) -> float | None:
        """Observed over predicted; above 1 the instance is slower. None before FEWEST observations."""
        return math.exp(self._logs / self._weight) if self.observations >= FEWEST else None

    @property
    def drifted(self) -> bool:
        """Whether the profile should be measured again."""
        return self.off_by(DRIFTED)

    def off_by(self, factor: float) -> bool:
        """Whether the ratio is known and farther from 1 than ``factor``, either way."""
        ratio = self.ratio
        return ratio is not None and not 1.0 / factor <= ratio <= factor

"""What a source of forecasts answers."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Expected = Floats | str
"""The expected values of the next periods; or, in words, why the source has none."""


class SeriesSource(Protocol):
    """Says what to expect of one series of values at or above 0, one per period."""

    @property
    def name(self) -> str:
        """What ``--source`` takes and ``SeriesForecast.source`` says."""
        ...

    @property
    def instead(self) -> str:
        """The simpler source that answers where this one cannot; "" where there is none."""
        ...

    def expected(self, history: Floats, steps: int) -> Expected:
        """Return what is expected of the next ``steps`` periods.

        Called once per period. ``history`` has the periods so far, oldest first, and NaN where nothing is
        known of one.
        """
        ...


def filled(history: Floats) -> Floats:
    """Return the history with every gap bridged by a straight line; at its ends the nearest value goes on.

    One value at least must be known.
    """
    known = np.isfinite(history)
    if known.all():
        return history
    at = known.nonzero()[0]
    return np.interp(np.arange(len(history)), at, history[at])

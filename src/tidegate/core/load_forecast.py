"""What the load is expected to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class SeriesForecast(NamedTuple):
    """What is expected of the periods to come, one value each: the mean, the 0.1 and the 0.9 quantile.

    ``source`` is who answered. Where another one was asked, ``reason`` says why it could not. Without any
    known value all are NaN and ``source`` is "".
    """

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    source: str
    reason: str = ""

    def plain(self) -> list[Any]:
        """Return lists and strings, NaN as None: what JSON holds."""
        arrays = (self.mean, self.low, self.high)
        numbers = [[None if value != value else value for value in array.tolist()] for array in arrays]
        return [*numbers, self.source, self.reason]

    @classmethod
    def of(cls, plain: Sequence[Any]) -> SeriesForecast:
        """Return the forecast that ``plain`` was made of."""
        mean, low, high = (np.array(numbers, np.float64) for numbers in plain[:3])
        return cls(mean, low, high, plain[3], plain[4])


NO_LENGTHS: NDArray[np.float64] = np.empty((0, 2))


class LoadForecast(NamedTuple):
    """What is expected of the load in each period of ``period_s`` seconds from ``at_s`` on.

    ``rate_rps`` counts what is offered. ``*_squared`` are means of squares: prefill is convex, and its mean
    cost is not the cost of the mean prompt. ``long_share`` is the share of prompts above ``long_tokens``, the
    mean prompt that was expected for the period that ended at ``at_s`` (NaN before the first). ``lengths``
    has the prompt and the answer tokens of the newest requests that were answered, a row each.
    """

    at_s: float
    period_s: float
    long_tokens: float
    rate_rps: SeriesForecast
    input_tokens: SeriesForecast
    input_tokens_squared: SeriesForecast
    output_tokens: SeriesForecast
    output_tokens_squared: SeriesForecast
    long_share: SeriesForecast
    lengths: NDArray[np.float64] = NO_LENGTHS

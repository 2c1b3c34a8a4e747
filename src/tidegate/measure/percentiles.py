"""Summaries of measured values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Summary:
    """Count, mean, percentiles and maximum of one quantity, in the quantity's own unit."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


PERCENTILES = (50, 90, 99)


def p50_p90_p99(values: NDArray[np.float64]) -> tuple[float, float, float] | None:
    """Return the percentiles of the values that are finite; None when none is.

    They interpolate linearly between order statistics (numpy's default, as vLLM's bench does).
    """
    known = values[np.isfinite(values)]
    if known.size == 0:
        return None
    p50, p90, p99 = np.percentile(known, PERCENTILES).tolist()
    return p50, p90, p99


def summarize(values: Iterable[float | None]) -> Summary | None:
    """Summarise the values that are not None; return None when there is none."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    found = p50_p90_p99(known)
    return None if found is None else Summary(known.size, float(known.mean()), *found, float(known.max()))


CONFIDENCE = 0.95
"""Of an interval over seeds."""


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of ``values`` and the ends of Student's interval for it, equal for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    from scipy.special import stdtrit  # slow to import, and few runs need it

    half = float(stdtrit(len(values) - 1, 0.5 + 0.5 * CONFIDENCE) * np.std(values, ddof=1))
    half /= math.sqrt(len(values))
    return mean, mean - half, mean + half

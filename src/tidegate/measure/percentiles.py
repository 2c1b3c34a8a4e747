"""Summaries of measured values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Summary:
    """Count, mean, percentiles and maximum of one quantity, in the quantity's own unit."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def summarize(values: Iterable[float | None]) -> Summary | None:
    """Summarise the values that are not None; return None when there is none.

    Percentiles interpolate linearly between order statistics (numpy's default, as vLLM's bench does).
    """
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if known.size == 0:
        return None
    p50, p90, p99 = np.percentile(known, (50, 90, 99)).tolist()
    return Summary(known.size, float(known.mean()), p50, p90, p99, float(known.max()))

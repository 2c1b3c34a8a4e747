"""How commands word lengths of time: latencies in ms or s, what people wait for in s to hours."""

from __future__ import annotations


def latency(seconds: float | None) -> str:
    """Return a latency, - where there is none."""
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def duration(seconds: float) -> str:
    """Return two digits or whole units: 0.25 s, 90 s, 3.4 min, 45 min, 2.5 h."""
    if seconds < 120:
        return f"{_rounded(seconds)} s"
    return f"{_rounded(seconds / 60)} min" if seconds < 7200 else f"{_rounded(seconds / 3600)} h"


def _rounded(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"

"""Charts as data: what the page draws with its script, and matplotlib as PNG."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tidegate.reports.looks import Look

Range = tuple[float, float]
THICKEST, THINNEST = 4.0, 1.6
GAPS = ((8, 8), (4, 12), (2, 14))
"""Dashes of the first, the second, and any further curve that lies on another one."""
ALIKE = 0.004
"""Of the height of a chart: curves that are nowhere farther apart coincide to the eye."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A line through (``xs``, ``ys``), None for a gap; ``low`` and ``high`` are the ends of a band, if any.

    ``dots`` has a mark at each point. ``width`` is in pixels.
    """

    label: str
    look: Look
    xs: Sequence[float]
    ys: Sequence[float | None]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dots: bool = False
    width: float = 2.0


@dataclass(frozen=True, slots=True)
class Mark:
    """A labelled line across a chart where ``axis`` ("x" or "y") has the value ``at``."""

    axis: str
    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves over one axis. ``focus`` is the part that is shown at first: the ranges of x and of y.

    ``stacked`` draws the curves as steps, each on top of the one before. ``also`` is a second reading of x: a
    factor and its unit.
    """

    title: str
    x: str
    y: str
    curves: tuple[Curve, ...]
    marks: tuple[Mark, ...] = ()
    focus: tuple[Range, Range] | None = None
    y_range: Range | None = None
    log_x: bool = False
    stacked: bool = False
    also: tuple[float, str] | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a bar."""

    label: str
    tone: int
    value: float


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of one or several parts, the text at its end, and an interval, if any."""

    label: str
    parts: tuple[Part, ...]
    text: str
    interval: Range | None = None


@dataclass(frozen=True, slots=True)
class Bars:
    """Bars on one scale from 0 to ``reach``; bars that are compared have the same ``reach``."""

    title: str
    unit: str
    bars: tuple[Bar, ...]
    reach: float
    mark: Mark | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """Panels under one heading. ``name`` is a file name without suffix, ``section`` what it is about."""

    name: str
    section: str
    heading: str
    caption: str
    panels: tuple[Panel | Bars, ...]


def told_apart(curves: Iterable[Curve]) -> tuple[Curve, ...]:
    """Return the curves thinner and thinner, and with gaps where they lie on earlier ones, to show all."""
    given = list(curves)
    step = (THICKEST - THINNEST) / max(1, len(given) - 1) if len(given) > 1 else 0.0
    first = THICKEST if len(given) > 1 else 2.5
    height = _height(given)
    found: list[Curve] = []
    for at, curve in enumerate(given):
        below = sum(_apart(curve, other) <= ALIKE * height for other in given[:at])
        look = replace(curve.look, dash=GAPS[min(below, len(GAPS)) - 1]) if below else curve.look
        found.append(replace(curve, look=look, width=round(first - step * at, 2)))
    return tuple(found)


def _height(curves: Iterable[Curve]) -> float:
    return max((y for curve in curves for y in curve.ys if y is not None), default=0.0)


def coinciding(panel: Panel) -> Iterator[tuple[str, ...]]:
    """Yield the labels of curves that lie on each other all along."""
    left = [curve for curve in panel.curves if len(curve.xs) > 1]
    height = _height(left)
    while left:
        first, *others = left
        same = [other for other in others if _apart(first, other) <= ALIKE * height]
        if same:
            yield first.label, *(curve.label for curve in same)
        left = [curve for curve in others if curve not in same]


def _apart(one: Curve, other: Curve) -> float:
    ys, more = (np.array([np.nan if y is None else y for y in c.ys]) for c in (one, other))
    if not one.xs or not other.xs:
        return float("inf")
    low, high = max(one.xs[0], other.xs[0]), min(one.xs[-1], other.xs[-1])
    if not low < high:
        return float("inf")
    xs = np.linspace(low, high, 200)
    gaps = np.abs(np.interp(xs, one.xs, ys) - np.interp(xs, other.xs, more))
    return float(np.nanmax(gaps)) if np.isfinite(gaps).any() else float("inf")


def alike_text(panels: Iterable[Panel | Bars]) -> str:
    """Return a sentence on the curves that coincide in every one of ``panels``, empty where none do."""
    found = [set(coinciding(panel)) for panel in panels if isinstance(panel, Panel)]
    both = sorted(set.intersection(*found)) if found else []
    return "".join(f" {' and '.join(labels)} coincide here." for labels in both)


def distribution(
    label: str, look: Look, values: Sequence[float], share: float, grid: Sequence[float]
) -> Curve:
    """Return the share of requests (%) up to each value of ``grid``.

    ``values`` are quantiles at equal steps of the requests that have one, which are ``share`` of all.
    """
    at = np.interp(grid, values, np.linspace(0.0, 100.0 * share, len(values)), left=0.0)
    return Curve(label, look, list(grid), [float(y) for y in at])

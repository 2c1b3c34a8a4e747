"""Some of the instances, and which of them the labels let do what.

Whole-array arithmetic costs the same for two instances as for a hundred. So a handful of instances is a
tuple of columns, walked over with floats, and more of them are an array of columns. What chooses among
instances takes either; policies need not know.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tidegate.core.errors import InternalError
from tidegate.core.instance import Role

Column = NDArray[np.float64]
Mask = NDArray[np.bool_]

FEW = 12
"""Up to this many are walked over one by one. Measured: where both ways of placing cost about the same."""

Among = tuple[int, ...] | list[int] | NDArray[np.intp]
"""Columns of some instances, ascending; an array exactly where they are more than a few."""


class Cost(Protocol):
    """A quantity that each instance has, computed where it is looked at."""

    def at(self, column: int) -> float:
        """Return that of one instance."""
        ...

    def column(self) -> Column:
        """Return those of all instances."""
        ...


def marked(mask: Mask) -> Among:
    """Return the columns that ``mask`` marks."""
    found = mask.nonzero()[0]
    return tuple(found.tolist()) if len(found) <= FEW else found


def best(cost: Cost, among: Among, *, lead: Cost | None = None) -> int:
    """Return the column of least ``cost``, or of the least pair (``lead``, ``cost``) compared in that order.

    The first one wins a tie. Raises InternalError when ``among`` is empty.
    """
    chosen = best_within(cost, among, np.inf, lead=lead)
    if chosen is None:
        raise InternalError("nothing to choose from")
    return chosen


def best_within(cost: Cost, among: Among, most: float, *, lead: Cost | None = None) -> int | None:
    """Like ``best`` among those whose ``cost`` is at most ``most``; None when there is none."""
    if isinstance(among, np.ndarray):
        return _best_of_many(cost, among, lead, most)
    chosen, least_lead, least = None, 0.0, 0.0
    for column in among:
        value = cost.at(column)
        if value > most:
            continue
        leading = 0.0 if lead is None else lead.at(column)
        if chosen is None or leading < least_lead or (leading == least_lead and value < least):
            chosen, least_lead, least = column, leading, value
    return chosen


def _best_of_many(cost: Cost, among: NDArray[np.intp], lead: Cost | None, most: float) -> int | None:
    costs = cost.column()[among]
    if most < np.inf:
        within = (costs <= most).nonzero()[0]
        if len(within) < len(among):
            among, costs = among[within], costs[within]
    if not len(among):
        return None
    if lead is not None:
        leads = lead.column()[among]
        ties = (leads == leads[leads.argmin()]).nonzero()[0]
        among, costs = among[ties], costs[ties]
    return int(among[costs.argmin()])


class Labels:
    """What the labels say, worked out once after every change of one. Masks are read-only.

    ``prefilling`` and ``decoding`` do the work of that role: its own label, or MIXED.
    """

    __slots__ = ("decoding", "decoding_mask", "everyone", "prefilling", "prefilling_mask")

    def __init__(self, role: Column) -> None:
        self.prefilling_mask: Mask = role != float(Role.DECODE)
        self.decoding_mask: Mask = role != float(Role.PREFILL)
        self.prefilling_mask.setflags(write=False)
        self.decoding_mask.setflags(write=False)
        self.prefilling: Among = marked(self.prefilling_mask)
        self.decoding: Among = marked(self.decoding_mask)
        self.everyone: Among = marked(np.ones(len(role), dtype=np.bool_))

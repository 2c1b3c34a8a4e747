"""Which instances the labels let do which work."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tidegate.core.instance import Role

Column = NDArray[np.float64]
Mask = NDArray[np.bool_]

FEW = 12
"""Up to this many instances are priced one by one with floats, more of them with arrays: whole-array
arithmetic costs the same for two as for a hundred. Measured: here both cost about the same."""

Candidates = tuple[int, ...] | list[int] | NDArray[np.intp]
"""Columns of some instances, ascending; an array exactly where they are more than ``FEW``."""


def columns_of(mask: Mask) -> Candidates:
    """Return the columns where ``mask`` is true."""
    return candidates_of(mask.nonzero()[0])


def candidates_of(columns: NDArray[np.intp]) -> Candidates:
    """Return ``columns`` as they are when they are many, as a tuple when they are few."""
    return columns if len(columns) > FEW else tuple(columns.tolist())


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
        self.prefilling: Candidates = columns_of(self.prefilling_mask)
        self.decoding: Candidates = columns_of(self.decoding_mask)
        self.everyone: Candidates = columns_of(np.ones(len(role), dtype=np.bool_))

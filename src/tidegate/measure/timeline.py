"""What a cluster did over time: samples at equal distances, and every flip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tidegate.core.instance import Role

Column = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class FlipEvent:
    """An instance was relabelled ``at_s`` seconds after the run's start."""

    at_s: float
    instance: str
    before: Role
    to: Role
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """Columns of equal length, one row per sample; sums are over all instances.

    ``roles`` has one column per entry of ``instances``: ``Role`` numbers, NaN while an instance is not
    up. ``prefill_queue_s`` is predicted work; ``kv_tokens`` is the size of the blocks that are taken, shared
    ones counted once.
    """

    instances: Sequence[str]
    at_s: Column
    roles: Column
    prefill_requests: Column
    prefill_queue_s: Column
    decode_requests: Column
    kv_tokens: Column
    kv_capacity_tokens: Column
    held_requests: Column
    flips: Sequence[FlipEvent]

"""Arrow v2, Algorithm 3: choose an instance to relabel."""

from __future__ import annotations

import numpy as np

from tidegate.core.decision import Flip
from tidegate.core.instance import Role
from tidegate.ledger.among import Column, best, marked
from tidegate.ledger.snapshot import Field, Reading, Snapshot

COOLDOWN_S = 10.0
"""Least time between two flips from prefill to decode. Narwhal; the paper names a cooldown and no value."""


def flip(snapshot: Snapshot, to: Role, reason: str, *, cooldown_s: float = 0.0) -> Flip | None:
    """Return the cheapest flip into the pool of ``to``, or None when there is no legal one.

    The cooldown counts from the last flip to decode, by whatever reason, and holds back only such flips:
    prefill load is seen coming and must be met at once, decode load builds up slowly (section 5.5). The
    pool that loses the instance keeps at least one of its label (|S| > 1).
    """
    if to == Role.DECODE and snapshot.at_s - snapshot.last_flip_to_decode_s < cooldown_s:
        return None
    source = Role.PREFILL if to == Role.DECODE else Role.DECODE
    labelled = snapshot.labelled(source)
    if np.count_nonzero(labelled) <= 1:
        return None
    movable = marked(labelled & snapshot.flippable)
    if not len(movable):
        return None
    if source == Role.PREFILL:
        other, work = Field.DECODE_REQUESTS, Field.PREFILL_QUEUE_S
    else:
        other, work = Field.PREFILL_REQUESTS, Field.DECODE_TOKENS
    # An instance that still holds the other kind of work was flipped the other way and not yet drained:
    # its indicator is 0, so it goes back first.
    chosen = best(Reading(snapshot, work), movable, lead=Settled(snapshot, other))
    return Flip(snapshot.ids[chosen], to, reason)


class Settled:
    """1 for an instance without requests of a kind, else 0. A ``Cost``."""

    __slots__ = ("_requests",)

    def __init__(self, snapshot: Snapshot, requests: int) -> None:
        self._requests = Reading(snapshot, requests)

    def at(self, column: int) -> float:
        return 0.0 if self._requests.at(column) else 1.0

    def column(self) -> Column:
        settled: Column = (self._requests.column() == 0).astype(np.float64)
        return settled


def repair(snapshot: Snapshot) -> Flip | None:
    """Return the flip that refills an empty pool whose members died, or None when none is empty (ours).

    It ignores the cooldown. A fleet whose other pool has a single instance is left alone: placement
    falls back to that instance for both phases.
    """
    mixed = np.count_nonzero(snapshot.labelled(Role.MIXED))
    if mixed:
        return None
    prefill = np.count_nonzero(snapshot.labelled(Role.PREFILL))
    if prefill == 0:
        return flip(snapshot, Role.PREFILL, "repair")
    if prefill == len(snapshot):
        return flip(snapshot, Role.DECODE, "repair")
    return None

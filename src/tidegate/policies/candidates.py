"""Which instances a placement may choose from."""

from __future__ import annotations

import numpy as np

from tidegate.core.errors import NoInstance
from tidegate.core.instance import Role
from tidegate.ledger.among import FEW, Among
from tidegate.ledger.snapshot import Field, Mask, Snapshot

PREFILL = Role.PREFILL


def members(snapshot: Snapshot, role: Role) -> Among:
    """Return the instances that do the work of ``role`` (PREFILL or DECODE): its own label, or MIXED.

    Raises NoInstance when nothing is up.
    """
    if not snapshot.ids:
        raise NoInstance("no instance is up")
    return snapshot.labels.prefilling if role is PREFILL else snapshot.labels.decoding


def marked_members(snapshot: Snapshot, role: Role) -> Mask:
    """Mark the members of ``role``. The mask is read-only."""
    labels = snapshot.labels
    return labels.prefilling_mask if role is PREFILL else labels.decoding_mask


def pool(snapshot: Snapshot, role: Role) -> Among:
    """Return the members; when there are none, every instance: an engine can always run either phase."""
    found = members(snapshot, role)
    return found if len(found) else snapshot.labels.everyone


def has_room(snapshot: Snapshot, tokens: int, held_on: str | None = None, reserve: float = 0.0) -> Mask:
    """Mark the instances whose KV caches hold ``tokens`` more beside their decodes and handoffs.

    ``held_on`` names the instance that already holds the request's KV as handoff: it needs no more there.
    ``reserve`` is the share of each cache that has to stay free.
    """
    free = snapshot.free_tokens
    if reserve:
        free = free - reserve * snapshot.kv_capacity_tokens
    fits: Mask = free >= tokens
    if held_on is not None and (held := snapshot.index.get(held_on)) is not None:
        fits[held] = free[held] >= 0
    return fits


def roomy(
    snapshot: Snapshot, candidates: Among, tokens: int, held_on: str | None = None, reserve: float = 0.0
) -> Among:
    """Narrow ``candidates`` to those that have room (see ``has_room``), perhaps to none."""
    if isinstance(candidates, np.ndarray):
        fits = has_room(snapshot, tokens, held_on, reserve)[candidates].nonzero()[0]
        if len(fits) == len(candidates):
            return candidates
        found = candidates[fits]
        return found if len(found) > FEW else tuple(found.tolist())
    held = None if held_on is None else snapshot.index.get(held_on)
    cells, free, capacity = snapshot.cells, Field.FREE_TOKENS, Field.KV_CAPACITY_TOKENS
    return [
        column
        for column in candidates
        if cells[free, column] - reserve * cells[capacity, column] >= (0 if column == held else tokens)
    ]


def fitting(snapshot: Snapshot, candidates: Among, tokens: int, held_on: str | None = None) -> Among:
    """Narrow ``candidates`` to those that have room; all of them when none has."""
    found = roomy(snapshot, candidates, tokens, held_on)
    return found if len(found) else candidates

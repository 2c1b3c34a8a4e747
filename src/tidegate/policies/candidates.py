"""Which instances a placement may choose from, and how it picks among them. All vectorised."""

from __future__ import annotations

import numpy as np

from tidegate.core.errors import NoInstance
from tidegate.core.instance import Role
from tidegate.ledger.snapshot import Column, Mask, Snapshot

PREFILL_ONLY = float(Role.PREFILL)
DECODE_ONLY = float(Role.DECODE)


def members(snapshot: Snapshot, role: Role) -> Mask:
    """Tell which instances do the work of ``role`` (PREFILL or DECODE): its own label, or MIXED.

    Raises NoInstance when nothing is up.
    """
    if not snapshot.ids:
        raise NoInstance("no instance is up")
    found: Mask = snapshot.role != (DECODE_ONLY if role == Role.PREFILL else PREFILL_ONLY)
    return found


def pool(snapshot: Snapshot, role: Role) -> Mask:
    """Return the members; when there are none, every instance: an engine can always run either phase."""
    found = members(snapshot, role)
    return found if np.count_nonzero(found) else everyone(snapshot)


def everyone(snapshot: Snapshot) -> Mask:
    """Mark every instance."""
    return np.ones(len(snapshot), dtype=np.bool_)


def has_room(snapshot: Snapshot, tokens: int, held_on: str | None = None) -> Mask:
    """Tell which instances' KV caches hold ``tokens`` more, beside their decodes and handoffs.

    A capacity of 0 is unknown and counts as room. ``held_on`` names the instance that already holds the
    request's KV as handoff, so that it is not counted twice there.
    """
    free = snapshot.kv_capacity_tokens - snapshot.decode_tokens - snapshot.handoff_tokens
    fits: Mask = free >= tokens
    if held_on is not None and (held := snapshot.index.get(held_on)) is not None:
        fits[held] = free[held] >= 0
    fits |= snapshot.kv_capacity_tokens == 0
    return fits


def fitting(snapshot: Snapshot, candidates: Mask, tokens: int, held_on: str | None = None) -> Mask:
    """Narrow ``candidates`` to those that have room for ``tokens``; all of them when none has."""
    fits = has_room(snapshot, tokens, held_on)
    fits &= candidates
    return fits if np.count_nonzero(fits) else candidates


def least(cost: Column, candidates: Mask) -> int:
    """Return the candidate of least ``cost``; the first one on a tie. There must be a candidate."""
    return int(np.where(candidates, cost, np.inf).argmin())


def least_pair(first: Column | Mask, second: Column, candidates: Mask) -> int:
    """Return the candidate whose pair of costs is least, compared lexicographically."""
    leading = np.where(candidates, first, np.inf)
    ties = leading == leading[leading.argmin()]
    ties &= candidates
    return int(np.where(ties, second, np.inf).argmin())

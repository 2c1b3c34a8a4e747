"""Which instances a placement may choose from, and which of them is best.

Only this file decides whether instances are priced one by one or all at once (see ``FEW``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tidegate.core.decision import Alternatives
from tidegate.core.errors import InternalError, NoInstance
from tidegate.core.instance import Role
from tidegate.costs.profile import ProfileTable
from tidegate.ledger.snapshot import (
    EVERYONE,
    At,
    Candidates,
    Cells,
    Column,
    Field,
    Mask,
    Snapshot,
    candidates_of,
)

PREFILL = Role.PREFILL

Price = Callable[[Cells, At, ProfileTable], Any]
"""A quantity that each instance has, in the unit that its name ends in.

It reads the cells of one instance or of all, and their cost coefficients: it is a float or a ``Column``.
"""


def cell(field: int) -> Price:
    """Return the price that is one field of the ledger."""
    return lambda cells, at, costs: cells[field, at]


FREE_TOKENS = cell(Field.FREE_TOKENS)


def member_mask(snapshot: Snapshot, role: Role) -> Mask:
    """Return which instances do the work of ``role``: its own label, or MIXED. The mask is read-only."""
    labels = snapshot.labels
    return labels.prefilling_mask if role is PREFILL else labels.decoding_mask


def pool(snapshot: Snapshot, role: Role) -> Candidates:
    """Return the instances that do the work of ``role`` (PREFILL or DECODE): its own label, or MIXED.

    When there are none, every instance: an engine can always run either phase. Raises NoInstance when nothing
    is up.
    """
    labels = snapshot.labels
    found = labels.prefilling if role is PREFILL else labels.decoding
    if len(found):
        return found
    if not snapshot.ids:
        raise NoInstance("no instance is up")
    return labels.everyone


def pool_with_room(snapshot: Snapshot, role: Role, tokens: int, held_on: str | None = None) -> Candidates:
    """Return those of the pool that have room for ``tokens`` (see ``with_room``); all of it when none has.

    Raises NoInstance when nothing is up.
    """
    candidates = pool(snapshot, role)
    found = with_room(snapshot, candidates, tokens, held_on)
    return found if len(found) else candidates


def with_room(
    snapshot: Snapshot, candidates: Candidates, tokens: int, held_on: str | None = None, reserve: float = 0.0
) -> Candidates:
    """Narrow ``candidates``, perhaps to none, to those whose KV caches hold ``tokens`` more.

    Decodes and handoffs take room. ``held_on`` names the instance that holds the request's KV as handoff: it
    needs no more there. ``reserve`` is the share of each cache that has to stay free.
    """
    cells, free, capacity = snapshot.cells, Field.FREE_TOKENS, Field.KV_CAPACITY_TOKENS
    if isinstance(candidates, np.ndarray):
        spare_tokens = _free_beyond(reserve) if reserve else FREE_TOKENS
        found = at_least(snapshot, candidates, spare_tokens, tokens)
    elif reserve:  # the same, without a call per instance
        found = [at for at in candidates if cells[free, at] - reserve * cells[capacity, at] >= tokens]
    else:
        found = [at for at in candidates if cells[free, at] >= tokens]
    held = None if held_on is None else snapshot.index.get(held_on)
    if held is None:
        return found
    if not 0.0 <= cells[free, held] - reserve * cells[capacity, held] < tokens or held not in candidates:
        return found
    return candidates_of(np.array(sorted([*found, held]), dtype=np.intp))


def price_at(snapshot: Snapshot, price: Price, column: int) -> float:
    """Return the price of one instance."""
    return float(price(snapshot.cells, column, snapshot.costs.at(column)))


def at_least(snapshot: Snapshot, candidates: Candidates, price: Price, least: float) -> Candidates:
    """Narrow ``candidates``, perhaps to none, to those whose ``price`` is at least ``least``."""
    if isinstance(candidates, np.ndarray):
        meets = price(snapshot.state, EVERYONE, snapshot.costs) >= least
        kept = meets[candidates].nonzero()[0]
        return candidates if len(kept) == len(candidates) else candidates_of(candidates[kept])
    cells, costs, rows = snapshot.cells, snapshot.costs, snapshot.costs.rows
    return [at for at in candidates if price(cells, at, rows[at] if rows else costs) >= least]


def at_most(snapshot: Snapshot, candidates: Candidates, price: Price, most: float) -> Candidates:
    """Narrow ``candidates``, perhaps to none, to those whose ``price`` is at most ``most``."""
    return at_least(snapshot, candidates, lambda cells, at, costs: -price(cells, at, costs), -most)


def best(snapshot: Snapshot, candidates: Candidates, price: Price, *, lead: Price | None = None) -> int:
    """Return the column of least ``price``, or of the least pair (``lead``, ``price``) in that order.

    The first one wins a tie. Raises InternalError when there are no candidates.
    """
    chosen = best_within(snapshot, candidates, price, np.inf, lead=lead)
    if chosen is None:
        raise InternalError("nothing to choose from")
    return chosen


def best_within(
    snapshot: Snapshot, candidates: Candidates, price: Price, most: float, *, lead: Price | None = None
) -> int | None:
    """Like ``best`` of those whose ``price`` is at most ``most``; None when there is none."""
    if isinstance(candidates, np.ndarray):
        return _best_of_many(snapshot, candidates, price, most, lead)
    cells, costs, rows = snapshot.cells, snapshot.costs, snapshot.costs.rows
    chosen, least_lead, least = None, 0.0, 0.0
    for at in candidates:
        if rows:
            costs = rows[at]
        value: float = price(cells, at, costs)
        if value > most:
            continue
        leading: float = 0.0 if lead is None else lead(cells, at, costs)
        if chosen is None or leading < least_lead or (leading == least_lead and value < least):
            chosen, least_lead, least = at, leading, value
    return chosen


def compared(snapshot: Snapshot, candidates: Candidates, prices: dict[str, Price]) -> Alternatives:
    """Return ``candidates`` with the named prices they were compared by, in that order, for the journal."""

    def terms() -> dict[str, Column]:
        state, costs = snapshot.state, snapshot.costs
        return {name: price(state, EVERYONE, costs) for name, price in prices.items()}

    return Alternatives(snapshot.ids, terms, candidates)


def _free_beyond(reserve: float) -> Price:
    free, capacity = Field.FREE_TOKENS, Field.KV_CAPACITY_TOKENS
    return lambda cells, at, costs: cells[free, at] - reserve * cells[capacity, at]


def _best_of_many(
    snapshot: Snapshot, candidates: NDArray[np.intp], price: Price, most: float, lead: Price | None
) -> int | None:
    state, costs = snapshot.state, snapshot.costs
    values = price(state, EVERYONE, costs)[candidates]
    if most < np.inf:
        within = (values <= most).nonzero()[0]
        if len(within) < len(candidates):
            candidates, values = candidates[within], values[within]
    if not len(candidates):
        return None
    if lead is not None:
        leads = lead(state, EVERYONE, costs)[candidates]
        ties = (leads == leads[leads.argmin()]).nonzero()[0]
        candidates, values = candidates[ties], values[ties]
    return int(candidates[values.argmin()])

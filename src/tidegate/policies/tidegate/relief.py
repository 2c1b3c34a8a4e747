"""Which decodes move to an instance that begins to decode because the others are crowded (ours)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tidegate.core.decision import Flip, Migrate
from tidegate.core.instance import Role
from tidegate.ledger.live_table import NOWHERE
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.tidegate.cost import answer_tokens


def relief(snapshot: Snapshot, flips: Sequence[Flip], why: str) -> list[Migrate]:
    """Return the moves after which instances that ``flips`` have decode run as many decodes as the others, as
    far as their KV has room for the decodes and for as much as answers grow.

    The newest answers move: they have most to come, and have lost least on their targets. Those that move
    already, or wait for their KV, stay as they are.
    """
    fleet = snapshot.without_draining()
    joins = [fleet.index[flip.instance] for flip in flips if flip.to is Role.MIXED]
    if not joins:
        return []
    rows, everywhere = fleet.requests, snapshot.requests
    among = fleet.labels.decoding_mask.copy()
    among[joins] = True
    among[[fleet.index[flip.instance] for flip in flips if flip.to is Role.PREFILL]] = False
    on = np.where(rows.moving_to == NOWHERE, rows.decode_on, rows.moving_to)
    decodes = np.bincount(on[on != NOWHERE], minlength=len(fleet))
    share = np.ceil(decodes[among].sum() / among.sum())
    runs = (on != NOWHERE) & among[on] & (everywhere.source_on == NOWHERE) & (everywhere.moving_to == NOWHERE)
    free = fleet.free_tokens - fleet.prefill_tokens
    grows = answer_tokens(fleet)
    moves = []
    for row in np.flatnonzero(runs)[np.argsort(rows.answer_tokens[runs], kind="stable")].tolist():
        source, tokens = int(on[row]), float(rows.context_tokens[row]) + grows
        to = min(joins, key=lambda at: decodes[at])
        if source in joins or decodes[source] <= share or decodes[to] >= share or free[to] < tokens:
            continue
        decodes[source] -= 1
        decodes[to] += 1
        free[to] -= tokens
        moves.append(Migrate(rows.ids[row], fleet.ids[source], fleet.ids[to], why))
    return moves

"""Which decodes move to instances that begin to decode because the others are crowded (ours)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tidegate.core.decision import Migrate
from tidegate.ledger.live_table import NOWHERE
from tidegate.ledger.snapshot import Snapshot


def relief(fleet: Snapshot, joins: Sequence[str], why: str) -> list[Migrate]:
    """Return the moves after which those that join decode as many requests as the others, as far as their KV
    has room.

    The newest decodes move: they have least KV, most of their answer to come, and least lost on their target.
    """
    if not joins:
        return []
    rows, columns = fleet.requests, [fleet.index[name] for name in joins]
    runs = (rows.decode_on != NOWHERE) & (rows.source_on == NOWHERE) & (rows.moving_to == NOWHERE)
    decodes = fleet.decode_requests.copy()
    among = fleet.labels.decoding_mask.copy()
    among[columns] = True
    share = np.ceil(decodes[among].sum() / among.sum())
    free = fleet.free_tokens.copy()
    moves = []
    for row in np.flatnonzero(runs)[np.argsort(rows.answer_tokens[runs], kind="stable")].tolist():
        on, tokens = int(rows.decode_on[row]), float(rows.context_tokens[row])
        to = min(columns, key=lambda at: decodes[at])
        if on in columns or decodes[on] <= share or decodes[to] >= share or free[to] < tokens:
            continue
        decodes[on], decodes[to], free[to] = decodes[on] - 1, decodes[to] + 1, free[to] - tokens
        moves.append(Migrate(rows.ids[row], fleet.ids[on], fleet.ids[to], why))
    return moves

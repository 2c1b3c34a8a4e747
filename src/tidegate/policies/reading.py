"""Whether a prefill reads the KV of earlier turns from the instance that holds it."""

from __future__ import annotations

from tidegate.core.request import Request
from tidegate.costs.forms import attention_work
from tidegate.costs.profile import UNMEASURED
from tidegate.ledger.snapshot import Field, Snapshot

LEAST_READ_TOKENS = 64
"""What reading KV back has to save where nothing is known of costs. vLLM's own threshold."""


def read_where_worth(request: Request, snapshot: Snapshot, prefill_on: str) -> bool:
    """Tell whether reading a request's history to ``prefill_on`` beats computing it: a ``ReadBack``.

    Reading costs the holder a step over the block that its prefix cache lacks, and the link the rest; in
    return the prefill is so much shorter (AMPD, section 4: local or remote incremental prefill, here for the
    remote one only).
    """
    history = request.history
    if history is None:
        return False
    column, cells = snapshot.index[prefill_on], snapshot.cells
    held, block_tokens = history.tokens, int(cells[Field.BLOCK_TOKENS, column])
    here = min(held, request.cached.get(prefill_on, 0))
    saved = held - here
    if saved < block_tokens:
        return False
    costs = snapshot.costs.at(column)
    if costs.prefill == UNMEASURED.prefill:
        return saved >= LEAST_READ_TOKENS

    def compute_s(cached: int) -> float:
        new = request.prompt_tokens - cached
        return float(costs.prefill.seconds(new, attention_work(new, cached)))

    export_s = float(costs.prefill.seconds(block_tokens, attention_work(block_tokens, held)))
    moved_s = float(costs.transfer.seconds(saved * cells[Field.KV_BYTES_PER_TOKEN, column]))
    return export_s + moved_s + compute_s(held) < compute_s(here)

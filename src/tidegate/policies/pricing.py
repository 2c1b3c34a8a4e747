"""What a request would cost on an instance, in predicted seconds or tokens (see ``Price``)."""

from __future__ import annotations

import numpy as np

from tidegate.core.request import Request
from tidegate.costs.forms import attention_work, greater
from tidegate.costs.profile import ProfileTable
from tidegate.ledger.snapshot import EVERYONE, At, Cells, Column, Field, Snapshot, prefill_wait_s
from tidegate.policies.candidates import Price, cell, price_at

QUEUED_TOKENS = cell(Field.PREFILL_TOKENS)
"""Prompt tokens that are queued or running in prefill."""
RESIDENT_TOKENS = cell(Field.DECODE_TOKENS)
"""Tokens of the running decodes, prompt and generated."""


def own_prefill_s(request: Request, snapshot: Snapshot) -> Price:
    """Return T(r, i), the request's own prefill time: of the tokens that the instance has to compute.

    Where all instances have the same profile and none has a part of the prompt, it is worked out once.
    """
    if request.cached:
        return _prefill_beside_hits(request, snapshot)
    new = request.prompt_tokens
    work = attention_work(new, 0)
    if snapshot.costs.rows:
        return lambda cells, at, costs: costs.prefill.seconds(new, work)
    same_s = snapshot.costs.prefill.seconds(new, work)
    return lambda cells, at, costs: same_s


def cached_tokens(request: Request, snapshot: Snapshot) -> Column:
    """Return how many tokens of the prompt the cache of each instance has."""
    has = np.zeros(len(snapshot))
    for name, tokens in request.cached.items():
        column = snapshot.index.get(name)
        if column is not None:
            has[column] = tokens
    return has


def _prefill_beside_hits(request: Request, snapshot: Snapshot) -> Price:
    prompt_tokens = float(request.prompt_tokens)
    has = cached_tokens(request, snapshot)

    def price(cells: Cells, at: At, costs: ProfileTable) -> float | Column:
        new = greater(prompt_tokens - has[at], 1.0)
        return costs.prefill.seconds(new, attention_work(new, prompt_tokens - new))

    return price


def fastest_prefill_seconds(snapshot: Snapshot, request: Request) -> float:
    """Return the least T(r, i) over the instances; 0 when none is up."""
    if not len(snapshot):
        return 0.0
    return float(np.min(own_prefill_s(request, snapshot)(snapshot.state, EVERYONE, snapshot.costs)))


def wait_s(snapshot: Snapshot) -> Price:
    """Return the predicted seconds until a prefill that joins the queue now would start."""
    now_s = snapshot.at_s
    return lambda cells, at, costs: prefill_wait_s(cells, at, now_s)


def ttft_s(snapshot: Snapshot, request: Request) -> Price:
    """Return the predicted queue wait plus T(r, i): Arrow's q1 + p1 (v2, section 4)."""
    now_s, own_s = snapshot.at_s, own_prefill_s(request, snapshot)
    return lambda cells, at, costs: prefill_wait_s(cells, at, now_s) + own_s(cells, at, costs)


def step_s(request: Request, scale: float = 1.0) -> Price:
    """Return the predicted decode step once the request has joined, times ``scale``."""
    joining_tokens = float(request.prompt_tokens)

    def price(cells: Cells, at: At, costs: ProfileTable) -> float | Column:
        tokens = cells[Field.DECODE_TOKENS, at] + joining_tokens
        return scale * costs.step.seconds(cells[Field.DECODE_REQUESTS, at] + 1.0, tokens)

    return price


def tokens_over_limit(request: Request) -> Price:
    """Return resident tokens with the request, less MT(i, tpot): above 0 the step misses the target."""
    joining_tokens, tpot_s = float(request.prompt_tokens), request.slo.tpot_s

    def price(cells: Cells, at: At, costs: ProfileTable) -> float | Column:
        limit = costs.step.max_context_tokens(tpot_s, cells[Field.DECODE_REQUESTS, at] + 1.0)
        return cells[Field.DECODE_TOKENS, at] + joining_tokens - limit

    return price


def predicted_on(
    instance: str, snapshot: Snapshot, request: Request, *, decode: bool
) -> dict[str, float] | None:
    """Return what a placement on ``instance`` predicts, for the journal; None where it is not up.

    The step once a decode has joined; else the wait before the prefill, and the prefill.
    """
    at = snapshot.index.get(instance)
    if at is None:
        return None
    if decode:
        return {"step_s": round(price_at(snapshot, step_s(request), at), 6)}
    own_s = price_at(snapshot, own_prefill_s(request, snapshot), at)
    return {"wait_s": round(price_at(snapshot, wait_s(snapshot), at), 6), "prefill_s": round(own_s, 6)}

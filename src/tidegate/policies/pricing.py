"""What a request would cost on each instance, in predicted seconds or tokens. All vectorised."""

from __future__ import annotations

from typing import cast

import numpy as np

from tidegate.core.request import Request
from tidegate.costs.forms import attention_work
from tidegate.ledger.snapshot import Column, Snapshot


def prefill_seconds(snapshot: Snapshot, request: Request) -> float | Column:
    """Return T(r, i), the request's own prefill time; a float where every instance has one profile."""
    new = max(1, request.prompt_tokens - request.cached_tokens)
    return snapshot.costs.prefill.seconds(new, attention_work(new, request.prompt_tokens - new))


def fastest_prefill_seconds(snapshot: Snapshot, request: Request) -> float:
    """Return the least T(r, i) over the instances; 0 when none is up."""
    return float(np.min(prefill_seconds(snapshot, request))) if len(snapshot) else 0.0


def ttft_seconds(snapshot: Snapshot, request: Request) -> Column:
    """Return the predicted queue wait plus T(r, i): Arrow's q1 + p1 (v2, section 4)."""
    return snapshot.prefill_wait_s + prefill_seconds(snapshot, request)


def step_seconds(snapshot: Snapshot, request: Request) -> Column:
    """Return the predicted decode step once the request has joined."""
    step = snapshot.costs.step.seconds(
        snapshot.decode_requests + 1.0, snapshot.decode_tokens + float(request.prompt_tokens)
    )
    return cast(Column, step)


def tokens_over_limit(snapshot: Snapshot, request: Request) -> Column:
    """Return resident tokens with the request, less MT(i, tpot): above 0 the step would miss the target."""
    limit = snapshot.costs.step.max_context_tokens(request.slo.tpot_s, snapshot.decode_requests + 1.0)
    return snapshot.decode_tokens + float(request.prompt_tokens) - limit


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
        return {"step_s": round(float(step_seconds(snapshot, request)[at]), 6)}
    wait_s = float(snapshot.prefill_wait_s[at])
    return {
        "wait_s": round(wait_s, 6),
        "prefill_s": round(float(ttft_seconds(snapshot, request)[at]) - wait_s, 6),
    }

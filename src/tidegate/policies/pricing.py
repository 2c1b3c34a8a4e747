"""What a request would cost on each instance, in predicted seconds or tokens.

A price is worked out for single instances or for all at once, by the same formula.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from tidegate.core.request import Request
from tidegate.costs.forms import attention_work
from tidegate.costs.profile import ProfileTable
from tidegate.ledger.among import Column, Cost
from tidegate.ledger.snapshot import Field, Snapshot


def prefill_seconds(costs: ProfileTable, request: Request) -> float | Column:
    """Return T(r, i), the request's own prefill time; a float where every instance has one profile."""
    new = request.prompt_tokens
    return costs.prefill.seconds(new, attention_work(new, request.prompt_tokens - new))


def fastest_prefill_seconds(snapshot: Snapshot, request: Request) -> float:
    """Return the least T(r, i) over the instances; 0 when none is up."""
    return float(np.min(prefill_seconds(snapshot.costs, request))) if len(snapshot) else 0.0


class Ttft:
    """The predicted queue wait plus T(r, i): Arrow's q1 + p1 (v2, section 4). A ``Cost``."""

    __slots__ = ("_request", "_same_s", "_snapshot")

    def __init__(self, snapshot: Snapshot, request: Request) -> None:
        self._snapshot = snapshot
        self._request = request
        costs = snapshot.costs
        self._same_s: float | None = None if costs.rows else prefill_seconds(costs, request)  # type: ignore[assignment]

    def at(self, column: int) -> float:
        return self._snapshot.prefill_wait_at(column) + self._own_s(column)

    def column(self) -> Column:
        own_s = prefill_seconds(self._snapshot.costs, self._request) if self._same_s is None else self._same_s
        return self._snapshot.prefill_wait_s + own_s

    def _own_s(self, column: int) -> float:
        if self._same_s is not None:
            return self._same_s
        return prefill_seconds(self._snapshot.costs.rows[column], self._request)  # type: ignore[return-value]


class StepSeconds:
    """The predicted decode step once the request has joined, times ``scale``. A ``Cost``."""

    __slots__ = ("_request", "_scale", "_snapshot")

    def __init__(self, snapshot: Snapshot, request: Request, scale: float = 1.0) -> None:
        self._snapshot = snapshot
        self._request = request
        self._scale = scale

    def at(self, column: int) -> float:
        cells = self._snapshot.cells
        requests, tokens = cells[Field.DECODE_REQUESTS, column], cells[Field.DECODE_TOKENS, column]
        costs = self._snapshot.costs.at(column)
        return self._price(costs, requests, tokens)  # type: ignore[return-value]  # floats in, a float out

    def column(self) -> Column:
        snapshot = self._snapshot
        return cast(Column, self._price(snapshot.costs, snapshot.decode_requests, snapshot.decode_tokens))

    def _price(self, costs: ProfileTable, requests: float | Column, tokens: float | Column) -> float | Column:
        return self._scale * costs.step.seconds(requests + 1.0, tokens + float(self._request.prompt_tokens))


class TokensOverLimit:
    """Resident tokens with the request, less MT(i, tpot): above 0 the step misses the target. A ``Cost``."""

    __slots__ = ("_request", "_snapshot")

    def __init__(self, snapshot: Snapshot, request: Request) -> None:
        self._snapshot = snapshot
        self._request = request

    def at(self, column: int) -> float:
        cells = self._snapshot.cells
        requests, tokens = cells[Field.DECODE_REQUESTS, column], cells[Field.DECODE_TOKENS, column]
        costs = self._snapshot.costs.at(column)
        return self._price(costs, requests, tokens)  # type: ignore[return-value]  # floats in, a float out

    def column(self) -> Column:
        snapshot = self._snapshot
        return cast(Column, self._price(snapshot.costs, snapshot.decode_requests, snapshot.decode_tokens))

    def _price(self, costs: ProfileTable, requests: float | Column, tokens: float | Column) -> float | Column:
        limit = costs.step.max_context_tokens(self._request.slo.tpot_s, requests + 1.0)
        return tokens + float(self._request.prompt_tokens) - limit


class Sum:
    """Two costs added. A ``Cost``."""

    __slots__ = ("_one", "_other")

    def __init__(self, one: Cost, other: Cost) -> None:
        self._one = one
        self._other = other

    def at(self, column: int) -> float:
        return self._one.at(column) + self._other.at(column)

    def column(self) -> Column:
        return self._one.column() + self._other.column()


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
        return {"step_s": round(StepSeconds(snapshot, request).at(at), 6)}
    wait_s = snapshot.prefill_wait_at(at)
    return {
        "wait_s": round(wait_s, 6),
        "prefill_s": round(Ttft(snapshot, request).at(at) - wait_s, 6),
    }

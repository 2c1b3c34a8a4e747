"""Which requests are taken under ``tidegate``: all but those that make others miss."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tidegate.core.decision import Place, Reject, Verdict
from tidegate.core.request import Request
from tidegate.costs.forms import attention_work
from tidegate.ledger.snapshot import Column, Field, Mask, Snapshot, prefill_wait_s
from tidegate.policies.candidates import price_at
from tidegate.policies.order import STARVATION_BOUND
from tidegate.policies.pricing import own_prefill_s
from tidegate.policies.tidegate.cost import MOST_TAKEN

WORTH = 1.2
"""So many times a request's work must one have that misses by it (ours): what is saved then serves more."""


class Waiting(NamedTuple):
    """The prompts of an instance that can be in time, the shortest first: what each takes and when it is due,
    in seconds from now. ``spent_s`` of it is done."""

    work_s: Column
    due_s: Column
    spent_s: float


def harmless(verdict: Verdict, request: Request, snapshot: Snapshot, multiple: float) -> Verdict:
    """Return the verdict on a prefill, or in its place the rejection of a request that makes others miss.

    It holds for the order ``feasible-sjf``: the request is served before those on its instance whose prefill
    is longer. If one of them misses by that, it is refused, unless that one has ``WORTH`` times its work, for
    then it is taken instead. One that cannot be in time itself is served last and makes nobody late until it
    has starved; then it goes first. So it is refused where the queue is longer than that. ``multiple``, the
    setting, is not asked for: a request's own lateness is its own matter.

    Its client is told to come back when the last one has ended that it would make late, or when all that wait
    have. Prompts take as much longer than predicted as of late (``Snapshot.prefill_slowness``), up to what
    decodes may take of a step. Classes other than 0 are always taken: they go before or behind all others.
    """
    place = verdict.decision
    if not isinstance(place, Place) or request.priority:
        return verdict
    at = snapshot.index[place.prefill_on]
    if not snapshot.cells[Field.PREFILL_REQUESTS, at]:
        return verdict
    slowness = max(1.0, float(snapshot.cells[Field.PREFILL_SLOWNESS, at]))
    slowness = min(slowness, 1.0 / (1.0 - MOST_TAKEN))
    own_s = slowness * price_at(snapshot, own_prefill_s(request, snapshot), at)
    due_s = request.arrival_s + request.slo.ttft_s - snapshot.at_s
    if own_s > due_s:
        refused = _starves(request, slowness * float(prefill_wait_s(snapshot.cells, at, snapshot.at_s)))
    else:
        refused = _crowds_out(own_s, due_s, _waiting(snapshot, at, slowness))
    if refused is None:
        return verdict
    return Verdict(refused, verdict.flips, verdict.alternatives, refused.reason)


def _starves(request: Request, queue_s: float) -> Reject | None:
    if queue_s <= STARVATION_BOUND * request.slo.ttft_s:
        return None
    return Reject(f"it would wait for {queue_s:.0f} s, and then go before others", queue_s)


def _crowds_out(own_s: float, due_s: float, waiting: Waiting) -> Reject | None:
    in_time, begins_s = _served(waiting)
    at = int(np.searchsorted(waiting.work_s, own_s * 1.001, side="right"))
    with_it = np.insert(waiting.work_s, at, own_s), np.insert(waiting.due_s, at, due_s)
    still, _ = _served(Waiting(*with_it, waiting.spent_s))
    late = in_time & ~np.delete(still, at)
    if not late.any() or waiting.work_s[late].min() > WORTH * own_s:
        return None
    return Reject(
        "another one would miss its first token by it", float((begins_s + waiting.work_s)[late].max())
    )


def _waiting(snapshot: Snapshot, at: int, slowness: float) -> Waiting:
    """Return who waits on an instance. What caches have of prompts the rows do not say, but the queue's sum
    does: all are taken for as much shorter."""
    rows = snapshot.requests
    here = (rows.prefill_on == at).nonzero()[0]
    tokens = rows.context_tokens[here].astype(np.float64)
    alone_s = np.asarray(snapshot.costs.at(at).prefill.seconds(tokens, attention_work(tokens, 0.0)))
    queue_s = float(snapshot.cells[Field.PREFILL_QUEUE_S, at])
    spent_s = queue_s - float(prefill_wait_s(snapshot.cells, at, snapshot.at_s))
    work_s = alone_s * (slowness * queue_s / max(float(alone_s.sum()), 1e-9))
    due_s = rows.arrival_s[here] + rows.ttft_s[here] - snapshot.at_s
    can = (work_s <= due_s).nonzero()[0]
    order = can[work_s[can].argsort(kind="stable")]
    return Waiting(work_s[order], due_s[order], slowness * spent_s)


def _served(waiting: Waiting) -> tuple[Mask, Column]:
    """Return who is in time when those that cannot be are passed over, and when each one's turn comes."""
    in_time, begins_s = np.zeros(len(waiting.work_s), np.bool_), np.zeros(len(waiting.work_s))
    now = -waiting.spent_s
    for number, (work, due) in enumerate(zip(waiting.work_s.tolist(), waiting.due_s.tolist(), strict=True)):
        begins_s[number] = now
        if now + work <= due:
            in_time[number] = True
            now += work
    return in_time, begins_s

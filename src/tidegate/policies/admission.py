"""Which requests are taken: a queue that is bounded by the time to first token that it makes."""

from __future__ import annotations

from tidegate.core.decision import Hold, Place, Reject, Verdict
from tidegate.core.request import Request
from tidegate.ledger.snapshot import Field, Snapshot, prefill_wait_s
from tidegate.policies.candidates import price_at
from tidegate.policies.pricing import own_prefill_s


def admitted(verdict: Verdict, request: Request, snapshot: Snapshot, multiple: float) -> Verdict:
    """Return the verdict on a prefill, or in its place the rejection of a request that would wait too long.

    Too long is a first token later than ``multiple`` (at least 1) times the request's TTFT target, or times
    its own prefill where that is longer: an idle fleet takes everything. The client is told to come back
    when the queue has gone down by what is too much (ours). What is predicted of the chosen instance's queue
    counts by how much longer than predicted its prefills took of late (``Snapshot.prefill_slowness``). The
    flips of the verdict stay: they are an answer to the queue.
    """
    decision = verdict.decision
    spent_s = max(0.0, snapshot.at_s - request.arrival_s)
    queue_s = own_s = 0.0
    if isinstance(decision, Place):
        at = snapshot.index[decision.prefill_on]
        slowness = snapshot.cells[Field.PREFILL_SLOWNESS, at]
        queue_s = slowness * float(prefill_wait_s(snapshot.cells, at, snapshot.at_s))
        if spent_s + queue_s <= (multiple - 1.0) * request.slo.ttft_s:
            return verdict  # However long its own prefill is.
        own_s = slowness * price_at(snapshot, own_prefill_s(request, snapshot), at)
    elif not isinstance(decision, Hold):
        return verdict
    ttft_s = spent_s + queue_s + own_s
    over_s = ttft_s - multiple * max(request.slo.ttft_s, own_s)
    if over_s <= 0.0:
        return verdict
    reason = (
        f"a first token would take {ttft_s:.1f} s, more than {multiple:g} times the target of "
        f"{request.slo.ttft_s:g} s"
    )
    # A request that a policy holds has waited in vain; the next one would wait as long.
    again_s = over_s if isinstance(decision, Place) else spent_s
    return Verdict(Reject(reason, again_s), verdict.flips, verdict.alternatives, reason)

"""Short prompts are prefilled where they decode, if that costs less than a prefill instance (DOPD).

From the notes on DOPD, section 3.8: moving an ultra-short prompt's KV takes as long as computing it, so it is
prefilled on the decode instance. The paper has a limit in tokens; here costs decide (ours), so that the limit
follows the queues: where prefill instances are behind, longer prompts stay; where decodes have no time, none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tidegate.core.decision import Path, Place, Verdict
from tidegate.core.request import Request
from tidegate.costs.forms import attention_work, positive_part
from tidegate.costs.profile import ProfileTable
from tidegate.ledger.snapshot import At, Cells, Field, Snapshot, candidates_of, prefill_wait_s
from tidegate.policies.candidates import Price, at_most, best_within, compared, price_at, with_room
from tidegate.policies.pricing import own_prefill_s, step_s, ttft_s
from tidegate.policies.protocols import PrefillPlacement, Signal

ANSWER_TOKENS = 256.0
"""The mean answer that is assumed where nothing is forecast (ours)."""
HEADROOM = 0.8
"""Of the TPOT target, what decode steps may take with the prefills between them (ours)."""


@dataclass(frozen=True, slots=True)
class LengthPlacement:
    """Asks ``inner``, and prefills on a decode instance instead what is cheaper there; it decodes there, too.

    Compared are seconds. Away: queue and prefill where ``inner`` places it, the same prefill once for each
    request that waits there or is held (whoever comes behind waits as much longer), and the transfer. Here:
    queue and prefill, in a step with the running decodes; and by how much it lengthens that step for each of
    them, as far as one TTFT target is worth the whole of an answer's TPOT targets.

    An instance may be chosen while its step with the request, stretched by the prefills that it has had per
    second of late, stays within ``HEADROOM`` of the TPOT target, and while its KV has room.
    """

    inner: PrefillPlacement

    @property
    def needs(self) -> frozenset[Signal]:
        """Those of ``inner``, and profiles."""
        return self.inner.needs | {Signal.PROFILE}

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Place both phases on the cheapest decode instance, or the prefill as ``inner`` says."""
        verdict = self.inner.place_prefill(request, snapshot)
        place = verdict.decision
        if not isinstance(place, Place) or place.path is Path.COLOCATED:
            return verdict
        decoding = candidates_of(np.flatnonzero(~snapshot.labels.prefilling_mask))
        allowed = at_most(snapshot, with_room(snapshot, decoding, request.prompt_tokens), _over(request), 0.0)
        away_s = _away_s(request, snapshot, snapshot.index[place.prefill_on])
        here = _here_s(request, snapshot)
        chosen = best_within(snapshot, allowed, here, away_s)
        if chosen is None:
            return verdict
        name = snapshot.ids[chosen]
        return Verdict(
            Place(name, name, Path.COLOCATED),
            alternatives=compared(snapshot, allowed, {"here_s": here}),
            reason="short beside a prefill elsewhere",
        )


def _away_s(request: Request, snapshot: Snapshot, at: int) -> float:
    """Return what a prefill on a prefill instance costs: the request, and those that come behind it."""
    cells, costs = snapshot.cells, snapshot.costs.at(at)
    behind = cells[Field.PREFILL_REQUESTS, at] + snapshot.held_prefills / len(snapshot.labels.prefilling)
    behind_s = behind * price_at(snapshot, own_prefill_s(request, snapshot), at)
    moved_s = costs.transfer.seconds(request.prompt_tokens * cells[Field.KV_BYTES_PER_TOKEN, at])
    return price_at(snapshot, ttft_s(snapshot, request), at) + behind_s + float(moved_s)


def _here_s(request: Request, snapshot: Snapshot) -> Price:
    """Return what a prefill beside running decodes costs: the request, and them."""
    prompt_tokens, slo, now_s = request.prompt_tokens, request.slo, snapshot.at_s
    forecast = snapshot.forecast
    answer = ANSWER_TOKENS if forecast is None else float(forecast.output_tokens.mean[0])
    weight = slo.ttft_s / (slo.tpot_s * (answer if answer > 0 else ANSWER_TOKENS))
    cached = np.array([request.cached.get(name, 0) for name in snapshot.ids], dtype=np.float64)

    def price(cells: Cells, at: At, costs: ProfileTable) -> Any:
        held = cached[at]
        new = prompt_tokens - held
        decodes, context = cells[Field.DECODE_REQUESTS, at], cells[Field.DECODE_TOKENS, at]
        shared_s = costs.mixed.seconds(new + decodes, attention_work(new, held), context)
        longer_s = positive_part(shared_s - costs.step.seconds(decodes, context))
        return prefill_wait_s(cells, at, now_s) + shared_s + weight * decodes * longer_s

    return price


def _over(request: Request) -> Price:
    """Return by how much steps with the request exceed what prefills between them leave of the target."""
    step, most_s = step_s(request), HEADROOM * request.slo.tpot_s

    def price(cells: Cells, at: At, costs: ProfileTable) -> Any:
        return step(cells, at, costs) - most_s * (1.0 - cells[Field.PREFILL_DEMAND, at])

    return price

"""Where a round is prefilled, by one cost in seconds for every way (ours, in place of AMPD's Algorithm 1).

AMPD looks at what was slow lately, and compares costs only where everybody is. Here every way is priced by
what it is predicted to do now: to the round itself, to the decodes beside it and to the prefills behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import numpy as np

from tidegate.core.decision import Alternatives, Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.costs.forms import attention_work
from tidegate.ledger.snapshot import Column, Field, Snapshot
from tidegate.policies.ampd.paths import (
    ROUND_SIGNALS,
    Home,
    bound_decode,
    home_of,
    kept_tokens,
    least,
    local,
    path_costs,
    prefill_workers,
    remote,
)
from tidegate.policies.candidates import pool_with_room
from tidegate.policies.protocols import Signal

MARGIN = 0.8
"""Share of the TTFT target behind which a predicted first token counts as late: predictions err."""
LATE_WEIGHT = 10.0
"""What a second behind that share costs, in seconds; up to a whole target, behind which all is lost on every
way, and to hurry only takes others along."""
TO_COME_TOKENS = 64.0
"""An answer of so many tokens is taken to begin at home during every prefill there: most that are hurt by one
begin behind it, and short ones are hurt most."""
PACE = 0.85
"""Share of its TPOT target up to which a neighbour may be slowed down."""
LEAST_CHUNK = 32
"""Fewer tokens per step would have a prompt take several times as long."""
MOST_BUSY = 0.95
"""A prefill instance's demand counts up to here; at 1 its queue would have no end."""


class LocalPath(NamedTuple):
    """A round's prefill beside the decodes at home: at once (``chunk_tokens`` None), or so many tokens per
    step.

    ``damage_s`` sums what the neighbours lose of their TPOT targets, as shares, times the round's TTFT
    target: a share of either target weighs the same. ``breaks`` counts those that would miss theirs.
    """

    chunk_tokens: int | None
    prefill_s: float
    damage_s: float
    breaks: int


class Neighbours(NamedTuple):
    """The decodes at home: their step now, the pace each has had, and what is known of each answer; behind
    them the one to come."""

    batch: float
    context_tokens: float
    step_s: float
    pace_s: float
    total_tokens: Column
    left_tokens: Column
    tpot_s: Column


@dataclass(frozen=True, slots=True)
class CostRouting:
    """A round goes where it costs least: home now, home in chunks, remote with the history read over, or
    remote from scratch.

    The cost adds, in seconds: the predicted first token (wait, read, prefill), what it is late by (weighed),
    the new KV's way home, what the prefills behind it are expected to wait longer, and the damage to the
    decodes beside it and to one that is to come. Home is refused while that would have a neighbour miss its
    TPOT target and there is somewhere else.
    """

    margin: float = MARGIN
    late_weight: float = LATE_WEIGHT
    pace: float = PACE
    chunks: bool = True
    needs: frozenset[Signal] = ROUND_SIGNALS

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Place the prefill on the way of least cost."""
        home, workers = home_of(request, snapshot), np.asarray(prefill_workers(snapshot))
        if not home.tokens:  # any may become its home: that where its prefill would begin first
            idle = np.asarray(pool_with_room(snapshot, Role.DECODE, request.prompt_tokens))
            waits_s = snapshot.prefill_wait_s[idle]
            if waits_s.min() < snapshot.prefill_wait_s[home.at]:
                home = Home(int(idle[waits_s.argmin()]), 0)
        paths = path_costs(request, snapshot, home, read=None)
        token = paths.first_token
        here = self._here(request, snapshot, home, float(token.wait_s[home.at]))
        token.prefill_s[home.at] = here.prefill_s
        busy = np.minimum(snapshot.prefill_demand, MOST_BUSY)
        first_s = token.seconds
        late_s, queue_s = self._late_s(request, first_s), token.prefill_s * (busy / (1.0 - busy))
        cost_s = first_s + paths.return_s + late_s + queue_s
        cost_s[home.at] += here.damage_s
        at = least(cost_s, workers)
        refused = here.breaks > 0 and (at != home.at or len(workers) > 1)
        if refused and at == home.at:
            workers = workers[workers != home.at]
            at = least(cost_s, workers)
        elif not refused and cost_s[home.at] <= cost_s[at]:
            at = home.at

        def terms() -> dict[str, Column]:
            damage_s = np.zeros(len(snapshot))
            damage_s[home.at] = here.damage_s
            own = {"late_s": late_s, "queue_s": queue_s, "damage_s": damage_s}
            return {"cost_s": cost_s} | paths.terms() | own

        among = refused or bool(snapshot.labels.prefilling_mask[home.at])
        candidates = workers if among else np.append(workers, home.at)
        alternatives = Alternatives(snapshot.ids, terms, candidates)
        if at != home.at:
            reason = f"home would break {here.breaks} neighbours" if refused else "remote costs least"
            return remote(snapshot, home, at, reason, alternatives, read=bool(token.reads[at]))
        if here.chunk_tokens is None:
            return local(snapshot, home, "home costs least", alternatives)
        on = snapshot.ids[home.at]
        place = Place(on, on, Path.COLOCATED, chunk_tokens=here.chunk_tokens)
        return Verdict(place, alternatives=alternatives, reason="home in chunks costs least")

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Decode where the session is bound."""
        return bound_decode(request, snapshot, prefill_on)

    def _late_s(self, request: Request, first_token_s: Column) -> Column:
        """Return what first tokens so far from now cost for being late."""
        ttft_s = request.slo.ttft_s
        return self.late_weight * np.minimum(np.maximum(first_token_s - self.margin * ttft_s, 0.0), ttft_s)

    def _here(self, request: Request, snapshot: Snapshot, home: Home, wait_s: float) -> LocalPath:
        """Return the cheaper way at home, behind a queue of ``wait_s``; one that breaks nobody's target
        before one that does."""
        cached = min(kept_tokens(request, snapshot, home), request.prompt_tokens - 1)
        new = request.prompt_tokens - cached
        beside = self._neighbours(request, snapshot, home)
        ways = [self._beside(request, snapshot, home, beside, new, cached, None)]
        chunk = self._chunk(snapshot, home, beside)
        if self.chunks and LEAST_CHUNK <= chunk < new:
            ways.append(self._beside(request, snapshot, home, beside, new, cached, chunk))
        ttft_s = request.slo.ttft_s

        def price(way: LocalPath) -> tuple[bool, float]:
            late_s = min(max(wait_s + way.prefill_s - self.margin * ttft_s, 0.0), ttft_s)
            return way.breaks > 0, way.prefill_s + way.damage_s + self.late_weight * late_s

        return min(ways, key=price)

    def _beside(
        self,
        request: Request,
        snapshot: Snapshot,
        home: Home,
        beside: Neighbours,
        new: int,
        cached: int,
        chunk_tokens: int | None,
    ) -> LocalPath:
        chunk = chunk_tokens or new
        steps = ceil(new / chunk)
        attention = attention_work(float(new), float(cached)) / steps
        mixed = snapshot.costs.at(home.at).mixed
        each_s = float(mixed.seconds(new / steps + beside.batch, attention, beside.context_tokens))
        slower_s = max(each_s - beside.step_s, 0.0) * np.minimum(beside.left_tokens, steps)
        slower_s /= beside.total_tokens
        spare_s = self.pace * beside.tpot_s - beside.pace_s
        breaks = np.count_nonzero((slower_s > spare_s) & (spare_s >= 0.0))
        damage_s = request.slo.ttft_s * float((slower_s / beside.tpot_s).sum())
        return LocalPath(chunk_tokens, steps * each_s, damage_s, int(breaks))

    def _chunk(self, snapshot: Snapshot, home: Home, beside: Neighbours) -> int:
        """Return the most tokens that a step beside the decodes computes within everybody's share of pace."""
        mixed = snapshot.costs.at(home.at).mixed
        spare_s = self.pace * float(beside.tpot_s.min()) - float(
            mixed.seconds(0.0, 0.0, beside.context_tokens)
        )
        per_token_s = float(mixed.b_s) + float(mixed.c_s) * home.tokens
        return int(float(mixed.n0) - beside.batch + spare_s / per_token_s) if spare_s > 0.0 else 0

    def _neighbours(self, request: Request, snapshot: Snapshot, home: Home) -> Neighbours:
        """Return who decodes at home, and who is to come. Without predicted lengths an answer is taken to be
        half done, but to have no fewer tokens in all than twice the mean so far: what a renewal shows."""
        rows = snapshot.decodes_on(home.at)
        batch = snapshot.cells[Field.DECODE_REQUESTS, home.at]
        context_tokens = snapshot.cells[Field.DECODE_TOKENS, home.at]
        step_s = float(snapshot.costs.at(home.at).step.seconds(batch, context_tokens))
        count = len(rows.answer_tokens)
        left, total, tpot_s = np.empty((3, count + 1))
        left[count] = total[count] = TO_COME_TOKENS
        tpot_s[count], tpot_s[:count] = request.slo.tpot_s, rows.tpot_s
        if count:
            answered = rows.answer_tokens
            if rows.remaining_tokens is not None:
                left[:count] = np.maximum(rows.remaining_tokens, 1.0)
            else:
                mean = answered.sum() / count
                left[:count] = np.maximum(np.maximum(2.0 * mean - answered, answered), 1.0)
            total[:count] = answered + left[:count]
        pace_s = max(float(snapshot.cells[Field.MEAN_GAP_S, home.at]), step_s)
        return Neighbours(batch, context_tokens, step_s, pace_s, total, left, tpot_s)

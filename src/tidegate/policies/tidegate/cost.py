"""What a request is predicted to cost through each instance: one sum of named terms, in seconds.

The terms of the first token (wait, read, prefill, beside) are times. Those of the decode are shares of a
target, times the TTFT target, so that using up the whole of either target weighs the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tidegate.core.request import Request
from tidegate.costs.forms import attention_work
from tidegate.ledger.live_table import NOWHERE
from tidegate.ledger.snapshot import Column, Mask, Snapshot
from tidegate.policies.ampd.cost_routing import LATE_WEIGHT, MARGIN, PACE, TO_COME_TOKENS
from tidegate.policies.ampd.paths import Home, binding_history, first_token_costs, kept_tokens
from tidegate.policies.pricing import cached_tokens

MOST_TAKEN = 0.9
"""Decodes take at most this share of the time of a step, as far as prefills beside them are concerned."""
AWAY = 20.0
"""A second of reading a session's history costs others so many more: they wait for it (ours)."""
SHORTEST_ANSWER = 4.0
"""Answers are taken for no shorter than this: those that run have just begun."""


@dataclass(frozen=True, slots=True)
class CostConstants:
    """All ours, the first three those of ``ampd-cost``. A first token later than ``margin`` of its target
    counts as late, for predictions err; a second behind that costs ``late_weight`` seconds. A step up to the
    share ``pace`` of the TPOT target does nobody harm; what is beyond costs ``late_weight`` times as much. KV
    beyond all but the share ``kv_reserve`` of a cache is at risk, as far as decodes can grow into it
    (``room_to_grow``). Prompts that will be late anyway are served
    behind the others, as far as steps can be parted: at most ``hopeless`` of the TTFT target counts of them.
    A second of reading a session's history, or of computing one again, this session's or another's whose KV
    makes room, costs ``away`` seconds more, to others: they wait for it.
    """

    margin: float = MARGIN
    late_weight: float = LATE_WEIGHT
    pace: float = PACE
    kv_reserve: float = 0.1
    hopeless: float = 0.5
    away: float = AWAY


class FirstToken(NamedTuple):
    """What passes until the first token, through each instance.

    ``wait_s`` is the queue, ``read_s`` the way of the history, ``prefill_s`` the computing of what the
    instance lacks, alone; ``beside_s`` is by how much the decodes there stretch both. ``late_s`` is what is
    late by then, weighed; none where an answer goes on, whose first token is out. ``away_s`` is the time to
    read or compute a history that is at home, and that to compute others' again whose KV the prompt's takes,
    weighed. ``damage_s`` is what the prefill's steps do to the decodes there, as far as budgets of steps are
    known (``delays_beside_s``).
    """

    wait_s: Column
    read_s: Column
    prefill_s: Column
    beside_s: Column
    late_s: Column
    away_s: Column
    damage_s: Column
    reads: Mask

    @property
    def seconds(self) -> Column:
        """The time to the first token."""
        return self.wait_s + self.read_s + self.prefill_s + self.beside_s

    def terms(self) -> dict[str, Column]:
        """Return what is summed, by name."""
        return {name: getattr(self, name) for name in self._fields[:7]}


class Decoding(NamedTuple):
    """What a decode costs on each instance: ``crowd_s`` is the step's share of the TPOT target, ``kv_s`` the
    risk that KV runs out."""

    crowd_s: Column
    kv_s: Column

    @property
    def seconds(self) -> Column:
        """Their sum."""
        return self.crowd_s + self.kv_s


def first_token(request: Request, snapshot: Snapshot, constants: CostConstants) -> FirstToken:
    """Price the prefill on every instance: fresh, with what its cache has, or with the history read over."""
    history = binding_history(request, snapshot)
    home = Home(0, 0)
    if history is not None:
        home = Home(snapshot.index[history.on], min(history.tokens, request.prompt_tokens - 1))
    before_s = snapshot.prefill_queue_s - snapshot.hopeless_s + constants.hopeless * request.slo.ttft_s
    wait_s = np.minimum(snapshot.prefill_wait_s, before_s)
    mixed = snapshot.costs.mixed
    beside_s = mixed.b_s * snapshot.decode_requests + mixed.d_s * snapshot.decode_tokens
    taken = np.minimum(beside_s / request.slo.tpot_s, MOST_TAKEN)
    stretch = taken / (1.0 - taken)
    token = first_token_costs(request, snapshot, home, read=None, waits_s=wait_s * (1.0 + stretch))
    token = token._replace(wait_s=wait_s)
    stretched_s = (wait_s + token.prefill_s) * stretch
    if request.generated:
        late_s = np.zeros(len(snapshot))
    else:
        spent_s = max(0.0, snapshot.at_s - request.arrival_s)
        ttft_s = spent_s + token.seconds + stretched_s
        late_s = constants.late_weight * np.maximum(ttft_s - constants.margin * request.slo.ttft_s, 0.0)
    damage_s = np.zeros(len(snapshot))
    if snapshot.step_tokens.any():
        read_tokens = np.where(token.reads, home.tokens, 0)
        damage_s = delays_beside_s(request, snapshot, home, read_tokens, constants)
    more_s = token.read_s + _computed_again_s(request, snapshot, home, token.prefill_s)
    lacking = request.prompt_tokens - _in_place(request, snapshot, home)
    away_s = constants.away * more_s + displaced_seconds(request, snapshot, lacking, constants)
    return FirstToken(*token[:3], stretched_s, late_s, away_s, damage_s, token.reads)


def displaced_seconds(
    request: Request, snapshot: Snapshot, tokens: float | Column, constants: CostConstants
) -> Column:
    """Price what ``tokens`` more of KV on each instance take from the histories of others, weighed as
    ``away_s``.

    They first take what neither decodes, prompts that wait nor histories of idle sessions do, then those
    histories, which are computed again as far as their sessions go on. A token of them is taken to cost what
    one of this prompt does, computed without any history.
    """
    idle_tokens = snapshot.idle_tokens_of_others(request)
    if not idle_tokens.any():
        return np.zeros(len(snapshot))
    room = np.maximum(snapshot.free_tokens - snapshot.prefill_tokens - idle_tokens, 0.0)
    displaced = np.minimum(np.maximum(tokens - room, 0.0), idle_tokens)
    prompt = float(request.prompt_tokens)
    fresh_s = np.asarray(snapshot.costs.prefill.seconds(prompt, attention_work(prompt, 0.0)))
    return constants.away * snapshot.session_goes_on * displaced * (fresh_s / prompt)


def _in_place(request: Request, snapshot: Snapshot, home: Home) -> Column:
    """Return how many tokens of the prompt each instance has, in its cache or as the session's history."""
    has = cached_tokens(request, snapshot)
    has[home.at] = kept_tokens(request, snapshot, home)
    return has


def _computed_again_s(request: Request, snapshot: Snapshot, home: Home, prefill_s: Column) -> Column:
    """Return by how much a prefill takes longer on each instance, alone, than with the session's history.

    A prefix that many share is left out: who computes it again serves those to come. A history serves one.
    """
    if not home.tokens:
        return np.zeros(len(snapshot))
    has, new = float(home.tokens), float(request.prompt_tokens - home.tokens)
    with_it_s = snapshot.costs.prefill.seconds(new, attention_work(new, has))
    more_s: Column = np.maximum(prefill_s - np.asarray(with_it_s), 0.0)
    return more_s


def delays_beside_s(
    request: Request,
    snapshot: Snapshot,
    home: Home,
    read_tokens: NDArray[np.int_],
    constants: CostConstants,
) -> Column:
    """Price what the steps of a prefill do to the decodes beside it; nothing where the budget of a step is
    unknown, as where engines choose it by what the decodes can bear.

    A chunk fills what the decodes leave of the budget. By what its step takes beyond ``pace`` of the TPOT
    target each decode there is behind, spread over its answer, once for every chunk; a share of that target
    weighs as much as one of the TTFT target. ``home`` holds the history,
    ``read_tokens`` of the prompt come from elsewhere.
    """
    cached = np.maximum(_in_place(request, snapshot, home), read_tokens)
    new = np.maximum(request.prompt_tokens - cached, 1.0)
    decodes, mixed = snapshot.decode_requests, snapshot.costs.mixed
    room = np.maximum(snapshot.step_tokens - decodes, 1.0)
    chunk, chunks = np.minimum(new, room), np.ceil(new / room)
    attention = attention_work(new, cached) / chunks
    step_s = np.asarray(mixed.seconds(chunk + decodes, attention, snapshot.decode_tokens))
    over = np.maximum(step_s / request.slo.tpot_s - constants.pace, 0.0)
    behind = np.where(snapshot.step_tokens > 0, decodes * chunks * over, 0.0)
    return request.slo.ttft_s * behind / answer_tokens(snapshot) if behind.any() else behind


def answer_tokens(snapshot: Snapshot) -> float:
    """Return how long answers become: twice what those that run have, for on average they are half done."""
    rows = snapshot.requests
    answered = rows.answer_tokens[rows.decode_on != NOWHERE]
    return max(2.0 * float(answered.mean()), SHORTEST_ANSWER) if len(answered) else TO_COME_TOKENS


def decoding(request: Request, snapshot: Snapshot, held_on: int | None, constants: CostConstants) -> Decoding:
    """Price the decode on every instance; ``held_on`` has its KV already."""
    tokens = float(request.prompt_tokens)
    step_s = snapshot.costs.step.seconds(snapshot.decode_requests + 1.0, snapshot.decode_tokens + tokens)
    share = step_s / request.slo.tpot_s
    over = np.maximum(share - constants.pace, 0.0)
    crowd_s = request.slo.ttft_s * (share + constants.late_weight * over)
    # Where a capacity is unknown, no KV is reserved and all of it is free.
    reserve = constants.kv_reserve * snapshot.kv_capacity_tokens
    free = snapshot.free_tokens - tokens
    if held_on is not None:
        free[held_on] += tokens
    missing = np.maximum(reserve - free, 0.0)
    if missing.any():
        missing = np.maximum(np.minimum(reserve, room_to_grow(snapshot)) - free, 0.0)
    if not missing.any():
        return Decoding(crowd_s, missing)
    short = missing / np.maximum(reserve, 1.0)
    return Decoding(crowd_s, request.slo.ttft_s * constants.late_weight * short)


def room_to_grow(snapshot: Snapshot) -> Column:
    """Return what decodes can still take on each instance with one more there: a whole answer each.

    Where prompts are long and few, that is far less than a share of the cache, which would keep prompts away
    from room that nobody comes to need.
    """
    return (snapshot.decode_requests + 1.0) * answer_tokens(snapshot)


def move_seconds(request: Request, snapshot: Snapshot) -> Column:
    """Return how long the KV of the prompt takes to each instance that has none of it."""
    moved_bytes = float(request.prompt_tokens) * snapshot.kv_bytes_per_token
    return np.asarray(snapshot.costs.transfer.seconds(moved_bytes))

"""The ways of a round's prefill: on the decode instance that holds the history, or elsewhere and back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tidegate.core.decision import Alternatives, Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.core.session import History
from tidegate.costs.forms import attention_work
from tidegate.costs.profile import ProfileTable
from tidegate.ledger.snapshot import EVERYONE, Candidates, Column, Field, Mask, Snapshot
from tidegate.policies.candidates import pool, pool_with_room
from tidegate.policies.protocols import Signal

ROUND_SIGNALS = frozenset({Signal.PROFILE, Signal.HISTORY})
"""What a policy for rounds of conversations needs."""


class Home(NamedTuple):
    """The decode instance of a request's session: its column, and the tokens at the prompt's beginning that
    it holds. A session that is not bound yet is at ``tokens`` 0."""

    at: int
    tokens: int


def home_of(request: Request, snapshot: Snapshot) -> Home:
    """Return the instance to which the session is bound; else the decode instance with most free KV, where it
    is to be (AMPD, section 4.4). Raises NoInstance when nothing is up."""
    history = binding_history(request, snapshot)
    if history is None:
        return Home(_most_free(request, snapshot, None), 0)
    return Home(snapshot.index[history.on], min(history.tokens, request.prompt_tokens - 1))


def binding_history(request: Request, snapshot: Snapshot) -> History | None:
    """Return the history that binds a request, None where there is none on an instance that is up."""
    history = request.history
    return history if history is not None and history.on in snapshot.index else None


def _most_free(request: Request, snapshot: Snapshot, held_on: str | None) -> int:
    """Return the decode instance with most KV that neither decodes nor sessions bound to it take."""
    candidates = pool_with_room(snapshot, Role.DECODE, request.prompt_tokens, held_on)
    return least(snapshot.session_tokens - snapshot.free_tokens, candidates)


def bound_decode(request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
    """Place a decode where its session is bound; the first round's where most KV is free."""
    history = binding_history(request, snapshot)
    if history is not None:
        on, reason = history.on, "its session is bound there"
    else:
        on, reason = snapshot.ids[_most_free(request, snapshot, prefill_on)], "most free KV"
    return Verdict(Place(prefill_on, on, Path.DISAGGREGATED), reason=reason)


class FirstTokenCosts(NamedTuple):
    """What a round's first token takes through each instance, in seconds: ``wait_s`` is the queue, ``read_s``
    the history's way to the instance, ``prefill_s`` the computing. ``reads`` tells where the history is read.
    """

    wait_s: Column
    read_s: Column
    prefill_s: Column
    reads: Mask

    @property
    def seconds(self) -> Column:
        """Their sum."""
        return self.wait_s + self.read_s + self.prefill_s

    def terms(self) -> dict[str, Column]:
        """Return what is summed, by name."""
        return {name: getattr(self, name) for name in self._fields[:3]}


class PathCosts(NamedTuple):
    """What a round's first token and its way back take through each instance, in seconds: the local path at
    the session's home, the remote one elsewhere. ``return_s`` is the new KV's way home."""

    first_token: FirstTokenCosts
    return_s: Column

    @property
    def total_s(self) -> Column:
        """All of it (AMPD, section 4.5: t_local and t_rem)."""
        return self.first_token.seconds + self.return_s

    def terms(self) -> dict[str, Column]:
        """Return what is summed, by name."""
        return self.first_token.terms() | {"return_s": self.return_s}

    def alternatives(self, snapshot: Snapshot, candidates: Candidates) -> Alternatives:
        """Return the sum and its terms for the journal."""
        return Alternatives(snapshot.ids, lambda: {"total_s": self.total_s} | self.terms(), candidates)


def first_token_costs(
    request: Request, snapshot: Snapshot, home: Home, *, read: bool | None, waits_s: Column | None = None
) -> FirstTokenCosts:
    """Price the first token on every path of a round. Remote ones read the history from home with ``read``,
    with None where that is faster than computing it again; none does where the instance has it, or where some
    cannot read.

    AMPD's sum (``read`` True) takes links for idle, and the history for at hand. With None it is priced, too,
    that others use the ports at both ends, and that the holder pins a history behind its own prefills, in a
    step beside its decodes. ``waits_s`` are the queues where those of the snapshot are not meant."""
    costs, at, prompt_tokens = snapshot.costs, home.at, float(request.prompt_tokens)
    wait_s, count = snapshot.prefill_wait_s if waits_s is None else waits_s, len(snapshot)
    if not home.tokens and not request.cached:
        fresh_s = costs.prefill.seconds(prompt_tokens, attention_work(prompt_tokens, 0.0))
        nothing = np.zeros(count)
        return FirstTokenCosts(wait_s, nothing, nothing + fresh_s, np.zeros(count, np.bool_))
    if read is not False and not snapshot.state[Field.EXTENDS_KV].all():
        read = False
    token_bytes = snapshot.cells[Field.KV_BYTES_PER_TOKEN, at]
    read_s, prefill_s = np.empty((2, count))
    reads = np.empty(count, np.bool_)
    priced = read is None
    pinned_s = np.zeros(count)
    if priced and home.tokens:
        held, tokens = snapshot.decode_requests[at], snapshot.decode_tokens[at]
        step_s = float(costs.at(at).step.seconds(held, tokens)) if held else 0.0
        pinned_s = np.maximum(wait_s[at] + step_s - wait_s, 0.0)
    outbound_tokens, inbound_tokens = snapshot.cells[Field.OUTBOUND_TOKENS, at], snapshot.inbound_tokens

    def fill(which: int | slice, costs: ProfileTable, has: float, source_tokens: float) -> None:
        new = prompt_tokens - has
        fresh_s = costs.prefill.seconds(new, attention_work(new, has))
        if read is False or source_tokens <= has:
            reads[which], read_s[which], prefill_s[which] = False, 0.0, fresh_s
            return
        new = prompt_tokens - source_tokens
        over_s = costs.transfer.seconds((source_tokens - has) * token_bytes)
        if priced:
            under_way = np.maximum(inbound_tokens[which], outbound_tokens) * token_bytes
            over_s = over_s + shared_s(over_s, under_way, costs) + pinned_s[which]
        rest_s = costs.prefill.seconds(new, attention_work(new, source_tokens))
        chosen = np.less(over_s + rest_s, fresh_s) if priced else np.True_
        reads[which], read_s[which] = chosen, over_s * chosen
        prefill_s[which] = fresh_s + (rest_s - fresh_s) * chosen

    fill(EVERYONE, costs, 0.0, float(home.tokens))
    for name, tokens in request.cached.items():
        column = snapshot.index.get(name)
        if column is not None and column != at:
            fill(column, costs.at(column), float(tokens), float(home.tokens))
    fill(at, costs.at(at), float(kept_tokens(request, snapshot, home)), 0.0)
    return FirstTokenCosts(wait_s, read_s, prefill_s, reads)


def path_costs(request: Request, snapshot: Snapshot, home: Home, *, read: bool | None) -> PathCosts:
    """Price every path of a round: its first token (``first_token_costs``) and the way home of what is new.
    With ``read`` None it is priced that others use the ports there."""
    at, back = home.at, snapshot.costs.at(home.at)
    token_bytes = snapshot.cells[Field.KV_BYTES_PER_TOKEN, at]
    new_tokens = float(request.prompt_tokens) - kept_tokens(request, snapshot, home)
    back_s = float(back.transfer.seconds(new_tokens * token_bytes))
    return_s = np.full(len(snapshot), back_s)
    if read is None and snapshot.state[Field.EXTENDS_KV].all():
        on_ports = np.maximum(snapshot.outbound_tokens, snapshot.cells[Field.INBOUND_TOKENS, at])
        return_s += shared_s(back_s, on_ports * token_bytes, back)
    return_s[at] = 0.0
    return PathCosts(first_token_costs(request, snapshot, home, read=read), return_s)


def kept_tokens(request: Request, snapshot: Snapshot, home: Home) -> int:
    """Return how much of the prompt its home has, by session or by cache."""
    return max(home.tokens, request.cached.get(snapshot.ids[home.at], 0))


def shared_s(own_s: float | Column, under_way_bytes: float | Column, costs: ProfileTable) -> float | Column:
    """Return by how much longer a transfer takes that is alone in ``own_s``, beside others on its port: they
    have half of it until they or it have ended."""
    return np.minimum(under_way_bytes / costs.transfer.bytes_per_s, own_s)


def prefill_workers(snapshot: Snapshot) -> Candidates:
    """Return the prefill pool. Raises NoInstance when nothing is up."""
    return pool(snapshot, Role.PREFILL)


def least(cost_s: Column, candidates: Candidates) -> int:
    """Return the column among ``candidates`` that costs least; the first one wins a tie."""
    columns = np.asarray(candidates)
    return int(columns[cost_s[columns].argmin()])


def local(snapshot: Snapshot, home: Home, reason: str, alternatives: Alternatives | None = None) -> Verdict:
    """Prefill at home."""
    on = snapshot.ids[home.at]
    return Verdict(Place(on, on, Path.COLOCATED), alternatives=alternatives, reason=reason)


def remote(
    snapshot: Snapshot,
    home: Home,
    at: int,
    reason: str,
    alternatives: Alternatives | None = None,
    *,
    read: bool = True,
) -> Verdict:
    """Prefill on the instance at column ``at``; ``read``: with the history that home has."""
    if at == home.at:
        return local(snapshot, home, reason, alternatives)
    source = snapshot.ids[home.at] if read and home.tokens else None
    place = Place(snapshot.ids[at], None, Path.DISAGGREGATED, source)
    return Verdict(place, alternatives=alternatives, reason=reason)

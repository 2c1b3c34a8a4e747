"""The ways of a round's prefill: on the decode instance that holds the history, or elsewhere and back."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np

from tidegate.core.decision import Alternatives, Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.costs.forms import attention_work
from tidegate.ledger.snapshot import Candidates, Column, Field, Snapshot
from tidegate.policies.candidates import FREE_TOKENS, best, pool, pool_with_room


class Home(NamedTuple):
    """The decode instance of a request's session: its column, and the tokens at the prompt's beginning that
    it holds. A session that is not bound yet is at ``tokens`` 0."""

    at: int
    tokens: int


def home_of(request: Request, snapshot: Snapshot) -> Home:
    """Return the instance to which the session is bound; else the decode instance with most free KV, where it
    is to be (AMPD, section 4.4). Raises NoInstance when nothing is up."""
    history = request.history
    at = None if history is None else snapshot.index.get(history.on)
    if history is None or at is None:
        return Home(_most_free(request, snapshot, None), 0)
    return Home(at, min(history.tokens, request.prompt_tokens - 1))


def _most_free(request: Request, snapshot: Snapshot, held_on: str | None) -> int:
    candidates = pool_with_room(snapshot, Role.DECODE, request.prompt_tokens, held_on)
    return best(snapshot, candidates, lambda cells, at, costs: -FREE_TOKENS(cells, at, costs))


def bound_decode(request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
    """Place a decode where its session is bound; the first round's where most KV is free."""
    bound = request.history is not None and request.history.on in snapshot.index
    if bound and request.history is not None:
        on, reason = request.history.on, "its session is bound there"
    else:
        on, reason = snapshot.ids[_most_free(request, snapshot, prefill_on)], "most free KV"
    return Verdict(Place(prefill_on, on, Path.DISAGGREGATED), reason=reason)


class PathCosts(NamedTuple):
    """What a round's first token and its way back take through each instance, in seconds: the local path at
    the session's home, the remote one elsewhere.

    ``wait_s`` is the queue, ``read_s`` the history's way to the instance, ``prefill_s`` the computing, and
    ``return_s`` the new KV's way home. ``read_tokens`` tells what is read: nothing where that is not asked
    for or the instance has it.
    """

    wait_s: Column
    read_s: Column
    prefill_s: Column
    return_s: Column
    read_tokens: Column

    @property
    def total_s(self) -> Column:
        """Their sum (AMPD, section 4.5: t_local and t_rem)."""
        return self.wait_s + self.read_s + self.prefill_s + self.return_s

    def alternatives(self, snapshot: Snapshot, candidates: Candidates) -> Alternatives:
        """Return the terms for the journal."""

        def terms() -> dict[str, Column]:
            return {"total_s": self.total_s} | {name: getattr(self, name) for name in self._fields[:4]}

        return Alternatives(snapshot.ids, terms, candidates)


def path_costs(request: Request, snapshot: Snapshot, home: Home, *, read: bool) -> PathCosts:
    """Price every path of a round; ``read``: remote ones read the history from home."""
    costs, cells, at = snapshot.costs, snapshot.cells, home.at
    prompt_tokens = float(request.prompt_tokens)
    has = np.zeros(len(snapshot))
    for name, tokens in request.cached.items():
        column = snapshot.index.get(name)
        if column is not None:
            has[column] = tokens
    has[at] = max(has[at], home.tokens)
    kept = has[at]
    read_tokens = np.maximum(home.tokens - has, 0.0) if read else np.zeros(len(snapshot))
    token_bytes = cells[Field.KV_BYTES_PER_TOKEN, at]
    read_s = np.where(read_tokens > 0.0, costs.transfer.seconds(read_tokens * token_bytes), 0.0)
    held = np.minimum(has + read_tokens, prompt_tokens - 1.0)
    new = prompt_tokens - held
    prefill_s = costs.prefill.seconds(new, attention_work(new, held))
    back_s = float(costs.at(at).transfer.seconds((prompt_tokens - kept) * token_bytes))
    return_s = np.full(len(snapshot), back_s)
    return_s[at] = 0.0
    return PathCosts(snapshot.prefill_wait_s, read_s, cast(Column, prefill_s), return_s, read_tokens)


def prefill_workers(snapshot: Snapshot) -> Candidates:
    """Return the prefill pool. Raises NoInstance when nothing is up."""
    return pool(snapshot, Role.PREFILL)


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

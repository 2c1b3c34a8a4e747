"""Live requests and sessions as arrays: what a policy sees of single ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tidegate.core.request import Request
from tidegate.ledger.records import InstanceEntry, RequestEntry

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

Forecast = Callable[[Sequence[Request], Integers], tuple[Floats, Floats, Floats]]
"""Tells of requests that have generated so many tokens each how many are left: mean, 0.1 and 0.9 quantile."""

NOWHERE = -1
"""The column of a request that is not in that stage, and of an instance that the snapshot does not have."""
MOST_SESSIONS = 100_000
"""How many sessions are remembered (ours); those that were not heard of for longest go first."""


@dataclass(frozen=True, slots=True)
class RequestRows:
    """One row per live request, in order of arrival in the ledger; ``ids[k]`` and ``sessions[k]`` name row k.

    ``prefill_on``, ``source_on`` and ``decode_on`` are columns of the snapshot, or NOWHERE: where the request
    is in prefill, where its KV waits to be pulled, and where it decodes; ``moving_to`` is where a migration
    under way takes it, and ``moved_at_s`` when its last one began or ended (-inf without).
    ``context_tokens`` is its KV there
    (the prompt while it is in prefill), ``generated_tokens`` what was generated since its last placement as a
    prefill. ``arrival_s``, ``ttft_s`` and ``tpot_s`` are its arrival and targets, ``max_tokens`` what it may
    generate after that placement.

    ``remaining_tokens`` is what it is predicted to generate from here on (the mean),
    ``remaining_low_tokens`` and ``remaining_high_tokens`` are the 0.1 and 0.9 quantiles; NaN where the
    deployment does not predict lengths.

    A placement's snapshot may lack instances that are up. A request there has its row, and NOWHERE as column.
    """

    ids: tuple[str, ...]
    sessions: tuple[str, ...]
    prefill_on: Integers
    source_on: Integers
    decode_on: Integers
    moving_to: Integers
    context_tokens: Integers
    generated_tokens: Integers
    max_tokens: Integers
    arrival_s: Floats
    ttft_s: Floats
    tpot_s: Floats
    remaining_tokens: Floats
    remaining_low_tokens: Floats
    remaining_high_tokens: Floats
    moved_at_s: Floats

    @classmethod
    def of(
        cls, entries: Sequence[RequestEntry], index: Mapping[str, int], forecast: Forecast | None = None
    ) -> RequestRows:
        """Read the rows from the ledger's records, in about a microsecond each."""
        requests = [entry.request for entry in entries]
        prompt = np.array([request.prompt_tokens for request in requests], np.int64)
        context = np.array(
            [e.request.prompt_tokens if e.decode is None else e.tokens_now for e in entries], np.int64
        )
        generated = context - prompt
        if forecast is None:
            mean = low = high = np.full(len(requests), np.nan)
        else:
            before = np.array([request.generated for request in requests], np.int64)
            mean, low, high = forecast(requests, before + generated)
        return cls(
            ids=tuple(request.id for request in requests),
            sessions=tuple(request.session for request in requests),
            prefill_on=_columns([entry.prefill for entry in entries], index),
            source_on=_columns([entry.source for entry in entries], index),
            decode_on=_columns([entry.decode for entry in entries], index),
            moving_to=np.array([index.get(entry.moving_to, NOWHERE) for entry in entries], np.int64),
            context_tokens=context,
            generated_tokens=generated,
            max_tokens=np.array([request.max_tokens for request in requests], np.int64),
            arrival_s=np.array([request.arrival_s for request in requests], np.float64),
            ttft_s=np.array([request.slo.ttft_s for request in requests], np.float64),
            tpot_s=np.array([request.slo.tpot_s for request in requests], np.float64),
            remaining_tokens=mean,
            remaining_low_tokens=low,
            remaining_high_tokens=high,
            moved_at_s=np.array([entry.moved_at_s for entry in entries], np.float64),
        )


def _columns(places: Sequence[InstanceEntry | None], index: Mapping[str, int]) -> Integers:
    return np.array([NOWHERE if on is None else index.get(on.spec.id, NOWHERE) for on in places], np.int64)


@dataclass(frozen=True, slots=True)
class SessionRows:
    """One row per session; ``keys[k]`` is the tenant and the session of row k.

    ``held_on`` is the snapshot's column of the instance where its last turn was decoded, or NOWHERE;
    ``context_tokens`` is the length of its history there. ``turns`` counts the turns that arrived, ``live``
    those that have not ended, and ``last_s`` is when the last one arrived or ended.
    """

    keys: tuple[tuple[str, str], ...]
    held_on: Integers
    context_tokens: Integers
    turns: Integers
    live: Integers
    last_s: Floats


@dataclass(slots=True)
class _Session:
    """What is known of one session. ``instance`` is "" while nobody holds KV of it."""

    instance: str = ""
    context_tokens: int = 0
    turns: int = 0
    live: int = 0
    last_s: float = 0.0
    last_request: str = ""


class Sessions:
    """Remembers which instance holds a session's KV, by what the ledger learns of its requests."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[tuple[str, str], _Session] = OrderedDict()

    def began(self, request: Request, now: float) -> None:
        """Take note of a turn that was placed for the first time."""
        key = (request.tenant, request.session)
        session = self._sessions.setdefault(key, _Session())
        self._sessions.move_to_end(key)
        if len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)
        session.turns += request.id != session.last_request  # a replay is no turn of its own
        session.last_request = request.id
        session.live += 1
        session.last_s = now

    def ended(self, request: Request, held_on: str, context_tokens: int, now: float) -> None:
        """Take note of a turn that ended; ``held_on`` is "" when its KV is lost."""
        session = self._sessions.get((request.tenant, request.session))
        if session is None:
            return
        session.live = max(0, session.live - 1)
        session.last_s = now
        if held_on:
            session.instance, session.context_tokens = held_on, context_tokens

    def instance_down(self, instance_id: str) -> None:
        """Take note that all KV on an instance is lost."""
        for session in self._sessions.values():
            if session.instance == instance_id:
                session.instance, session.context_tokens = "", 0

    def rows(self, index: Mapping[str, int]) -> SessionRows:
        """Return one row per session; ``index`` has the columns of the instances."""
        sessions = self._sessions.values()
        return SessionRows(
            keys=tuple(self._sessions),
            held_on=np.array([index.get(each.instance, NOWHERE) for each in sessions], np.int64),
            context_tokens=np.array([each.context_tokens for each in sessions], np.int64),
            turns=np.array([each.turns for each in sessions], np.int64),
            live=np.array([each.live for each in sessions], np.int64),
            last_s=np.array([each.last_s for each in sessions], np.float64),
        )

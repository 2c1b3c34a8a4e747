"""Sessions: which instance holds a conversation's KV, how long it is, and when it was last heard of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tidegate.core.request import Request
from tidegate.ledger.rows import NOWHERE

MOST_SESSIONS = 100_000
"""How many sessions are remembered (ours); those that were not heard of for longest go first."""

Key = tuple[str, str]
"""Tenant and session."""


@dataclass(slots=True)
class SessionRecord:
    """What is known of one session. ``instance`` is "" while nobody holds KV of it."""

    instance: str = ""
    context_tokens: int = 0
    turns: int = 0
    live: int = 0
    last_s: float = 0.0
    last_request: str = ""


@dataclass(frozen=True, slots=True)
class SessionRows:
    """One row per session; ``keys[k]`` is the tenant and the session of row k.

    ``held_on`` is the snapshot's column of the instance where its last turn was decoded, or NOWHERE;
    ``context_tokens`` is the length of its history there. ``turns`` counts the turns that arrived, ``live``
    those that have not ended, and ``last_s`` is when the last one arrived or ended.
    """

    keys: tuple[Key, ...]
    held_on: NDArray[np.int64]
    context_tokens: NDArray[np.int64]
    turns: NDArray[np.int64]
    live: NDArray[np.int64]
    last_s: NDArray[np.float64]


class SessionBook:
    """Remembers sessions by what the ledger is told of their requests."""

    def __init__(self) -> None:
        self._records: OrderedDict[Key, SessionRecord] = OrderedDict()

    def began(self, request: Request, now: float) -> None:
        """Take note of a turn that was placed for the first time."""
        key = (request.tenant, request.session)
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = SessionRecord()
            if len(self._records) > MOST_SESSIONS:
                self._records.popitem(last=False)
        else:
            self._records.move_to_end(key)
        record.turns += request.id != record.last_request  # a replay is no turn of its own
        record.last_request = request.id
        record.live += 1
        record.last_s = now

    def ended(self, request: Request, held_on: str, context_tokens: int, now: float) -> None:
        """Take note of a turn that ended; ``held_on`` is "" when its KV is lost."""
        record = self._records.get((request.tenant, request.session))
        if record is None:
            return
        record.live = max(0, record.live - 1)
        record.last_s = now
        if held_on:
            record.instance, record.context_tokens = held_on, context_tokens

    def instance_down(self, instance_id: str) -> None:
        """Take note that all KV on an instance is lost."""
        for record in self._records.values():
            if record.instance == instance_id:
                record.instance, record.context_tokens = "", 0

    def find(self, tenant: str, session: str) -> SessionRecord | None:
        """Return what is known of a session; None for one that was never heard of, or was forgotten."""
        return self._records.get((tenant, session))

    def rows(self, index: Mapping[str, int]) -> SessionRows:
        """Return one row per session; ``index`` numbers the instances."""
        records = self._records.values()
        return SessionRows(
            keys=tuple(self._records),
            held_on=np.array([index.get(record.instance, NOWHERE) for record in records], np.int64),
            context_tokens=np.array([record.context_tokens for record in records], np.int64),
            turns=np.array([record.turns for record in records], np.int64),
            live=np.array([record.live for record in records], np.int64),
            last_s=np.array([record.last_s for record in records], np.float64),
        )

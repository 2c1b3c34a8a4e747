"""Sessions: which instance holds the KV of a conversation, by what the ledger learns of its requests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tidegate.core.request import Request
from tidegate.ledger.live_table import NOWHERE
from tidegate.ledger.rows import Floats, Integers

SessionKey = tuple[str, str]
"""A tenant and the name of a session: the same name of two tenants is two sessions."""
MOST_SESSIONS = 100_000
"""How many sessions are remembered (ours); those that were not heard of for longest go first."""


@dataclass(frozen=True, slots=True)
class SessionRows:
    """One row per session; ``keys[k]`` is the tenant and the session of row k.

    ``held_on`` is the snapshot's column of the instance to which it is bound, where its last turn was
    decoded, or NOWHERE; ``context_tokens`` is the length of its history there. ``turns`` counts the turns
    that arrived, ``live`` those that have not ended, and ``last_s`` is when the last one arrived or ended.
    """

    keys: tuple[SessionKey, ...]
    held_on: Integers
    context_tokens: Integers
    turns: Integers
    live: Integers
    last_s: Floats


@dataclass(slots=True)
class SessionEntry:
    """What is known of one session. ``instance``, to which it is bound, is "" while nobody holds its KV.

    The control plane adds of the last turn that ended: ``block_keys``, which name its blocks, those of its
    answer with them where ``names_answer``; ``prompt_tokens``, the length of its prompt; ``end``, which
    stands for all that was said by then. And ``gone``, why the KV of ``gone_tokens`` tokens is not expected
    anywhere any more; ``said_on``, where the journal last said that it is bound.
    """

    key: SessionKey
    instance: str = ""
    context_tokens: int = 0
    turns: int = 0
    live: int = 0
    last_s: float = 0.0
    last_request: str = ""
    block_keys: Sequence[int] = ()
    names_answer: bool = True
    prompt_tokens: int = 0
    end: int | None = None
    gone: str = ""
    gone_tokens: int = 0
    said_on: str = ""


class Sessions:
    """The sessions by key, and those bound to each instance; ``held_tokens`` sums the history there, and
    ``idle_tokens`` that of the sessions without a turn in flight."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[SessionKey, SessionEntry] = OrderedDict()
        self._bound: dict[str, dict[SessionKey, SessionEntry]] = {}
        self.held_tokens: dict[str, int] = {}
        self.idle_tokens: dict[str, int] = {}
        self._turns = self._later_turns = 0

    @property
    def goes_on(self) -> float:
        """How likely a session goes on: the share of all turns so far that were not their session's first."""
        return self._later_turns / max(1, self._turns)

    def find(self, key: SessionKey) -> SessionEntry | None:
        """Return a session that is remembered."""
        return self._sessions.get(key)

    def bound_to(self, instance_id: str) -> list[SessionEntry]:
        """Return the sessions that are bound to an instance, the longest bound first."""
        return list(self._bound.get(instance_id, {}).values())

    def began(self, request: Request, now: float) -> None:
        """Take note of a turn that was placed for the first time."""
        key = (request.tenant, request.session)
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = SessionEntry(key)
        self._sessions.move_to_end(key)
        if len(self._sessions) > MOST_SESSIONS:
            self.unbind(self._sessions.popitem(last=False)[1])
        if request.id != session.last_request:  # a replay is no turn of its own
            self._turns += 1
            self._later_turns += session.turns > 0
            session.turns += 1
            session.last_request = request.id
        if session.instance and not session.live:
            self.idle_tokens[session.instance] -= session.context_tokens
        session.live += 1
        session.last_s = now

    def ended(self, request: Request, held_on: str, context_tokens: int, now: float) -> None:
        """Take note of a turn that ended; ``held_on`` is "" when its KV is lost."""
        session = self._sessions.get((request.tenant, request.session))
        if session is None:
            return
        was_live, session.live = session.live, max(0, session.live - 1)
        session.last_s = now
        if was_live and not session.live and session.instance:
            self._count_idle(session.instance, session.context_tokens)
        if held_on:
            self.bind(session, held_on, context_tokens)

    def bind(self, session: SessionEntry, instance_id: str, context_tokens: int) -> None:
        """Bind a session to an instance that holds KV of so many tokens of it, and to no other."""
        self.unbind(session)
        session.instance, session.context_tokens = instance_id, context_tokens
        self._bound.setdefault(instance_id, {})[session.key] = session
        self.held_tokens[instance_id] = self.held_tokens.get(instance_id, 0) + context_tokens
        if not session.live:
            self._count_idle(instance_id, context_tokens)

    def unbind(self, session: SessionEntry) -> None:
        """Say that nobody holds a session's KV any more."""
        on = session.instance
        if on:
            del self._bound[on][session.key]
            self.held_tokens[on] -= session.context_tokens
            if not session.live:
                self.idle_tokens[on] -= session.context_tokens
            session.instance, session.context_tokens = "", 0

    def instance_down(self, instance_id: str) -> None:
        """Take note that all KV on an instance is lost."""
        for session in self.bound_to(instance_id):
            self.unbind(session)
        self._bound.pop(instance_id, None)
        self.held_tokens.pop(instance_id, None)
        self.idle_tokens.pop(instance_id, None)

    def _count_idle(self, instance_id: str, tokens: int) -> None:
        self.idle_tokens[instance_id] = self.idle_tokens.get(instance_id, 0) + tokens

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

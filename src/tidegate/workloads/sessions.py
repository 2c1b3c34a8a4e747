"""Session files: which blocks a turn shares with earlier ones, and how long its client paused.

Such files publish for every turn how many tokens its prompt shares with a recent request of the same
session (``prefix_hit_tokens``), not which. From that, block ids are made up that share exactly as much.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from tidegate.workloads.trace import TraceRecord, session_of

RECENT_REQUESTS = 12
"""How many earlier requests of a session a prompt may share a prefix with: as the files were made."""
ID_BUDGET = 16_000_000
"""Most block ids a file may need: 128 MB of references. Its block is the smallest that stays below."""
BLOCK_CHOICES = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class SessionTurn:
    """A record as read, with what the session file says beside it.

    ``hit_tokens`` is the shared prefix; ``busy_s`` the recorded time of the answer, 0 if unknown;
    ``session_t_s`` the request's time in its session, None if unknown.
    """

    record: TraceRecord
    hit_tokens: int
    busy_s: float = 0.0
    session_t_s: float | None = None


@dataclass(slots=True)
class _Earlier:
    agent: str
    tokens: int
    ids: tuple[int, ...]


@dataclass(slots=True)
class _Session:
    recent: deque[_Earlier] = field(default_factory=lambda: deque(maxlen=RECENT_REQUESTS))
    ends_s: dict[str, float] = field(default_factory=dict)


def with_prefixes(turns: Sequence[SessionTurn], block_tokens: int | None = None) -> Iterator[TraceRecord]:
    """Yield the records with ``hash_ids`` and, where it can be told, ``delay_s``.

    Ids are numbered through the file. A turn's first ``floor(hit_tokens / block)`` ids are those of an
    earlier request of its session, its other ids are new, and they go on to the end of its answer, so
    that the next turn may share the answer, too. The earlier request is the latest that is long enough,
    of the same agent before one of the same kind (sub-agents share their instructions) before any other;
    where none is, the longest shares what it has. Without ``block_tokens`` the block is chosen by
    ``fitting_block``. A missing pause is the time since the recorded end of the agent's previous answer.
    """
    block = block_tokens or fitting_block(turns)
    sessions: dict[str, _Session] = {}
    used = 0
    for turn in turns:
        record = turn.record
        session, agent = session_of(record), record.session_id
        book = sessions.setdefault(session, _Session())
        shared = _shared_ids(book.recent, session, agent, turn.hit_tokens)[: turn.hit_tokens // block]
        tokens = record.input_tokens + record.output_tokens
        fresh = max(0, -(-tokens // block) - len(shared))
        ids = shared + tuple(range(used, used + fresh))
        used += fresh
        book.recent.append(_Earlier(agent, tokens, ids))
        yield replace(record, hash_ids=ids, block_tokens=block, delay_s=_pause(turn, book))


def fitting_block(turns: Sequence[SessionTurn], budget: int = ID_BUDGET) -> int:
    """Return the smallest block of ``BLOCK_CHOICES`` with which the turns need at most ``budget`` ids."""
    tokens = sum(turn.record.input_tokens + turn.record.output_tokens for turn in turns)
    return next((block for block in BLOCK_CHOICES if tokens <= budget * block), BLOCK_CHOICES[-1])


def _shared_ids(recent: deque[_Earlier], session: str, agent: str, hit_tokens: int) -> tuple[int, ...]:
    if not hit_tokens or not recent:
        return ()
    long_enough = [e for e in reversed(recent) if e.tokens >= hit_tokens]
    if not long_enough:
        return max(recent, key=lambda e: e.tokens).ids
    main = f"{session}/main"
    return min(
        long_enough, key=lambda e: 0 if e.agent == agent else 1 + ((e.agent == main) != (agent == main))
    ).ids


def _pause(turn: SessionTurn, book: _Session) -> float | None:
    agent, delay_s = turn.record.session_id, turn.record.delay_s
    end_s = book.ends_s.get(agent)
    if turn.session_t_s is not None:
        book.ends_s[agent] = turn.session_t_s + turn.busy_s
        if delay_s is None and end_s is not None:
            return max(0.0, turn.session_t_s - end_s)
    return delay_s

"""Session files: which blocks a turn shares with earlier ones, and how long its client paused.

Such files publish for every turn how many tokens its prompt shares with a recent request of the same
session (``prefix_hit_tokens``), not which. From that, block ids are made up that share exactly as much.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from tidegate.workloads.trace import Floats, Integers, Workload, array

RECENT_REQUESTS = 12
"""How many earlier requests of a session a prompt may share a prefix with: as the files were made."""
ID_BUDGET = 16_000_000
"""Most block ids a file may need: 128 MB of references. Its block is the smallest that stays below."""
BLOCK_CHOICES = (16, 32, 64, 128, 256, 512)


@dataclass(slots=True)
class _Earlier:
    agent: str
    tokens: int
    ids: tuple[int, ...]


def with_prefixes(workload: Workload, hit_tokens: Integers, block_tokens: int | None = None) -> Workload:
    """Return the requests with ``hash_ids`` of which each row shares ``hit_tokens`` with an earlier one.

    Ids are numbered through the file. A turn's first ``floor(hit_tokens / block)`` ids are those of an
    earlier request of its session, its other ids are new, and they go on to the end of its answer, so
    that the next turn may share the answer, too. The earlier request is the latest that is long enough,
    of the same agent before one of the same kind (sub-agents share their instructions) before any other;
    where none is, the longest shares what it has. Without ``block_tokens`` the block is chosen by
    ``fitting_block``.
    """
    tokens = workload.input_tokens + workload.output_tokens
    block = block_tokens or fitting_block(int(tokens.sum()))
    recent_of: dict[str, deque[_Earlier]] = {}
    used = 0
    made: list[tuple[int, ...]] = []
    for agent, length, hit in zip(
        workload.column("session_id"), tokens.tolist(), hit_tokens.tolist(), strict=True
    ):
        session = agent.partition("/")[0]
        recent = recent_of.setdefault(session, deque(maxlen=RECENT_REQUESTS))
        shared = _shared_ids(recent, session, agent, hit)[: hit // block]
        fresh = max(0, -(-length // block) - len(shared))
        made.append(shared + tuple(range(used, used + fresh)))
        used += fresh
        recent.append(_Earlier(agent, length, made[-1]))
    return replace(
        workload,
        hash_ids=array("hash_ids", made),
        block_tokens=array("block_tokens", [block] * len(made)),
    )


def fitting_block(tokens: int, budget: int = ID_BUDGET) -> int:
    """Return the smallest block of ``BLOCK_CHOICES`` with which ``tokens`` need at most ``budget`` ids."""
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


def with_pauses(workload: Workload, session_t_s: Floats, busy_s: Floats) -> Workload:
    """Fill in missing pauses: the time since the recorded end of the agent's previous answer.

    A request came ``session_t_s`` into its session (NaN: unknown) and was answered in ``busy_s``.
    """
    ends_s: dict[str, float] = {}
    delays_s = workload.column("delay_s").copy()
    columns = (workload.column("session_id"), session_t_s.tolist(), busy_s.tolist())
    for row, (agent, at_s, busy) in enumerate(zip(*columns, strict=True)):
        if at_s != at_s:
            continue
        end_s = ends_s.get(agent)
        ends_s[agent] = at_s + busy
        if end_s is not None and delays_s[row] != delays_s[row]:
            delays_s[row] = max(0.0, at_s - end_s)
    return replace(workload, delay_s=delays_s)


def followed(workload: Workload) -> dict[int, int]:
    """Return which row follows the end of which, by the row that goes before.

    In a closed loop a turn above 0 that has a pause waits for the answer to its session's previous request.
    """
    if workload.session_id is None or workload.delay_s is None:
        return {}
    follows: dict[int, int] = {}
    last_of: dict[str, int] = {}
    later = (workload.column("turn") > 0) & ~np.isnan(workload.delay_s)
    for row, (session, waits) in enumerate(zip(workload.session_id, later.tolist(), strict=True)):
        if not session:
            continue
        if waits and session in last_of:
            follows[last_of[session]] = row
        last_of[session] = row
    return follows


def in_rounds(workload: Workload) -> bool:
    """Tell whether there are turns that in a closed loop wait for the answer before them."""
    if workload.session_id is None or workload.delay_s is None:
        return False
    return bool(((workload.column("turn") > 0) & ~np.isnan(workload.delay_s)).any())

"""Changes to a workload: its rate, its lengths, a part of it, other times."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.workloads.trace import Integers, Objects, Workload, optional

SMALLEST_BLOCK = 16
"""Tokens of the smallest prefix block that scaling makes: rounding one to a whole number then costs 3 %."""


def scale_rate(workload: Workload, factor: float) -> Workload:
    """Divide arrival times by ``factor``: 2 doubles the rate. Think times are the clients' and stay."""
    _positive("the rate factor", factor)
    return replace(workload, arrival_s=workload.arrival_s / factor)


def scale_tokens(workload: Workload, factor: float) -> Workload:
    """Multiply input and output lengths by ``factor``, at least 1 token each.

    The prefix block scales too, so that the shared share of a prompt stays what it was. Blocks that would
    become smaller than ``SMALLEST_BLOCK`` are first joined, each group named by its last block.
    """
    _positive("the token factor", factor)
    if factor == 1.0:
        return workload

    def scaled(tokens: Integers) -> Integers:
        rounded: Integers = np.maximum(1, np.rint(tokens * factor)).astype(np.int64)
        return rounded

    ids, blocks = workload.hash_ids, workload.block_tokens
    if ids is not None:
        blocks = workload.column("block_tokens")
        if factor < 1.0:
            joined = np.ceil(np.minimum(SMALLEST_BLOCK, blocks) / (blocks * factor)).astype(np.int64)
            ids, blocks = _joined(workload, joined)
        blocks = scaled(blocks)
    return replace(
        workload,
        input_tokens=scaled(workload.input_tokens),
        output_tokens=scaled(workload.output_tokens),
        hash_ids=ids,
        block_tokens=blocks,
    )


def coarsen_blocks(workload: Workload, tokens: int) -> Workload:
    """Join prefix blocks to ones of up to ``tokens``, each group named by its last block.

    Prompts share what they shared, less the part of a group at the end: on average half of one.
    """
    if workload.hash_ids is None:
        return workload
    ids, blocks = _joined(workload, tokens // workload.column("block_tokens"))
    return replace(workload, hash_ids=ids, block_tokens=blocks)


def _joined(workload: Workload, counts: Integers) -> tuple[Objects | None, Integers]:
    """Return the ids and sizes of blocks of which so many are joined, row by row."""
    ids = workload.column("hash_ids")
    counts = np.where(ids.astype(bool), np.maximum(1, counts), 1)
    rows = [row[n - 1 :: n] for row, n in zip(ids, counts.tolist(), strict=True)]
    return optional("hash_ids", rows), workload.column("block_tokens") * counts


def limit(workload: Workload, count: int) -> Workload:
    """Keep the first ``count`` requests."""
    if count < 1:
        raise ConfigError(f"the number of requests must be at least 1, got {count}")
    return workload[:count]


def window(workload: Workload, start_s: float = 0.0, duration_s: float = float("inf")) -> Workload:
    """Keep arrivals in ``[start_s, start_s + duration_s)`` and count their time from ``start_s``.

    The input must be in order of arrival. A session's turn whose earlier turns fall before the window loses
    its pause: there is no answer for it to wait for.
    """
    _positive("the duration", duration_s)
    if start_s < 0:
        raise ConfigError(f"the window starts at {start_s} s, expected 0 or more")
    first, end = np.searchsorted(workload.arrival_s, (start_s, start_s + duration_s)).tolist()
    cut = workload[first:end]
    cut = replace(cut, arrival_s=cut.arrival_s - start_s)
    if cut.session_id is None or cut.delay_s is None or not first:
        return cut
    cut_off = set(workload.column("session_id")[:first]) - {""}
    delay_s = cut.delay_s.copy()
    for row, session in enumerate(cut.session_id):
        if session in cut_off:
            cut_off.discard(session)
            delay_s[row] = np.nan
    return replace(cut, delay_s=delay_s)


def retime(workload: Workload, times_s: Iterable[float]) -> Workload:
    """Give each request, in order, the next arrival time; sessions are not kept together.

    The shorter of the two ends the result.
    """
    arrival_s = np.fromiter(islice(times_s, len(workload)), np.float64)
    return replace(workload[: len(arrival_s)], arrival_s=arrival_s)


def schedule_sessions(
    workload: Workload, starts_s: Iterable[float], turn_gap_s: float | None = None
) -> Workload:
    """Start each session at the next arrival time and merge the sessions by arrival.

    Within a session a request keeps its ``arrival_s`` as the time since the session's start; with
    ``turn_gap_s`` turn ``k`` comes ``k * turn_gap_s`` after it instead, and every turn but the first of its
    agent has that as its pause (``delay_s``). Agents of one session share its start and run beside each
    other: each waits for its own answers only, and a sub-agent's first turn comes at its own time. A
    request without a session is a session of its own. A session's requests must be adjacent and the starts
    in order; the shorter of sessions and starts ends the result. Raises ConfigError when a session has
    several turns at the same instant and no gap is given.
    """
    begins = np.flatnonzero(np.diff(workload.units(), prepend=-1))
    starts = np.fromiter(islice(starts_s, len(begins)), np.float64)
    sizes = np.diff(begins, append=len(workload))[: len(starts)]
    chosen = workload[: int(sizes.sum())]
    turn = np.arange(len(chosen)) - np.repeat(begins[: len(starts)], sizes)
    if turn_gap_s is None:
        unclear = np.flatnonzero((turn == 1) & (chosen.arrival_s == 0.0))
        if len(unclear):
            raise ConfigError(
                f"session {chosen[int(unclear[0])].session_id!r} has several turns and no times within the "
                "session; give the seconds between turns (--turn-gap)"
            )
        offset_s, delay_s = chosen.arrival_s, chosen.delay_s
    else:
        offset_s = (turn * turn_gap_s).astype(np.float64)
        delay_s = np.where(chosen.column("turn") > 0, turn_gap_s, chosen.column("delay_s"))
    arrival_s = np.repeat(starts, sizes) + offset_s
    return replace(chosen, arrival_s=arrival_s, delay_s=delay_s)[arrival_s.argsort(kind="stable")]


def by_session(workload: Workload) -> Workload:
    """Take a timed trace apart into sessions: the input that ``schedule_sessions`` wants.

    Sessions come in the order of their first request, each with its requests adjacent and timed since that
    request.
    """
    units = workload.units()
    starts_s = workload.arrival_s[np.unique(units, return_index=True)[1]]
    since_s = workload.arrival_s - starts_s[units]
    return replace(workload, arrival_s=since_s)[units.argsort(kind="stable")]


def _positive(what: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{what} must be positive, got {value}")

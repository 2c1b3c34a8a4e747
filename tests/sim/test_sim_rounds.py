"""Conversations in the simulator, under the systems that decide where their rounds are prefilled."""

from __future__ import annotations

import numpy as np
import pytest

from tidegate.costs.library import packaged_profile
from tidegate.dataplane.replica import replicas_of
from tidegate.measure.request_table import RequestTable
from tidegate.sim import SimSettings, simulate
from tidegate.systems import make_system
from tidegate.workloads.trace import TraceRecord

BLOCK, FIRST, NEW, ANSWER, ROUNDS = 16, 1600, 320, 16, 4


def said_tokens(turn: int) -> int:
    """Return the length of a turn's prompt."""
    return FIRST + turn * (NEW + ANSWER)


def conversations(count: int) -> list[TraceRecord]:
    """Return sessions of four rounds, each of which repeats all that was said before."""
    return [
        TraceRecord(
            arrival_s=0.2 * session + 0.001 * turn,
            input_tokens=said_tokens(turn),
            output_tokens=ANSWER,
            session_id=f"s{session}",
            turn=turn,
            delay_s=0.5 if turn else None,
            hash_ids=tuple(
                session * 1000 + at for at in range((FIRST + turn * (NEW + ANSWER) + ANSWER) // BLOCK)
            ),
            block_tokens=BLOCK,
        )
        for session in range(count)
        for turn in range(ROUNDS)
    ]


def served(system: str) -> RequestTable:
    fleet = replicas_of(packaged_profile("h100_sxm/llama-3.1-8b"), 3)
    made = make_system(system, split=None if system.startswith("colocated") else (2, 1))
    return simulate(conversations(12), made, fleet, SimSettings(closed_loop=True)).requests


@pytest.mark.parametrize("system", ["ampd", "ampd-cost", "always-remote-return", "always-local", "ppd"])
def test_a_session_stays_with_its_decode_instance(system: str) -> None:
    table = served(system)
    assert table.ok.all() and len(np.unique(table.decode_on)) == 1
    home = table.prefill_on == table.decode_on
    new = (table.input_tokens - table.cached_tokens)[home & (table.input_tokens > FIRST)]
    assert (new <= NEW + ANSWER + BLOCK).all(), "what is there is not computed again"


def test_every_round_runs_where_its_system_says() -> None:
    local = served("always-local")
    later = local.input_tokens > FIRST
    assert (local.prefill_on == local.decode_on).tolist() == later.tolist()
    for system in ("always-remote", "always-remote-return"):
        remote = served(system)
        assert (remote.prefill_on != remote.decode_on).all()
    moved = {name: served(name).kv_transfer_bytes.sum() for name in ("always-local", "always-remote-return")}
    assert moved["always-local"] < moved["always-remote-return"]


def test_sticky_sessions_find_their_history() -> None:
    table = served("colocated-sticky")
    assert (table.prefill_on == table.decode_on).all()
    later = table.input_tokens > FIRST
    assert ((table.input_tokens - table.cached_tokens)[later] <= NEW + ANSWER + BLOCK).all()

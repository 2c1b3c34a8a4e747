"""Session files: shared prefixes, pauses, and what becomes of them when sessions are scheduled or cut."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.errors import TraceError
from tidegate.workloads.readers import read_trace, read_untimed
from tidegate.workloads.sessions import fitting_block, with_prefixes
from tidegate.workloads.trace import TraceRecord, Workload
from tidegate.workloads.transform import by_session, schedule_sessions, window

AGENTIC = (
    "session_id,agent,round,session_t_s,input_tokens,output_tokens,"
    "prefix_hit_tokens,think_time_s,api_time_s\n"
)


def shared(one: TraceRecord, other: TraceRecord) -> int:
    pairs = zip(one.hash_ids, other.hash_ids, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(one.hash_ids), len(other.hash_ids)))


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[TraceRecord, int]]:
    """Sessions whose every turn shares so many tokens, up to all, of the turn before it, answer included."""
    turns: list[tuple[TraceRecord, int]] = []
    for session in range(draw(st.integers(1, 3))):
        held = 0
        for turn in range(draw(st.integers(1, 5))):
            hit = draw(st.integers(0, held))
            inputs = hit + draw(st.integers(1, 700))
            outputs = draw(st.integers(1, 300))
            turns.append((TraceRecord(0.0, inputs, outputs, session_id=f"s{session}", turn=turn), hit))
            held = inputs + outputs
    return turns


@given(conversations(), st.sampled_from((16, 64, 512)))
def test_consecutive_turns_share_exactly_the_published_prefix(
    turns: list[tuple[TraceRecord, int]], block: int
) -> None:
    bare, hits = zip(*turns, strict=True)
    records = list(with_prefixes(Workload.of(bare), np.array(hits), block))
    for before, after, hit in zip(records, records[1:], hits[1:], strict=False):
        if before.session_id == after.session_id:
            assert shared(before, after) == hit // block
        else:
            assert not set(before.hash_ids) & set(after.hash_ids)
    for record in records:
        assert len(record.hash_ids) == -(-(record.input_tokens + record.output_tokens) // block)


def test_the_block_is_as_fine_as_the_budget_allows() -> None:
    assert [fitting_block(64_000, budget) for budget in (4000, 3999, 130, 1)] == [16, 32, 512, 512]


def test_a_sub_agent_shares_with_its_like_and_a_missing_pause_is_told_from_the_times(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text(
        AGENTIC
        + "7,main,0,0.0,1024,16,0,0.0,5.0\n"
        + "7,agent_1,0,2.0,512,16,0,0.0,1.0\n"
        + "7,main,1,20.0,1280,16,1024,12.0,\n"
        + "7,agent_2,0,21.0,600,16,512,0.0,1.0\n"
        + "7,main,2,30.0,1400,16,1280,,2.0\n"
    )
    main, agent, second, other, third = read_untimed(path)
    assert (main.block_tokens, second.turn, second.session_id) == (16, 1, "7/main")
    assert shared(main, second) == 1024 // 16
    assert (shared(agent, other), shared(second, other)) == (512 // 16, 0)
    assert (second.delay_s, third.delay_s) == (12.0, 10.0)


def test_a_prefix_longer_than_its_prompt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text(AGENTIC + "7,main,0,0.0,100,16,101,0.0,5.0\n")
    with pytest.raises(TraceError, match=r"s\.csv:2:21: prefix_hit_tokens is 101, more than the 100"):
        list(read_untimed(path))


def test_the_gap_is_the_pause_of_a_closed_loop_too() -> None:
    turns = Workload.of(TraceRecord(0.0, 5, 1, session_id="a", turn=k) for k in range(3))
    made = list(schedule_sessions(turns, iter([1.0]), 2.0))
    assert [(r.arrival_s, r.delay_s) for r in made] == [(1.0, None), (3.0, 2.0), (5.0, 2.0)]


def test_a_timed_trace_comes_apart_into_sessions_and_back() -> None:
    times = [("a/main", 5.0), ("b", 6.0), ("a/x", 7.0), ("b", 9.0), ("", 9.5)]
    trace = [TraceRecord(at, k + 1, 1, session_id=name) for k, (name, at) in enumerate(times)]
    apart = by_session(Workload.of(trace))
    assert [(r.session_id, r.arrival_s) for r in apart] == [
        ("a/main", 0.0), ("a/x", 2.0), ("b", 0.0), ("b", 3.0), ("", 0.0),
    ]  # fmt: skip
    assert list(schedule_sessions(apart, iter([5.0, 6.0, 9.5]))) == trace


def test_a_turn_whose_earlier_turns_are_cut_off_waits_for_nobody() -> None:
    trace = Workload.of(TraceRecord(float(k), 5, 1, session_id="a", turn=k, delay_s=1.0) for k in range(4))
    assert [(r.turn, r.delay_s) for r in window(trace, 2.0)] == [(2, None), (3, 1.0)]


def test_the_session_sample_is_a_closed_loop_with_prefixes() -> None:
    trace = list(read_trace("sample:tau-airline"))
    by_name: dict[str, list[TraceRecord]] = {}
    for record in trace:
        by_name.setdefault(record.session_id, []).append(record)
    assert (len(trace), len(by_name)) == (2454, 200)
    for turns in by_name.values():
        assert [r.turn for r in turns] == list(range(len(turns)))
        assert all((r.delay_s is None) == (r.turn == 0) for r in turns)
        for before, after in pairwise(turns):
            # The answer is shared: more than the prompt before.
            assert shared(before, after) * after.block_tokens > before.input_tokens - after.block_tokens

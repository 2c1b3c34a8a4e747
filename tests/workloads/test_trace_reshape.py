"""Reshaping traces: rates on the same clock, spikes, drift, superposition, other draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise, takewhile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.errors import ConfigError
from tidegate.workloads.generate import Poisson, arrival_times_s, generate, parse_token_counts
from tidegate.workloads.reshape import (
    Spike,
    concatenate,
    drift_mix,
    linear_drift,
    parse_drift,
    replicate,
    reseeded,
    sine_drift,
    spikes,
    superpose,
)
from tidegate.workloads.trace import TraceRecord, Workload

seeds = st.integers(0, 2**32 - 1)


@st.composite
def traces(draw: st.DrawFn) -> Workload:
    """Some single requests and some sessions, in order of arrival, with shared blocks."""
    records = []
    for k in range(draw(st.integers(1, 20))):
        start_s = draw(st.floats(0.0, 300.0))
        session = draw(st.sampled_from(("", f"s{k}", f"s{k}/main")))
        for turn in range(draw(st.integers(1, 3)) if session else 1):
            ids = tuple(range(draw(st.integers(0, 3))))
            inputs, outputs = draw(st.integers(1, 2000)), draw(st.integers(1, 500))
            records.append(
                TraceRecord(start_s + 10.0 * turn, inputs, outputs, ids, session_id=session, turn=turn)
            )
    return Workload.of(sorted(records, key=lambda r: r.arrival_s))


def session_of(record: TraceRecord) -> str:
    """Return the session without its agent."""
    return record.session_id.partition("/")[0]


def steady(rate_rps: float, duration_s: float) -> Workload:
    counts = parse_token_counts("lognormal:500:1"), parse_token_counts("lognormal:200:1")
    times_s = takewhile(lambda at_s: at_s < duration_s, arrival_times_s(Poisson(rate_rps), seed=11))
    return generate(times_s, *counts, seed=11)


def payload(record: TraceRecord) -> tuple[object, ...]:
    return record.input_tokens, record.output_tokens, record.hash_ids, record.session_id, record.turn


Change = Callable[[Workload, int], Workload]
CHANGES: dict[str, Change] = {
    "thin": lambda rs, seed: replicate(rs, 0.5, seed=seed),
    "replicate": lambda rs, seed: replicate(rs, 2.5, seed=seed),
    "spikes": lambda rs, seed: spikes(rs, Spike(3.3, 50.0, 20.0, 100.0), seed=seed),
    "dip": lambda rs, seed: spikes(rs, Spike(0.2, 50.0, 200.0), seed=seed),
    "drift": lambda rs, seed: drift_mix(rs, sine_drift(3.0, 100.0)),
    "superpose": lambda rs, seed: superpose(rs, rs[:0]),
    "reseeded": reseeded,
}


@pytest.mark.parametrize("name", CHANGES)
@given(trace=traces(), seed=seeds)
def test_every_change_keeps_order_is_repeatable_and_leaves_its_input(
    name: str, trace: Workload, seed: int
) -> None:
    before = list(trace)
    made = list(CHANGES[name](trace, seed))
    assert list(trace) == before
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(made))
    assert made == list(CHANGES[name](trace, seed))


@pytest.mark.parametrize("name", ["thin", "replicate", "spikes", "dip"])
@given(trace=traces(), seed=seeds)
def test_sessions_are_kept_copied_and_dropped_whole(name: str, trace: Workload, seed: int) -> None:
    whole = Counter(session_of(r) for r in trace if r.session_id)
    made = Counter(session_of(r) for r in CHANGES[name](trace, seed) if r.session_id)
    for session, turns in made.items():
        assert turns == whole[session.partition("~")[0]]


@given(traces(), seeds)
def test_copies_share_prefixes_among_themselves_only(trace: Workload, seed: int) -> None:
    made = list(replicate(trace, 3.0, seed=seed))
    originals = {i for r in trace for i in r.hash_ids}
    named = [r for r in made if "~" in r.session_id]
    assert len(made) == 3 * len(trace)
    assert all(not originals & set(r.hash_ids) for r in named)
    assert len({i for r in made for i in r.hash_ids}) == 3 * len(originals)


@given(traces(), seeds)
def test_a_smaller_share_is_part_of_a_larger_one(trace: Workload, seed: int) -> None:
    small, large = (Counter(replicate(trace, share, seed=seed)) for share in (0.3, 0.7))
    assert small <= large
    assert list(replicate(trace, 1.0, seed=seed)) == list(trace)


@pytest.mark.parametrize("factor", [0.25, 1.0, 2.5])
def test_a_rate_factor_keeps_the_shape_of_the_day(factor: float) -> None:
    quiet, busy = steady(2.0, 1000.0), steady(8.0, 1000.0)
    day = concatenate(quiet, busy)
    made = np.array([r.arrival_s for r in replicate(day, factor, seed=3)])
    assert made.max() < day[-1].arrival_s + 2.1
    for start_s, rate in ((0, 2.0), (1000, 8.0)):
        count = ((made >= start_s) & (made < start_s + 1000)).sum()
        assert count == pytest.approx(factor * rate * 1000, rel=0.12)


def test_a_spike_is_where_it_was_asked_for_and_nowhere_else() -> None:
    trace = steady(5.0, 2000.0)
    made = np.array([r.arrival_s for r in spikes(trace, Spike(4.0, 100.0, 50.0, 500.0), seed=5)])
    inside = (made >= 100.0) & ((made - 100.0) % 500.0 < 50.0)
    before = np.array([r.arrival_s for r in trace])
    was_inside = (before >= 100.0) & ((before - 100.0) % 500.0 < 50.0)
    assert inside.sum() == 4 * was_inside.sum()
    assert (~inside).sum() == (~was_inside).sum()


@pytest.mark.parametrize(
    "text", ["", "4", "4:0", "4:0:0", "-1:0:5", "4:0:60:30", "x:0:5", "inf:0:5", "nan:0:5"]
)
def test_bad_spikes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="spike"):
        Spike.parse(text)


@given(traces(), st.floats(0.1, 10.0), st.floats(0.1, 10.0))
def test_drift_keeps_every_requests_tokens_and_arrival(trace: Workload, start: float, end: float) -> None:
    made = list(drift_mix(trace, linear_drift(start, end, 300.0)))
    for old, new in zip(trace, made, strict=True):
        assert new.arrival_s == old.arrival_s
        assert new.input_tokens + new.output_tokens == old.input_tokens + old.output_tokens
        assert min(new.input_tokens, new.output_tokens) >= 1
        assert new.hash_ids == old.hash_ids[: len(new.hash_ids)]


def test_drift_moves_the_ratio_as_asked() -> None:
    trace = Workload.of(TraceRecord(float(t), 30_000, 10_000) for t in range(101))
    ratios = [r.input_tokens / r.output_tokens for r in drift_mix(trace, parse_drift("linear:1:3:100"))]
    assert [ratios[t] for t in (0, 50, 100)] == pytest.approx([3.0, 6.0, 9.0], rel=1e-3)
    waves = [r.input_tokens / r.output_tokens for r in drift_mix(trace, parse_drift("sine:2:100"))]
    assert [waves[t] for t in (0, 25, 75)] == pytest.approx([3.0, 6.0, 1.5], rel=1e-3)


@pytest.mark.parametrize(
    "text", ["", "linear:1:2", "sine:0:5", "sine:2:0", "linear:x:1:2", "saw:1:2", "sine:nan:5"]
)
def test_bad_drifts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="drift"):
        parse_drift(text)


@given(traces(), traces())
def test_superposed_traces_stay_apart(one: Workload, two: Workload) -> None:
    made = list(superpose(one, two))
    assert sorted(r.arrival_s for r in made) == sorted(r.arrival_s for r in (*one, *two))
    sessions = Counter(r.session_id for r in made if r.session_id)
    assert len(sessions) == len({r.session_id for r in one if r.session_id}) + len(
        {r.session_id for r in two if r.session_id}
    )
    ids = [{i for r in trace for i in r.hash_ids} for trace in (one, two)]
    assert len({i for r in made for i in r.hash_ids}) == len(ids[0]) + len(ids[1])


def test_concatenated_traces_follow_one_another() -> None:
    trace = Workload.of([TraceRecord(1.0, 5, 5), TraceRecord(4.0, 6, 6)])
    assert [r.arrival_s for r in concatenate(trace, trace, trace, gap_s=10.0)] == [1, 4, 15, 18, 29, 32]


@given(traces(), st.integers(1, 2**32))
def test_another_seed_permutes_within_minutes(trace: Workload, seed: int) -> None:
    made = reseeded(trace, seed)
    assert Counter(map(payload, made)) == Counter(map(payload, trace))

    def starts(records: Workload) -> list[float]:
        first = {session_of(r) or k: r.arrival_s for k, r in reversed(list(enumerate(records)))}
        return sorted(first.values())

    assert starts(made) == starts(trace)
    if not any(r.session_id for r in trace):
        for minute in range(6):
            before, after = (
                Counter(payload(r) for r in rs if int(r.arrival_s // 60) == minute) for rs in (trace, made)
            )
            assert before == after


def test_seed_zero_is_the_trace_and_others_are_other_draws() -> None:
    trace = steady(5.0, 300.0)
    draws = [list(reseeded(trace, seed)) for seed in (0, 1, 2)]
    assert draws[0] == list(trace)
    assert draws[1] not in (draws[0], draws[2])
    with pytest.raises(ConfigError, match="seed"):
        reseeded(trace, -1)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_factors_are_refused(bad: float) -> None:
    with pytest.raises(ConfigError):
        replicate(Workload.of([]), bad, seed=0)

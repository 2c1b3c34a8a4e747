"""Transformations, generators and prompts."""

from __future__ import annotations

from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.errors import ConfigError
from tidegate.workloads.generate import (
    ArrivalProcess,
    Bursts,
    Gamma,
    Poisson,
    arrival_times_s,
    generate,
    parse_token_counts,
    resample,
)
from tidegate.workloads.prompts import TokenPrompts, WordPrompts
from tidegate.workloads.trace import TraceRecord, Workload
from tidegate.workloads.transform import limit, retime, scale_rate, scale_tokens, schedule_sessions, window


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def at(*times_s: float) -> Workload:
    return Workload.of(TraceRecord(t, 100, 10) for t in times_s)


def test_scaling_the_rate_divides_times_and_leaves_think_time() -> None:
    scaled = list(scale_rate(Workload.of([TraceRecord(4.0, 100, 10, delay_s=3.0)]), 2.0))
    assert (scaled[0].arrival_s, scaled[0].delay_s) == (2.0, 3.0)


def test_scaling_tokens_scales_the_block_and_keeps_one_token() -> None:
    trace = Workload.of([TraceRecord(0, 1024, 100, (1, 2)), TraceRecord(0, 1, 1)])
    big, small = scale_tokens(trace, 0.25)
    assert (big.input_tokens, big.output_tokens, big.block_tokens) == (256, 25, 128)
    assert (small.input_tokens, small.output_tokens) == (1, 1)


def test_a_window_counts_from_its_start() -> None:
    assert [r.arrival_s for r in window(at(0.0, 1.0, 2.0, 2.5, 3.0), 1.0, 2.0)] == [0.0, 1.0, 1.5]


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_factors_must_be_positive(bad: float) -> None:
    for change in (scale_rate, scale_tokens):
        with pytest.raises(ConfigError, match="must be positive"):
            change(at(0.0), bad)
    with pytest.raises(ConfigError, match="at least 1"):
        limit(at(0.0), 0)


def test_sessions_start_at_arrivals_and_merge_in_order() -> None:
    layout = [("a/main", 0.0), ("a/sub", 5.0), ("a/main", 15.0), ("b/main", 0.0), ("b/main", 7.0)]
    turns = Workload.of(TraceRecord(offset, i + 1, 1, session_id=s) for i, (s, offset) in enumerate(layout))
    merged = list(schedule_sessions(turns, iter([10.0, 20.0])))
    assert [(r.arrival_s, r.input_tokens) for r in merged] == [(10, 1), (15, 2), (20, 4), (25, 3), (27, 5)]


def test_sessions_without_times_need_a_gap() -> None:
    turns = Workload.of(TraceRecord(0.0, 5, 1, session_id="a", turn=i) for i in range(3))
    with pytest.raises(ConfigError, match="--turn-gap"):
        list(schedule_sessions(turns, iter([1.0])))
    assert [r.arrival_s for r in schedule_sessions(turns, iter([1.0]), 2.0)] == [1.0, 3.0, 5.0]


def test_retime_keeps_lengths_and_order() -> None:
    assert [r.arrival_s for r in retime(at(5.0, 9.0), iter([0.25, 0.5, 0.75]))] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("process", "rate", "cv"),
    [(Poisson(8.0), 8.0, 1.0), (Gamma(8.0, 3.0), 8.0, 3.0), (Gamma(8.0, 0.3), 8.0, 0.3)],
)
def test_renewal_processes_have_the_asked_rate_and_variation(
    process: ArrivalProcess, rate: float, cv: float
) -> None:
    gaps = np.diff(list(islice(process.times_s(rng()), 40_000)))
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06)


def test_bursts_follow_their_phases() -> None:
    times = np.array(list(islice(Bursts.parse("20:10,0:5,2:30").times_s(rng()), 13_000)))
    phase = times % 45.0
    cycles = times[-1] // 45.0
    assert np.all(np.diff(times) >= 0)
    assert (phase < 10).sum() / cycles == pytest.approx(200, rel=0.05)
    assert not np.any((phase > 10.001) & (phase < 14.999))
    assert (phase >= 15).sum() / cycles == pytest.approx(60, rel=0.08)


@pytest.mark.parametrize("text", ["", "20", "20:0", "0:5", "a:b", "1:2:3", "-1:5,2:3", "inf:1"])
def test_bad_bursts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Bursts.parse(text)


def test_lognormal_counts_have_the_asked_mean_and_variation() -> None:
    generator = rng()
    draw = parse_token_counts("lognormal:1000:1.2")
    drawn = np.array([draw(generator) for _ in range(40_000)])
    assert drawn.mean() == pytest.approx(1000, rel=0.03)
    assert drawn.std() / drawn.mean() == pytest.approx(1.2, rel=0.08)


def test_uniform_counts_reach_both_ends() -> None:
    generator = rng()
    draw = parse_token_counts("uniform:3:5")
    assert {draw(generator) for _ in range(200)} == {3, 4, 5}


@pytest.mark.parametrize(
    "text", ["0", "-5", "x", "uniform:5", "uniform:9:3", "lognormal:0:1", "zipf:3:4", ""]
)
def test_bad_counts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_token_counts(text)


def test_generation_is_seeded_and_lengths_do_not_move_arrivals() -> None:
    def take(outputs: str, seed: int = 1) -> list[TraceRecord]:
        counts = parse_token_counts("lognormal:200:1"), parse_token_counts(outputs)
        times_s = islice(arrival_times_s(Poisson(5), seed=seed), 50)
        return list(generate(times_s, *counts, seed=seed))

    assert take("uniform:1:9") == take("uniform:1:9")
    assert take("uniform:1:9") != take("uniform:1:9", seed=2)
    assert [r.arrival_s for r in take("uniform:1:9")] == [r.arrival_s for r in take("7")]


def test_resampling_keeps_pairs_together() -> None:
    pool = Workload.of([TraceRecord(0, 10, 1, (5,)), TraceRecord(0, 20, 2, session_id="s")])
    drawn = list(resample(islice(arrival_times_s(Poisson(5), seed=0), 50), pool, seed=0))
    assert {(r.input_tokens, r.output_tokens) for r in drawn} == {(10, 1), (20, 2)}
    assert all(not r.hash_ids and not r.session_id for r in drawn)
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(drawn))


def shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(
    st.lists(st.integers(0, 2**63), min_size=1, max_size=5, unique=True),
    st.integers(0, 5),
    st.integers(1, 40),
    st.integers(0, 9),
)
def test_prompts_share_exactly_the_blocks_that_agree(
    hash_ids: list[int], common: int, tail: int, seed: int
) -> None:
    common = min(common, len(hash_ids))
    other = [*hash_ids[:common], *(2**63 + 1 + i for i in range(len(hash_ids) - common))]
    length = (len(hash_ids) - 1) * 40 + tail
    prompts = TokenPrompts(vocab=50_000, low=7, seed=seed)
    one, two = (
        prompts.prompt(TraceRecord(0, length, 1, tuple(h), block_tokens=40), i)
        for i, h in enumerate((hash_ids, other))
    )
    assert len(one) == len(two) == length
    assert all(7 <= token < 50_000 for token in one)
    expected = min(common * 40, length)
    # One chance in 50 000 that the first differing token is equal all the same.
    assert expected <= shared(one, two) <= min(expected + 2, length)


def test_prompts_without_prefix_differ_and_sessions_extend() -> None:
    prompts = TokenPrompts(vocab=32_000)
    alone = [prompts.prompt(TraceRecord(0, 50, 1), i) for i in (0, 1)]
    assert shared(*alone) < 3
    first, second = (
        prompts.prompt(TraceRecord(0, n, 1, session_id="s", turn=i), i) for i, n in enumerate((30, 80))
    )
    assert second[:30] == first
    assert shared(first, prompts.prompt(TraceRecord(0, 30, 1, session_id="t"), 2)) < 3


def test_a_prompt_longer_than_its_blocks_ends_in_tokens_of_its_own() -> None:
    prompts = TokenPrompts(vocab=32_000)
    one, two = (prompts.prompt(TraceRecord(0, 100, 1, (1,), block_tokens=60), i) for i in (0, 1))
    assert 60 <= shared(one, two) < 63


def test_token_prompts_are_pinned() -> None:
    """The same trace and seed must give the same tokens in every release: runs are compared by them."""
    assert TokenPrompts(vocab=32_000, low=1000, seed=3).prompt(TraceRecord(0, 4, 1, (42,)), 0) == [
        11537,
        2164,
        13651,
        13239,
    ]


@pytest.mark.parametrize(("per_word", "overhead"), [(1.0, 0.0), (1.0, 11.0), (5.0, 2.0), (1.3, 4.0)])
def test_words_come_within_one_word_of_the_asked_tokens(per_word: float, overhead: float) -> None:
    prompts = WordPrompts(per_word, overhead)
    for tokens in (20, 137, 2000):
        words = len(prompts.prompt(TraceRecord(0, tokens, 1), 0).split())
        assert abs(words * per_word + overhead - tokens) <= per_word / 2 + 1e-9


def test_words_share_prefixes_too() -> None:
    prompts = WordPrompts(tokens_per_word=2.0)
    one, two = (prompts.prompt(TraceRecord(0, 1024, 1, (1, 2 + i)), i).split() for i in (0, 1))
    assert one[:256] == two[:256]
    assert one[256:262] != two[256:262]

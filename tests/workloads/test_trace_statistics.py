"""Statistics of traces, rate curves and presets."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tidegate.bound.phase_load import phase_load
from tidegate.core.errors import ConfigError, SetupError
from tidegate.costs.library import packaged_profile
from tidegate.workloads.generate import (
    Gamma,
    RateCurve,
    TokenCounts,
    arrival_times_s,
    generate,
    parse_token_counts,
    preset,
    preset_names,
    read_rate_curve,
)
from tidegate.workloads.readers import read_trace
from tidegate.workloads.trace import TraceRecord, Workload
from tidegate.workloads.trace_statistics import cached_tokens, statistics


def test_the_chat_sample_has_its_published_character() -> None:
    """The figures were computed once with other code from the published file."""
    about = statistics(read_trace("sample:azure-conv"), timed=True)
    assert about.arrivals is not None
    assert about.requests == 2867
    assert about.arrivals.rate_rps == pytest.approx(4.78, abs=0.01)
    assert about.arrivals.cv == pytest.approx(1.10, abs=0.01)
    assert about.ratio == pytest.approx(4.405, abs=0.01)
    assert (about.input_tokens.p50, about.input_tokens.p99) == (1041, 4107)
    assert about.sessions is None
    assert about.reuse is None


@pytest.mark.parametrize(("cv", "idc"), [(1.0, 1.0), (2.0, 4.0)])
def test_burstiness_of_renewal_arrivals(cv: float, idc: float) -> None:
    # The index of dispersion of a renewal process tends to the squared CV of its gaps.
    lengths = parse_token_counts("100")
    trace = generate(islice(arrival_times_s(Gamma(10.0, cv), seed=1), 200_000), lengths, lengths, seed=1)
    arrivals = statistics(trace, timed=True).arrivals
    assert arrivals is not None
    assert arrivals.cv == pytest.approx(cv, rel=0.03)
    assert arrivals.idc60 == pytest.approx(idc, rel=0.25)


def test_drift_comes_by_window_and_thin_windows_say_nothing() -> None:
    trace = [TraceRecord(t * 10.0, 300 if t < 30 else 900, 100) for t in range(60)]
    trace.append(TraceRecord(650.0, 9, 900))
    about = statistics(Workload.of(trace), timed=True)
    assert [w.ratio for w in about.windows] == [3.0, 9.0, None]
    assert about.ratio_range == (3.0, 9.0)
    assert about.windows[-1].length_s == 50.0


def test_reuse_counts_leading_blocks_and_answers() -> None:
    trace = Workload.of(
        [
            TraceRecord(0.0, 1000, 500, (1, 2, 3), block_tokens=512),
            TraceRecord(1.0, 1600, 5, (1, 2, 3, 4), block_tokens=512),
            TraceRecord(2.0, 1024, 5, (9, 2), block_tokens=512),
        ]
    )
    assert cached_tokens(trace).tolist() == [0, 1536, 0]
    reuse = statistics(trace, timed=True).reuse
    assert reuse is not None
    assert (reuse.tokens, reuse.blocks) == (pytest.approx(1536 / 3624), pytest.approx(3 / 8))


@pytest.mark.parametrize("trace", [[TraceRecord(3.0, 5, 5)], [TraceRecord(3.0, 5, 5)] * 3])
def test_degenerate_traces_give_no_nan(trace: list[TraceRecord]) -> None:
    for timed in (True, False):
        json.dumps(statistics(Workload.of(trace), timed=timed).to_json(), allow_nan=False)
    with pytest.raises(ConfigError, match="no requests"):
        statistics(Workload.of([]), timed=True)


def test_phase_load_of_a_workload_computed_by_hand() -> None:
    packaged = packaged_profile("h100_sxm/llama-3.1-8b")
    trace = Workload.of(TraceRecord(t * 1.0, 2000, 201) for t in range(101))
    (load,) = phase_load(
        trace, packaged.profile, tpot_s=0.05, kv_tokens=packaged.kv_capacity_tokens, window_s=200.0
    )
    assert load.prefill == pytest.approx(1.01 * packaged.profile.prefill_s(2000))
    context = 2000 + 0.5 * 201
    step_s = packaged.profile.step.seconds(load.batch, load.batch * context)
    more_s = packaged.profile.step.seconds(load.batch + 1, (load.batch + 1) * context)
    assert step_s <= 0.05
    assert more_s > 0.05 or (load.batch + 1) * context > packaged.kv_capacity_tokens
    assert load.decode == pytest.approx(1.01 * 200 * step_s / load.batch)


def test_a_tpot_that_no_batch_keeps_has_no_decode_load() -> None:
    packaged = packaged_profile("h100_sxm/llama-3.1-8b")
    trace = Workload.of([TraceRecord(0.0, 20, 20)])
    (load,) = phase_load(trace, packaged.profile, tpot_s=1e-6, kv_tokens=10_000, window_s=60.0)
    assert (load.decode, load.prefill_share) == (None, None)


@pytest.mark.parametrize("cv", [1.0, 2.5])
def test_a_rate_curve_is_followed_and_repeats(cv: float) -> None:
    curve = RateCurve(100.0, (2.0, 0.0, 10.0), cv).with_mean(8.0)
    times_s = np.array(list(islice(curve.times_s(np.random.default_rng(4)), 60_000)))
    assert np.all(np.diff(times_s) >= 0)
    cycles = times_s[-1] / 300.0
    steps = np.bincount((times_s % 300.0 // 100.0).astype(int), minlength=3) / cycles
    assert steps == pytest.approx([400.0, 0.0, 2000.0], rel=0.1)


def test_rate_curves_are_read_from_both_layouts(tmp_path: Path) -> None:
    long, wide = tmp_path / "long.csv", tmp_path / "wide.csv"
    long.write_text("workload,t_s,rate_rps\na,0,1\na,600,2\na,1800,4\nb,0,9\nb,600,9\n")
    wide.write_text("t_s,day,night\n0,1,5\n600,2,6\n1200,3,7\n")
    assert read_rate_curve(f"{long}:a") == RateCurve(600.0, (1.0, 2.0, 2.0, 4.0), missing=frozenset({2}))
    assert read_rate_curve(f"{wide}:night").rates_rps == (5.0, 6.0, 7.0)


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("t_s,a,b\n0,1,2\n600,1,2\n", "c", "has no curve 'c'; write .*:NAME with one of a, b"),
        ("t_s,a,b\n0,1,2\n600,1,2\n", "", "has several curves"),
        ("time,a\n0,1\n", "a", "not a rate curve: expected a CSV with t_s"),
        ("t_s,a\n0,1\n600,x\n", "a", ":3:5: a is 'x', expected a number >= 0"),
        ("t_s,a\n0,1\n600\n", "a", ":3:4: 1 fields, expected 2"),
        ("t_s,a\n0,1\n0,2\n", "a", "must increase"),
        ("t_s,a\n0,1\n", "a", "at least two rows"),
        ("t_s,a\n0,0\n600,0\n", "a", "a rate above 0"),
        ("", "a", "the file is empty"),
    ],
)
def test_bad_rate_curves_are_told(tmp_path: Path, content: str, name: str, words: str) -> None:
    path = tmp_path / "c.csv"
    path.write_text(content)
    with pytest.raises(SetupError, match=words):
        read_rate_curve(f"{path}:{name}")


@pytest.mark.parametrize("name", preset_names())
def test_presets_have_their_sources_means(name: str) -> None:
    lengths = preset(name)
    rng = np.random.default_rng(0)
    draws: list[tuple[TokenCounts, float]] = [
        (lengths.inputs, lengths.input_mean),
        (lengths.outputs, lengths.output_mean),
    ]
    for draw, mean in draws:
        assert np.mean([draw(rng) for _ in range(30_000)]) == pytest.approx(mean, rel=0.06)
    assert "requests of" in lengths.description


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="azure-conv"):
        preset("sharegpt")

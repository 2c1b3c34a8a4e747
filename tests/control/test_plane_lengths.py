"""What is left of an answer, from its source to placements and controllers."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import orjson
import pytest

from tests.control.plane_harness import HoldWhile, PlainRequest, decoding, make_plane
from tidegate.core.errors import ConfigError
from tidegate.costs.library import packaged_profile
from tidegate.dataplane.replica import replicas_of
from tidegate.policies.protocols import Signal
from tidegate.signals.lengths.hidden import HiddenLengths
from tidegate.signals.lengths.known import MaxTokensLengths, OracleLengths
from tidegate.sim import SimSettings, simulate
from tidegate.systems import make_system
from tidegate.workloads.trace import TraceRecord


def test_placements_and_rows_see_what_is_left() -> None:
    placing = HoldWhile()
    plane = make_plane(prefill=placing, lengths=OracleLengths({"r0": 30, "r1": 40}))
    first, second = PlainRequest("r0"), PlainRequest("r1")
    decoding(plane, first)
    decoding(plane, second)
    first.generated = 11
    plane.tokens(first, 10, 0.5)
    rows = plane.snapshot(1.0).requests
    assert rows.ids == ("r0", "r1")
    assert rows.remaining_tokens.tolist() == [19, 39]
    predicted = placing.asked[1].remaining
    assert predicted is not None and (predicted.mean, predicted.at_token, predicted.source) == (
        40,
        0,
        "oracle",
    )


def test_a_replay_counts_the_tokens_before_it() -> None:
    placing = HoldWhile()
    plane = make_plane(prefill=placing, lengths=MaxTokensLengths())
    live = PlainRequest("r0", 100, 50)
    decoding(plane, live)
    live.generated = 21
    plane.tokens(live, 20, 0.5)
    live.failures = -1
    plane.instance_down(live.decode_on or "", "died", 1.0)
    plane.arrive(live, 1.0)
    assert placing.asked[-1].remaining == MaxTokensLengths().remaining(PlainRequest().as_request(), 21)
    assert plane.snapshot(1.0).requests.remaining_high_tokens.tolist() == [29]


def test_without_a_source_nothing_is_known() -> None:
    plane = make_plane()
    decoding(plane, PlainRequest())
    assert np.isnan(plane.snapshot(0.0).requests.remaining_tokens).all()
    system = replace(make_system("static"), signals=frozenset({Signal.LENGTHS}))
    with pytest.raises(ConfigError, match="lengths"):
        system.check_signals([Signal.PROFILE, Signal.PREFIX_HITS])


def test_what_engines_report_reaches_policies_and_the_journal() -> None:
    lines: list[bytes] = []
    source = HiddenLengths()
    plane = make_plane(lengths=source, lines=lines)
    live = PlainRequest("r0", 100, 5000)
    decoding(plane, live)
    plane.length_reported(live, 1, 300.0, 0.1)
    assert plane.snapshot(0.2).requests.remaining_tokens.tolist() == [300.0]
    live.generated = 101
    plane.tokens(live, 100, 0.5)
    plane.tick(1.0)
    live.generated = 110
    plane.tokens(live, 9, 1.5)
    plane.tick(2.0)  # the tokens have not doubled
    assert [(each.at_token, each.source) for each in live.predicted] == [
        (0, "histogram"), (1, "histogram"), (101, "hidden")
    ]  # fmt: skip
    assert live.predicted[-1].remaining_tokens == 200.0
    plane.ended(live, None, 3.0)
    plane.tick(3.0)
    assert source.histogram.remaining(PlainRequest("new", 100, 5000).as_request(), 0).mean < 1000


def test_a_simulated_predictor_errs_and_its_journal_says_how() -> None:
    rng = np.random.default_rng(5)
    outputs = rng.lognormal(5.0, 1.0, 60).astype(int) + 2
    trace = [TraceRecord(0.05 * k, 200, int(output)) for k, output in enumerate(outputs)]
    replicas = replicas_of(packaged_profile("h100_sxm/llama-3.1-8b"), 2)
    errors = {}
    for name in ("oracle", "hidden"):
        out = io.BytesIO()
        simulate(trace, make_system("static"), replicas, SimSettings(lengths=name), journal=out)
        outcomes = [row for row in map(orjson.loads, out.getvalue().splitlines()) if row["type"] == "outcome"]
        errors[name] = [
            predicted - (row["output_length"] - at)
            for row in outcomes
            for at, predicted, source in row["predicted_lengths"]
            if source == name
        ]
    assert set(errors["oracle"]) == {0.0} and len(errors["hidden"]) >= 60
    assert np.abs(errors["hidden"]).mean() > 10

"""What is left of an answer, from its source to placements and controllers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.control.plane_harness import HoldWhile, PlainRequest, decoding, make_plane
from tidegate.core.errors import ConfigError
from tidegate.policies.protocols import Signal
from tidegate.signals.lengths.known import MaxTokensLengths, OracleLengths
from tidegate.systems import make_system


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

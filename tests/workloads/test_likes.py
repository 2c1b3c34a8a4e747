"""Traffic made by statistics: it has them, sessions grow by whole rounds, and seeds give other traffic."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tidegate.core.errors import TraceError
from tidegate.workloads.choice import WorkloadChoice, load_workload
from tidegate.workloads.likes import LIKES, make_like
from tidegate.workloads.readers import has_arrivals


@pytest.mark.parametrize("name", LIKES)
def test_means_are_those_that_are_stated(name: str) -> None:
    like = LIKES[name]
    made = make_like(f"like:{name}:4000")
    new = made.input_tokens.astype(float)
    if made.turn is not None:
        before = np.concatenate(([0], (made.input_tokens + made.output_tokens)[:-1]))
        new = new - np.where(made.turn > 0, before, 0)
        assert len(made) / 4000 == pytest.approx(like.rounds, rel=0.05)
    assert new.mean() == pytest.approx(like.new.mean, rel=0.12)
    assert made.output_tokens.mean() == pytest.approx(like.output.mean, rel=0.12)
    assert has_arrivals(f"like:{name}") is (like.rounds == 1)


def test_a_round_repeats_all_of_its_session_and_nothing_of_others() -> None:
    seen: dict[str, set[int]] = {}
    for before, after in pairwise(make_like("like:toolbench:40")):
        ids = set(after.hash_ids)
        if after.session_id == before.session_id:
            whole = (before.input_tokens + before.output_tokens) // after.block_tokens
            assert after.hash_ids[:whole] == before.hash_ids[:whole]
            assert after.arrival_s > before.arrival_s
        assert not any(ids & others for name, others in seen.items() if name != after.session_id)
        seen.setdefault(after.session_id, set()).update(ids)


def test_a_seed_is_other_traffic_and_the_same_text_the_same() -> None:
    one, again, other = (make_like(f"like:code:500:{seed}") for seed in ("", "0", "1"))
    assert np.array_equal(one.arrival_s, again.arrival_s)
    assert np.array_equal(one.input_tokens, again.input_tokens)
    assert not np.array_equal(one.input_tokens, other.input_tokens)


def test_sessions_start_by_an_arrival_process() -> None:
    made = load_workload(WorkloadChoice(trace="like:gaia:50", gamma=0.5, cv=3.0))
    assert len(set(made.column("session_id"))) == 50
    assert (np.diff(made.arrival_s) >= 0).all()


@pytest.mark.parametrize(
    ("source", "words"),
    [("like:cod", "there is code"), ("like:code:0", "expected like:NAME"), ("like:code:1:2:3", "expected")],
)
def test_what_cannot_be_made_is_refused(source: str, words: str) -> None:
    with pytest.raises(TraceError, match=words):
        make_like(source)

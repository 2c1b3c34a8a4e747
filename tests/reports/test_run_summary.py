"""A run in numbers: the JSON contract, and what charts are drawn from."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from tests.reports.run_cases import made_run
from tidegate.measure.run_view import RunView, view_of
from tidegate.measure.summary import KEYS, RunFacts, summarize_run
from tidegate.reports.comparison import LevelGoodput
from tidegate.reports.run_block import render_run

NOT_SEARCHED = LevelGoodput(0.9, "", 0.0, 0.0, 0.0, None, ())
FACTS = RunFacts("arrow", "t.csv", seed=0, wall_s=1.0, cpu_s=0.5)


def test_the_object_has_the_documented_keys_and_relates_the_goodput_to_the_limit() -> None:
    facts = RunFacts("arrow", "t.csv", 3, 1.0, 0.5, goodput_rps=6.0, limit_rps=8.0)
    found = summarize_run(made_run(400), facts)
    assert tuple(found) == KEYS
    assert found["share_of_limit"] == 0.75
    assert found["rate_rps"] == pytest.approx(2.0)
    assert found["requests_per_cpu_s"] == 800
    assert found["attainment"] == found["attained"] / found["requests"]
    assert set(found["ttft_s"]) == {"p50", "p90", "p99"}


@pytest.mark.parametrize(
    "run", [made_run(0), made_run(1), made_run(5, failed=5)], ids=["none", "one", "failed"]
)
def test_what_has_nothing_to_be_computed_from_is_null_and_never_nan(run: object) -> None:
    summary = summarize_run(run, FACTS)  # type: ignore[arg-type]
    text = json.dumps([summary, asdict(view_of(run))], allow_nan=False)  # type: ignore[arg-type]
    assert summary["rate_rps"] is None or math.isfinite(summary["rate_rps"])
    assert "null" in text
    assert "nan" not in render_run(run, summary, slo="ttft:500,tpot:50", searched=NOT_SEARCHED).lower()  # type: ignore[arg-type]


def test_failed_requests_count_as_misses_and_leave_the_percentiles_alone() -> None:
    run = made_run(100, failed=40)
    summary = summarize_run(run, FACTS)
    answered = run.requests.ttft_s[:60]
    assert summary["attained"] <= 60
    assert summary["ttft_s"]["p50"] == pytest.approx(float(np.median(answered)))


def test_a_view_survives_json_and_tells_what_the_missed_requests_got() -> None:
    run = made_run(400, slow=4.0, failed=10)
    view = view_of(run)
    assert RunView(**json.loads(json.dumps(asdict(view)))) == view
    missed = run.requests.ttft_s[~run.requests.attained]
    assert view.missed_ttft_p99_s == pytest.approx(float(np.nanpercentile(missed, 99)))
    assert view.answered == 390 and view.offered == 400


def test_windows_keep_every_arrival_and_the_number_of_instances() -> None:
    view = view_of(made_run(4000))
    assert sum(view.rate_rps) * view.window_s == pytest.approx(4000)
    total = np.add(view.prefill_instances, view.decode_instances)
    assert np.allclose(total, 4.0)

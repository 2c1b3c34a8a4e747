"""From choices to requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.bench import BenchSettings
from tidegate.core.errors import ConfigError
from tidegate.workloads.choice import WorkloadChoice, load_workload


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "t.csv"
    rows = "".join(f"{100 + i}.0,{10 * (i + 1)},{i + 1}\n" for i in range(5))
    path.write_text("arrival_s,input_tokens,output_tokens\n" + rows)
    return str(path)


def test_a_trace_starts_at_once_whatever_its_first_time(trace: str) -> None:
    chosen = load_workload(WorkloadChoice(trace=trace, scale_rate=2.0, scale_tokens=0.5))
    assert [r.arrival_s for r in chosen] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [r.input_tokens for r in chosen] == [5, 10, 15, 20, 25]


def test_a_window_and_a_limit_cut_a_trace(trace: str) -> None:
    chosen = load_workload(WorkloadChoice(trace=trace, start_s=101, duration_s=3, limit=2))
    assert [(r.arrival_s, r.input_tokens) for r in chosen] == [(0.0, 20), (1.0, 30)]


def test_an_arrival_process_retimes_a_trace(trace: str) -> None:
    chosen = load_workload(WorkloadChoice(trace=trace, poisson=5.0))
    assert [r.input_tokens for r in chosen] == [10, 20, 30, 40, 50]
    assert 0 < chosen[-1].arrival_s < 10


def test_lengths_can_come_from_a_file_without_times(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("input_tokens,output_tokens\n5,6\n7,8\n")
    chosen = load_workload(WorkloadChoice(gamma=5, cv=2, lengths_from=str(path), limit=30))
    assert {(r.input_tokens, r.output_tokens) for r in chosen} == {(5, 6), (7, 8)}
    assert [r.input_tokens for r in load_workload(WorkloadChoice(poisson=5, trace=str(path)))] == [5, 7]


def test_blocks_can_be_joined() -> None:
    fine = load_workload(WorkloadChoice(trace="like:agent:3", sessions_per_s=1.0))
    coarse = load_workload(WorkloadChoice(trace="like:agent:3", sessions_per_s=1.0, join_blocks=64))
    assert set(coarse.column("block_tokens")) == {64}
    assert coarse.column("hash_ids")[-1] == fine.column("hash_ids")[-1][3::4]


def test_a_duration_ends_a_process() -> None:
    chosen = load_workload(
        WorkloadChoice(bursts="50:1,0:1", duration_s=4, input_tokens="9", output_tokens="2")
    )
    assert 60 < len(chosen) < 140
    assert all(r.arrival_s % 2 <= 1 for r in chosen)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (WorkloadChoice(), "say what to send"),
        (
            WorkloadChoice(poisson=1, gamma=1, limit=1),
            "choose one arrival process, not --poisson and --gamma",
        ),
        (WorkloadChoice(poisson=1), "give --limit N or --duration S"),
        (WorkloadChoice(poisson=1, cv=2, limit=1), "--cv goes with --gamma"),
        (WorkloadChoice(trace="x", input_tokens="5"), "brings its own lengths"),
        (WorkloadChoice(poisson=-1, limit=1), "positive rate"),
        (WorkloadChoice(poisson=1, limit=1, turn_gap_s=1), "--turn-gap goes with"),
        (WorkloadChoice(poisson=1, limit=1, join_blocks=0), "--join-blocks must be 1 token or more"),
        (WorkloadChoice(poisson=1, duration_s=1e-9), "the workload is empty"),
    ],
)
def test_choices_that_do_not_fit_are_refused(choice: WorkloadChoice, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_workload(choice)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_workload(WorkloadChoice(poisson=1, gamma=1, lengths_from="f", input_tokens="5"))
    assert len(error.value.problems) == 3


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_the_url_may_name_v1_or_not(url: str) -> None:
    assert BenchSettings(url).completion_url == "http://h:1/v1/completions"

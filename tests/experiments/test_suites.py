"""Suites: their rows can be run and told apart, and what a suite says is what its rows found."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.experiments.jobs import Store, Workers
from tidegate.experiments.run import run_once
from tidegate.experiments.suites.catalogue import SUITES_OF_ROWS, suite_rows
from tidegate.experiments.suites.rows import Claim, Experiment, known
from tidegate.experiments.suites.running import SuitePlan, run_suite
from tidegate.reports.blind import left_out
from tidegate.reports.comparison import ComparedSystem, LevelGoodput, TraceComparison
from tidegate.reports.suite import SuiteReport, SuiteRow
from tidegate.systems import systems_in
from tidegate.workloads.choice import WorkloadChoice, draw_at_rate, requests_of

PAIR = Experiment(
    workload="few",
    choice=WorkloadChoice(poisson=2.0, limit=60, input_tokens="500", output_tokens="20"),
    profile=packaged_profile("h100_sxm/llama-3.1-8b"),
    instances=2,
    slo=Slo(1.0, 0.05),
    systems=("not-here", "arrow", "static:best", "colocated"),
    orders=("", "sjf"),
)


@pytest.mark.parametrize("name", SUITES_OF_ROWS)
def test_rows_have_names_of_their_own_and_systems_that_exist(name: str) -> None:
    rows = suite_rows(name)
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        names = {contender.name for contender in row.contenders()}
        claimed = {each for claim in row.claims for each in (*known(claim.systems)[0], claim.against)}
        assert claimed <= names or not row.systems
    quick = {row.name for row in suite_rows(name, quick=True)}
    assert quick
    assert quick < {row.name for row in rows}


def test_a_pattern_without_rows_is_told_with_those_there_are() -> None:
    assert {row.workload for row in suite_rows("stress", only="spikes,tails/*/ideal")} == {"spikes", "tails"}
    with pytest.raises(ConfigError, match=r"'nosuch'.*inversion/"):
        suite_rows("stress", only="spikes,nosuch")


def test_a_spike_stays_as_long_at_every_rate() -> None:
    choice = WorkloadChoice(trace="like:spikes", keep_times=True)
    few, many = (draw_at_rate(choice, rate_rps, 1) for rate_rps in (4.0, 16.0))
    assert few.arrival_s[-1] == pytest.approx(many.arrival_s[-1], rel=0.1)
    assert len(many) == pytest.approx(4 * len(few), rel=0.15)
    assert len(requests_of(choice)) == 1260


def test_a_slow_instance_takes_longer_and_nobody_is_told() -> None:
    setting = replace(PAIR.setting(), system="round-robin")
    plain = run_once(setting)
    slow = run_once(replace(setting, settings=replace(setting.settings, slowed={"i0": 2.0})))
    assert plain.run.requests.ttft_s.mean() < 0.6 * slow.run.requests.ttft_s.mean()


def test_a_suite_goes_on_without_what_is_missing_and_says_who_wins() -> None:
    claim = Claim("twice", 2.0, "ttft p90", ("arrow", "not-here"), "static:best")
    broken = replace(PAIR, workload="broken", choice=WorkloadChoice(trace="sample:nosuch"))
    plan = SuitePlan("mine", (replace(PAIR, claims=(claim,)), broken), (0.9,), 1, 0.2, "", {})

    async def run() -> SuiteReport:
        async with Workers(1, Store(None)) as workers:
            return await run_suite(plan, workers)

    report = asyncio.run(run())
    good, bad = report.rows
    assert (report.subject, report.missing) == ("arrow", ("not-here",))
    assert "no such sample" in bad.failed
    best, rate_rps = good.best(0.9)
    assert good.share(best, 0.9) == 1.0
    assert good.at(0.9)["static:best"].chosen.startswith("split 1:1")
    assert [found.system for found in good.claims] == ["arrow"]
    (mean,) = [each for each in report.means(0.9) if each.against == "colocated"]
    goodputs = good.at(0.9)
    assert mean.mean == pytest.approx(goodputs["arrow"].goodput_rps / goodputs["colocated"].goodput_rps)
    assert rate_rps == max(each.goodput_rps for each in goodputs.values())


def test_traces_of_a_folder_are_rows(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("arrival_s,input_tokens,output_tokens\n0,10,2\n1,20,3\n")
    (tmp_path / "README.md").write_text("not one\n")
    assert {row.workload for row in suite_rows("traces", traces_from=tmp_path)} >= {"mine", "code"}
    with pytest.raises(ConfigError, match="trace, plain"):
        suite_rows("traces", traces_from=tmp_path / "none")


def made_row(workload: str, goodputs: dict[str, float]) -> SuiteRow:
    entries = tuple(
        ComparedSystem(name, (LevelGoodput(0.9, "", rps, rps, rps, None, (), by_seed=(rps,)),))
        for name, rps in goodputs.items()
    )
    compared = TraceComparison(workload, workload, entries, None, "", "")
    return SuiteRow(workload, workload, "", "ideal", "", compared)


def test_constants_are_chosen_without_the_workload_that_they_are_judged_on() -> None:
    rows = (
        made_row("a", {"f.py:x": 1.0, "f.py:y": 2.0, "static": 2.0}),
        made_row("b", {"f.py:x": 10.0, "f.py:y": 1.0, "static": 5.0}),
        made_row("c", {"f.py:x": 1.5, "f.py:y": 1.0, "static": 0.0}),
    )
    report = SuiteReport("mine", "f.py:x", (), rows, (0.9,), 1, 0.02, "", "", {})
    blind = left_out(report, ("f.py:x", "f.py:y"), "f")
    found = {row.name: row.at(0.9) for row in blind.rows}
    assert {name: each["f:blind"].chosen for name, each in found.items()} == {"a": "x", "b": "y", "c": "x"}
    assert found["b"]["f:hindsight"].goodput_rps == found["b"]["f:first"].goodput_rps == 10.0
    assert [row.name for row in blind.losses(0.9)] == ["b", "a"]
    assert list(found["a"]) == ["f:blind", "f:first", "f:hindsight", "static"]


def test_systems_come_from_python_files_only(tmp_path: Path) -> None:
    (tmp_path / "grid.jsonl").write_text("")
    (tmp_path / "empty.py").write_text("")
    for name, why in (("grid.jsonl", "no Python file"), ("empty.py", "no function"), ("none.py", "No such")):
        with pytest.raises(ConfigError, match=why):
            systems_in(tmp_path / name)

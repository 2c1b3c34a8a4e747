"""What the names of ``compare --systems`` stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tidegate.core.errors import ConfigError
from tidegate.costs.library import packaged_profile
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.experiments.systems import CHUNKS_TOKENS, SUITES, contenders, suite
from tidegate.workloads.choice import WorkloadChoice


def test_every_static_split_is_a_row_or_a_candidate() -> None:
    every = contenders(["static:all"], 5)
    (best,) = contenders(["static:best+edf"], 5)
    wanted = [(1, 4), (2, 3), (3, 2), (4, 1)]
    assert [each.candidates[0].split for each in every] == wanted
    assert [candidate.split for candidate in best.candidates] == wanted
    assert {candidate.system for candidate in best.candidates} == {"static+edf"}


def test_tuned_tries_every_chunk_and_a_number_one() -> None:
    tuned, one = contenders(["colocated:tuned", "colocated:2048+sjf"], 2)
    assert tuple(candidate.chunk_tokens for candidate in tuned.candidates) == CHUNKS_TOKENS
    assert (one.candidates[0].system, one.candidates[0].chunk_tokens) == ("colocated+sjf", 2048)


def test_a_chunk_budget_is_a_choice_and_a_number_of_tokens_is_fixed() -> None:
    slack, fixed = contenders(["arrow:slack", "arrow:2048"], 2)
    workload, fleet = WorkloadChoice(), SimulatedFleet(((packaged_profile("h100_sxm/llama-3.1-8b"), 2),))
    setting = Setting(workload, fleet, "", chunks="slack")
    systems = [each.candidates[0].applied(setting).make_system() for each in (slack, fixed)]
    assert [system.chunks and system.chunks.name for system in systems] == ["slack", "fixed"]
    assert replace(setting, system="arrow", chunks=None).make_system().chunks is None


def test_even_is_the_split_that_systems_start_with() -> None:
    (even,) = contenders(["static:even"], 5)
    assert even.candidates[0].split == (2, 3)


def test_a_fleet_that_grows_begins_with_its_least_or_with_the_split_of_a_row() -> None:
    fleet = SimulatedFleet(((packaged_profile("h100_sxm/llama-3.1-8b"), 6),))
    setting = Setting(WorkloadChoice(), fleet, "", bounds=(2, 6))
    rows = contenders(["dopd", "static:2:2", "static:best"], 6, 2)
    spares = [[each.applied(setting).settings.spares for each in row.candidates] for row in rows]
    assert spares == [[4], [2], [0] * 5]
    with pytest.raises(ConfigError, match="adds up to 8"):
        contenders(["static:4:4"], 6, 2)


def test_a_row_named_twice_is_one_row() -> None:
    assert len(contenders(["static:1:1", "static:all", "arrow", "arrow"], 2)) == 2


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        contenders(["nosuch", "arrow+nosuch", "static:huge", "colocated:best", "static:3:3"], 4)
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize("name", SUITES)
def test_suites_are_made_of_systems_that_exist(name: str) -> None:
    assert contenders(suite(name), 4)

"""Systems by name, their options, and the signals they are refused without."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.core.errors import ConfigError
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.experiments.systems import contenders
from tidegate.policies.arrow.lending import LendingMonitor, LendingPlacement
from tidegate.policies.arrow.published import ArrowMonitor, ArrowPlacement
from tidegate.policies.arrow.repair import RepairingMonitor, RepairingPlacement
from tidegate.policies.candidates import pool_with_room
from tidegate.policies.orders import make_order
from tidegate.policies.protocols import Signal
from tidegate.systems import SYSTEMS, make_system

NAMES = ("arrow", "arrow-lending", "arrow-v1", "colocated", "minimal-load", "round-robin", "static")


def test_every_system_exists_under_its_own_name() -> None:
    assert set(NAMES) <= set(SYSTEMS.names())
    for name in NAMES:
        system = make_system(name)
        assert system.name == name
        assert system.summary
        assert len(system.roles(4)) == 4


def test_an_unknown_system_lists_what_exists() -> None:
    with pytest.raises(ConfigError, match="unknown system 'fastest'; there are: always-local, "):
        make_system("fastest")


def test_a_misspelt_system_is_told_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'colocated'"):
        make_system("collocated")


def test_a_system_comes_from_a_file(tmp_path: Path) -> None:
    """The file of the example package, named by its path."""
    example = Path(__file__).parents[2] / "examples/third_party_policy/src/shortest_queue/__init__.py"
    file = tmp_path / "my+policies.py"
    file.write_text(example.read_text())
    system = make_system(f"{file}:shortest_queue+edf", split=(1, 1))
    assert system.name == "shortest-queue+edf" and system.order.name == "edf"
    (contender,) = contenders([f"{file}:shortest_queue:even+edf"], 4)
    assert contender.candidates[0].system == f"{file}:shortest_queue+edf"
    assert contender.candidates[0].split == (2, 2)


@pytest.mark.parametrize(
    ("text", "name", "problem"),
    [
        ("import nothing_of_this_name", "mine", r"mine.py, line 1: ModuleNotFoundError"),
        ("x = 1\ndef mine(:\n", "mine", r"mine.py, line 2: SyntaxError"),
        ("def ours(options): ...", "mine", r"mine.py has no function 'mine'; it has: ours"),
        (None, "mine", r"mine.py: No such file"),
    ],
)
def test_a_file_without_the_system_is_refused(
    tmp_path: Path, text: str | None, name: str, problem: str
) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        make_system(f"{file}:{name}")


def test_a_choice_in_hindsight_outside_of_compare_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"only `tidegate compare` takes ':best'.*--split"):
        make_system("static:best")


def test_a_split_that_does_not_match_the_fleet_is_refused() -> None:
    system = make_system("static", split=(3, 1))
    assert system.roles(4).count(Role.PREFILL) == 3
    with pytest.raises(ConfigError, match="needs 4 instances"):
        system.roles(5)
    with pytest.raises(ConfigError, match="at least one"):
        make_system("arrow", split=(4, 0))


def test_colocated_has_no_split() -> None:
    assert set(make_system("colocated").roles(3)) == {Role.MIXED}
    with pytest.raises(ConfigError, match="no split"):
        make_system("colocated", split=(1, 1))


def test_options_reach_the_policies() -> None:
    slo = Slo(2.0, 0.1)
    published, lending = (make_system(name, tick_s=0.25, slo=slo) for name in ("arrow", "arrow-lending"))
    for system in (published, lending):
        assert isinstance(system.prefill, RepairingPlacement)
        assert system.decode is system.prefill
        (controller,) = system.controllers
        assert isinstance(controller, RepairingMonitor)
        assert controller.period_s == system.window_s == 0.25
    assert published.prefill == RepairingPlacement(ArrowPlacement(slo=slo, candidates=pool_with_room))
    assert lending.prefill == RepairingPlacement(LendingPlacement(slo=slo))
    monitor = ArrowMonitor(slo=slo, period_s=0.25)
    assert published.controllers == (RepairingMonitor(monitor),)
    assert lending.controllers == (RepairingMonitor(LendingMonitor(slo=slo, period_s=0.25)),)


def test_a_name_that_a_system_had_says_which_it_has() -> None:
    with pytest.raises(ConfigError, match="system 'arrow-v2' is now called 'arrow'"):
        make_system("arrow-v2+edf")


@pytest.mark.parametrize("tick_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_tick_is_positive(tick_s: float) -> None:
    with pytest.raises(ConfigError, match="tick"):
        make_system("arrow", tick_s=tick_s)


def test_a_system_without_its_signals_is_refused() -> None:
    make_system("round-robin").check_signals([])
    make_system("arrow").check_signals(list(Signal))
    expected = "'arrow' needs the signals profile; this deployment has: prefix_hits"
    with pytest.raises(ConfigError, match=expected):
        make_system("arrow").check_signals([Signal.PREFIX_HITS])


def test_a_system_takes_an_order() -> None:
    assert make_system("arrow").order.name == "fifo"
    ordered = make_system("arrow+feasible-first", split=(3, 1))
    assert ordered.name == "arrow+feasible-first"
    assert ordered.order.name == "feasible-first"
    assert ordered.roles(4).count(Role.PREFILL) == 3
    with pytest.raises(
        ConfigError,
        match="unknown order 'lifo'; did you mean 'fifo'",
    ):
        make_system("arrow+lifo")
    with pytest.raises(ConfigError, match="at least 1 TTFT target"):
        make_order("edf", starvation_bound=0.5)

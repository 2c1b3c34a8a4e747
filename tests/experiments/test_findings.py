"""Sentences about a comparison come from its figures."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

from tidegate.experiments.compare import common_rate
from tidegate.experiments.findings import findings
from tidegate.measure.attainment import too_short
from tidegate.measure.run_view import RunView
from tidegate.reports.comparison import ComparedSystem, Comparison, LevelGoodput, TraceComparison


def entry(system: str, goodput_rps: float, *, chosen: str = "", flips: int = 0) -> ComparedSystem:
    level = LevelGoodput(0.9, chosen, goodput_rps, goodput_rps, goodput_rps, 10.0, ())
    return ComparedSystem(system, (level,), {}, at_goodput={"flips": flips})


def said(*entries: ComparedSystem) -> str:
    trace = TraceComparison("t", "t", entries, 4.0, "", "")
    return " ".join(findings(Comparison((trace,), (0.9,), 1, 4, "ttft:1,tpot:1", "p", "0", "", {})))


def test_the_leader_is_the_one_with_the_highest_goodput() -> None:
    text = said(entry("arrow", 4.0, flips=3), entry("static:best", 5.0, chosen="split 1:3"))
    assert text.startswith("At 90 % static:best (split 1:3) serves the most, 5.0 requests/s")
    assert "50 % of the fluid limit" in text and "1.25 times arrow" in text
    assert "serves 0.80 times as much as the best static split (split 1:3)" in text


def test_a_difference_within_the_search_is_called_equal() -> None:
    text = said(entry("arrow", 5.05, flips=1), entry("static:best", 5.0, chosen="split 1:3"))
    assert (
        "arrow and static:best (split 1:3) tie" in text
        and "changed a role once" in text
        and "does as well as" in text
    )


def leveled(system: str, *goodputs: tuple[float, ...]) -> ComparedSystem:
    """Return a system with the goodputs of its seeds at 90 % and at 99 %."""
    levels = tuple(
        LevelGoodput(level, "", sum(seeds) / len(seeds), 0.0, 9.9, None, (), "", seeds)
        for level, seeds in zip((0.9, 0.99), goodputs, strict=True)
    )
    return ComparedSystem(system, levels)


def test_each_level_has_its_leader_and_seeds_say_how_sure() -> None:
    entries = (
        leveled("arrow", (8.0, 8.1, 8.2), (3.0, 3.1, 3.2)),
        leveled("static", (4.0, 4.05, 4.1), (4.0, 4.1, 4.2)),
        leveled("noisy", (1.0, 5.0, 14.0), (1.0, 1.1, 1.2)),
    )
    trace = TraceComparison("t", "t", entries, None, "", "")
    text = findings(Comparison((trace,), (0.9, 0.99), 3, 4, "ttft:1,tpot:1", "p", "0", "", {}))
    assert text[0].startswith(
        "At 90 % arrow serves the most, 8.1 requests/s. That is 2.00 (2.00 to 2.00) times"
    )
    assert "Not settled by these seeds: 1.21 (" in text[0], "a mean far behind, whose seeds go both ways"
    assert text[1].startswith("At 99 % the order changes: static serves the most")
    assert "95 % intervals over 3 seeds" in text[2]


def test_one_seed_has_no_interval_and_calls_small_leads_ties() -> None:
    text = said(entry("arrow", 4.3), entry("static", 4.0), entry("colocated", 2.0))
    assert "arrow and static tie" in text and "2.15 times colocated" in text
    assert "One seed tells nothing of the spread" in text and "(" not in text.partition("One seed")[0]


def test_a_run_of_three_seconds_is_called_too_short() -> None:
    assert "300 requests in 3.0 s" in too_short(300, 3.0, 0.9)
    assert "of 300, 3 may miss" in too_short(300, 300.0, 0.99)
    assert too_short(3000, 300.0, 0.99) == ""


def test_nobody_leads_where_nobody_serves() -> None:
    unable = replace(entry("arrow", 0.0).levels[0], reason="the SLO is out of reach")
    assert said(ComparedSystem("arrow", (unable,))) == (
        "At 90 % no system reaches the level at any rate: the SLO is out of reach."
    )


def test_the_common_rate_is_a_static_baseline_else_the_middle_and_never_zero() -> None:
    assert common_rate([entry("arrow", 4.0), entry("static:even", 2.0)])[0] == 2.0
    assert common_rate([entry("a", 4.0), entry("b", 1.0), entry("c", 3.0)])[0] == 3.0
    assert common_rate([entry("a", 0.0)])[0] is None


def test_waits_that_look_the_same_are_not_told_apart() -> None:
    views = [
        cast("RunView", SimpleNamespace(missed_ttft_p99_s=wait_s, offered=10_000)) for wait_s in (1.31, 1.29)
    ]
    text = said(*(replace(entry(f"s{n}", 4.0), view=view) for n, view in enumerate(views)))
    assert "1.3 s or more for a first token under every system" in text

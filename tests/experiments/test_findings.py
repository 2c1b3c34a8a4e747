"""Sentences about a comparison come from its figures."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

from tidegate.experiments.compare import common_rate
from tidegate.experiments.findings import findings
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
    assert text.startswith("static:best (split 1:3) serves the most: 5.0 requests/s")
    assert "50 % of the fluid limit" in text and "1.25 times arrow" in text
    assert "serves 0.80 times as much as the best static split (split 1:3)" in text


def test_a_difference_within_the_search_is_called_equal() -> None:
    text = said(entry("arrow", 5.05, flips=1), entry("static:best", 5.0, chosen="split 1:3"))
    assert "as much as static:best" in text and "changed a role once" in text and "does as well as" in text


def test_nobody_leads_where_nobody_serves() -> None:
    unable = replace(entry("arrow", 0.0).levels[0], reason="the SLO is out of reach")
    assert said(ComparedSystem("arrow", (unable,))) == (
        "No system reaches 90 % attainment at any rate: the SLO is out of reach."
    )


def test_the_common_rate_is_a_static_baseline_else_the_middle_and_never_zero() -> None:
    assert common_rate([entry("arrow", 4.0), entry("static:even", 2.0)])[0] == 2.0
    assert common_rate([entry("a", 4.0), entry("b", 1.0), entry("c", 3.0)])[0] == 3.0
    assert common_rate([entry("a", 0.0)])[0] is None


def test_waits_that_look_the_same_are_not_told_apart() -> None:
    views = [cast("RunView", SimpleNamespace(missed_ttft_p99_s=wait_s)) for wait_s in (1.31, 1.29)]
    text = said(*(replace(entry(f"s{n}", 4.0), view=view) for n, view in enumerate(views)))
    assert "1.3 s or more for a first token under every system" in text

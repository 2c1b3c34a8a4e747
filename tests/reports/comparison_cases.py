"""A comparison made up by formula."""

from __future__ import annotations

from tests.reports.run_cases import made_run
from tidegate.measure.run_view import view_of
from tidegate.measure.summary import RunFacts, summarize_run
from tidegate.reports.comparison import ComparedSystem, Comparison, LevelGoodput, RunAt, TraceComparison


def made_entry(
    system: str, goodput_rps: float, *, chosen: str = "", slow: float = 1.0, reason: str = ""
) -> ComparedSystem:
    """Return a system with searches at two levels, and with runs unless its goodput is 0."""
    probes = tuple(
        RunAt(goodput_rps * factor, seed, attainment - 0.01 * seed)
        for factor, attainment in ((0.5, 1.0), (1.0, 0.91), (1.2, 0.4))
        for seed in range(2)
        if goodput_rps
    )
    levels = tuple(
        LevelGoodput(level, chosen, value, 0.95 * value, 1.05 * value, 16.0, probes, reason, (value, value))
        for level, value in ((0.9, goodput_rps), (0.99, 0.7 * goodput_rps))
    )
    run = made_run(200, slow=slow, failed=5 if slow > 1 else 0)
    shown = summarize_run(run, RunFacts(system, "t.csv", 0, 1.0, 0.5, goodput_rps, 16.0))
    return ComparedSystem(system, levels, {}, shown if goodput_rps else None, shown, view_of(run))


def made_comparison(*entries: ComparedSystem) -> Comparison:
    """Return a comparison of ``entries`` on one trace."""
    trace = TraceComparison("t.csv", "t", entries, 6.0, "the goodput of static:best", "prefill", ("<odd>",))
    facts = {"Python": "3"}
    return Comparison((trace,), (0.9, 0.99), 2, 4, "ttft:500,tpot:50", "p/m", "0", "tidegate compare", facts)

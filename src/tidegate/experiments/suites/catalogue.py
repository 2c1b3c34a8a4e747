"""The suites by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tidegate.core.errors import ConfigError
from tidegate.experiments.suites import papers, stress, traces
from tidegate.experiments.suites.rows import OWN_ORDER, Experiment, chosen

SUITES_OF_ROWS = {
    "papers": "an experiment per headline figure of the papers, beside what they report",
    "traces": "every system on every trace and generator, on two sizes of three fleets",
    "stress": "spikes, inverted phases, heavy tails, a slow instance, slow links, deaths",
}


def suite_rows(
    name: str, *, only: str = "", quick: bool = False, traces_from: Path | None = None
) -> list[Experiment]:
    """Return the rows of a suite that match ``only``; with ``quick`` the few that stand for it.

    Raises ConfigError for a pattern that no row matches, and for a folder of traces that this suite has no
    rows for.
    """
    if traces_from is not None and name != "traces":
        raise ConfigError(f"--traces-from is for --suite traces; {name} brings its own traffic")
    if name == "papers":
        found = papers.rows()
    elif name == "stress":
        found = stress.rows(quick=quick)
    else:
        found = traces.rows(traces_from, quick=quick)
    if quick:
        found = [replace(row, orders=OWN_ORDER) for row in found if row.quick]
    return chosen(found, only)

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
    name: str,
    *,
    only: str = "",
    quick: bool = False,
    traces_from: Path | None = None,
    most_requests: int | None = None,
) -> list[Experiment]:
    """Return the rows of a suite that match ``only``; with ``quick`` the few that stand for it.

    Rows of ``traces`` have ``most_requests`` at most. Raises ConfigError for a pattern that no row matches,
    and for a folder of traces or a number of requests where the suite brings its own.
    """
    if name != "traces" and (traces_from is not None or most_requests is not None):
        flag = "--traces-from" if traces_from is not None else "--requests"
        raise ConfigError(f"{flag} is for --suite traces; {name} brings its own traffic")
    if name == "papers":
        found = papers.rows()
    elif name == "stress":
        found = stress.rows(quick=quick)
    else:
        found = traces.rows(traces_from, most_requests or (traces.QUICK_REQUESTS if quick else None))
    if quick:
        found = [replace(row, orders=OWN_ORDER) for row in found if row.quick]
    return chosen(found, only)

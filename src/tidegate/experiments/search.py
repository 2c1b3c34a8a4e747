"""A goodput search whose probes run in the worker processes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tidegate.experiments.goodput_search import GoodputSearch, SearchSettings
from tidegate.experiments.jobs import Job, Workers
from tidegate.experiments.run import probe
from tidegate.experiments.setting import Setting
from tidegate.experiments.workload import own_rate_rps, requests_of
from tidegate.reports.comparison import LevelGoodput, RunAt

GUESS_FROM, GUESS_TO = 0.2, 0.8
"""Shares of the limit between which a search begins to look."""
BLIND_FACTOR = 8.0
"""Times the trace's own rate: the end of the first guess where no limit is known."""
FLOOR = 0.01
"""Of the first guess's lower end: a system that cannot serve that much serves nothing."""


def probe_job(setting: Setting, rate_rps: float, seed: int) -> Job:
    """Return the job of one run of a search."""
    key = setting.digest(kind="probe", rate_rps=rate_rps, seed=seed)
    return Job(key, probe, (setting, rate_rps, seed), f"{setting.system} at {rate_rps:.2f} requests/s")


async def find_goodput(
    setting: Setting,
    level: float,
    seeds: Sequence[int],
    tolerance: float,
    limit_rps: float | None,
    workers: Workers,
) -> LevelGoodput:
    """Return the goodput of ``setting`` at ``level``; a known ``limit_rps`` tells where to look first."""
    if limit_rps is not None and limit_rps <= 0:
        reason = "more requests than may miss cannot attain even on an empty cluster"
        return LevelGoodput(level, "", 0.0, 0.0, 0.0, limit_rps, (), reason)
    if limit_rps is None:
        own_rps = own_rate_rps(requests_of(setting.workload))
        low_rps, high_rps = own_rps, BLIND_FACTOR * own_rps
    else:
        low_rps, high_rps = GUESS_FROM * limit_rps, GUESS_TO * limit_rps
    search = GoodputSearch(
        SearchSettings(level, low_rps, high_rps, tolerance, tuple(seeds), floor_rps=FLOOR * low_rps)
    )
    while probes := search.next_probes():
        runs = await asyncio.gather(
            *(workers.do(probe_job(setting, each.rate_rps, each.seed)) for each in probes)
        )
        search.tell(
            RunAt(each.rate_rps, each.seed, run["attainment"]) for each, run in zip(probes, runs, strict=True)
        )
    return search.result(limit_rps)

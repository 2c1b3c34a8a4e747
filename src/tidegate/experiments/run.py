"""One simulation from its setting, with what it cost to run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import IO, Any

from tidegate.experiments.setting import Setting
from tidegate.experiments.workload import at_rate, requests_of
from tidegate.measure.run_view import view_of
from tidegate.measure.summary import RunFacts, summarize_run
from tidegate.sim import SimRun, simulate


@dataclass(frozen=True, slots=True)
class Finished:
    """A run with what is known beside it. Reading the workload is not part of its times."""

    run: SimRun
    facts: RunFacts

    def summary(self, *, goodput_rps: float | None = None, limit_rps: float | None = None) -> dict[str, Any]:
        """Return the run's object of the ``--json`` contract."""
        facts = replace(self.facts, goodput_rps=goodput_rps, limit_rps=limit_rps)
        return summarize_run(self.run, facts)


def run_once(
    setting: Setting,
    *,
    rate_rps: float | None = None,
    seed: int = 0,
    journal: IO[bytes] | None = None,
    watch: Callable[[int], None] | None = None,
) -> Finished:
    """Simulate ``setting`` at a mean rate (None: the workload's own), with one draw of the workload.

    ``watch`` is told now and then how many requests have arrived.
    Raises ConfigError or TraceError for a workload, fleet or system that cannot be run.
    """
    requests = at_rate(requests_of(setting.workload), rate_rps, seed)
    system, replicas = setting.make_system(), setting.fleet.replicas()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    run = simulate(requests, system, replicas, setting.settings, journal=journal, watch=watch)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    trace = setting.workload.trace or setting.workload.describe()
    return Finished(run, RunFacts(system.name, trace, seed, wall_s, cpu_s))


def probe(setting: Setting, rate_rps: float, seed: int) -> dict[str, Any]:
    """Return the run's object of the ``--json`` contract: what a goodput search asks for."""
    return run_once(setting, rate_rps=rate_rps, seed=seed).summary()


def look(setting: Setting, rate_rps: float, seed: int) -> dict[str, Any]:
    """Return ``{"summary", "view", "warnings"}`` of a run, for tables and charts."""
    finished = run_once(setting, rate_rps=rate_rps, seed=seed)
    return {
        "summary": finished.summary(),
        "view": view_of(finished.run).to_json(),
        "warnings": list(finished.run.warnings),
    }

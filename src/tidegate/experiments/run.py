"""What is worked out of a setting: one simulation, with what it cost to run, and the fluid limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import IO, Any

from tidegate.experiments.jobs import Job, Workers
from tidegate.experiments.setting import Setting
from tidegate.measure.run_view import view_of
from tidegate.measure.summary import RunFacts, summarize_run
from tidegate.sim import SimRun, simulate
from tidegate.workloads.choice import draw_at_rate

CLOSED_LOOP = "in a closed loop arrivals depend on the system"
KEPT_TIMES = "the limit is one of stretched times, and here rates are numbers of requests"


@dataclass(frozen=True, slots=True)
class Finished:
    """A run with what is known beside it. Reading the workload is not part of its times."""

    run: SimRun
    facts: RunFacts

    def summary(self, **rates: float | None) -> dict[str, Any]:
        """Return the run's object of the ``--json`` contract, with the ``rates`` of ``RunFacts``."""
        given: dict[str, Any] = dict(rates)
        return summarize_run(self.run, replace(self.facts, **given))


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
    requests = draw_at_rate(setting.workload, rate_rps, seed)
    system, replicas = setting.make_system(), setting.fleet.replicas()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    run = simulate(requests, system, replicas, setting.settings, journal=journal, watch=watch)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    trace = setting.workload.trace or setting.workload.describe()
    return Finished(run, RunFacts(system.name, trace, seed, wall_s, cpu_s))


def probe(setting: Setting, rate_rps: float, seed: int) -> dict[str, Any]:
    """Return the run's object of the ``--json`` contract: what a goodput search asks for."""
    return run_once(setting, rate_rps=rate_rps, seed=seed).summary()


def run_with_view(setting: Setting, rate_rps: float, seed: int) -> dict[str, Any]:
    """Return ``{"summary", "view", "warnings"}`` of a run, for tables and charts."""
    finished = run_once(setting, rate_rps=rate_rps, seed=seed)
    return {
        "summary": finished.summary(),
        "view": asdict(view_of(finished.run)),
        "warnings": list(finished.run.warnings),
    }


def find_limit(setting: Setting, level: float, max_batch_tokens: int, seed: int) -> dict[str, Any]:
    """Return ``{"limit_rps", "binding"}`` of the setting's fleet and one draw of its workload.

    Above that mean rate no schedule attains the level; None where there is no bound. In words what
    sets it. ``max_batch_tokens`` replaces the fleet's: the largest that anyone uses.
    """
    from tidegate.bound.limit import fluid_limit  # brings a solver along: half a second

    replicas = setting.fleet.replicas()
    found = fluid_limit(
        draw_at_rate(setting.workload, None, seed),
        [replica.profile for replica in replicas],
        [replica.instance for replica in replicas],
        setting.settings.loosest_slo,
        level=level,
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=setting.fleet.engine.max_num_seqs,
        host_s=setting.fleet.engine.host_s,
    )
    return {"limit_rps": found.limit_rps, "binding": found.binding}


def unlimited(setting: Setting) -> str:
    """Return why a setting has no fluid limit, empty where it has one."""
    if setting.settings.closed_loop:
        return CLOSED_LOOP
    return KEPT_TIMES if setting.workload.keep_times else ""


async def largest_limit(
    setting: Setting, level: float, max_batch_tokens: int, seeds: Iterable[int], workers: Workers
) -> dict[str, Any]:
    """Return what ``find_limit`` does for the draw with the largest limit, the same for all systems.

    No run of any of ``seeds`` attains the level above it. Some settings have none (see ``unlimited``).
    """
    if why := unlimited(setting):
        return {"limit_rps": None, "binding": f"nothing: {why}"}
    title = f"limit at {setting.settings.loosest_slo}, {100 * level:g} %"
    anyone = replace(setting, system="", split=None)
    jobs = [
        job_of(find_limit, anyone, title, level=level, max_batch_tokens=max_batch_tokens, seed=seed)
        for seed in seeds
    ]
    found: list[dict[str, Any]] = await asyncio.gather(*map(workers.do, jobs))
    return max(found, key=lambda each: float("inf") if each["limit_rps"] is None else each["limit_rps"])


def job_of(call: Callable[..., Any], setting: Setting, title: str, **arguments: Any) -> Job:
    """Return the job of ``call(setting, **arguments)``."""
    key = setting.digest(kind=call.__name__, **arguments)
    return Job(key, partial(call, setting, **arguments), title)

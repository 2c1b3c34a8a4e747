"""Systems x traces: every system's goodput, and its runs at rates where they can be held side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import tidegate
from tidegate.experiments.achievable import SIMULATIONS
from tidegate.experiments.jobs import Workers
from tidegate.experiments.reference import with_reference
from tidegate.experiments.run import job_of, largest_limit, run_with_view, unlimited
from tidegate.experiments.search import EXPECTED_PROBES, RACED_PROBES, find_goodput
from tidegate.experiments.setting import Setting
from tidegate.experiments.systems import Candidate, Contender
from tidegate.measure.run_view import RunView
from tidegate.reports.comparison import ComparedSystem, Comparison, LevelGoodput, TraceComparison
from tidegate.workloads.choice import WorkloadChoice, own_rate_rps, requests_of

FINALISTS = 2
"""Of several candidates, those that are searched with every seed; the others with the first only, and only
to where the best so far is known to be better."""
SHOWN_RUNS = 2
"""Runs of a system that are shown: at its goodput and at the common rate."""
REFERENCES = ("static:best", "static:even", "static")
"""Systems whose goodput is the common rate, the first that is compared."""

Search = Callable[[Candidate, int, float], Awaitable[LevelGoodput]]
"""Finds the goodput of a candidate over a number of seeds, or that it is not above a rate."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to compare. ``setting`` has everything but the workload and the system; ``titles`` name traces.

    With ``achievable`` a clairvoyant search tells what some schedule attains.
    """

    setting: Setting
    workloads: Mapping[str, WorkloadChoice]
    contenders: Sequence[Contender]
    levels: tuple[float, ...]
    seeds: int
    tolerance: float
    command: str
    facts: Mapping[str, str]
    price_per_h: float | None = None
    achievable: bool = False


async def compare(plan: Plan, workers: Workers) -> Comparison:
    """Find every goodput and run what the report shows. Raises ConfigError or TraceError for a workload."""
    for workload in plan.workloads.values():
        own_rate_rps(requests_of(workload))
    workers.expect(len(plan.workloads) * runs_per_trace(plan))
    traces = await asyncio.gather(
        *(compare_on(plan, title, workload, workers) for title, workload in plan.workloads.items())
    )
    settings = plan.setting.settings
    return Comparison(
        traces=tuple(traces),
        levels=plan.levels,
        seeds=plan.seeds,
        instances=plan.setting.fleet.size,
        slo=str(settings.slo),
        profile=plan.setting.fleet.title,
        version=tidegate.__version__,
        command=plan.command,
        facts=plan.facts,
        tolerance=plan.tolerance,
        least=None if plan.setting.bounds is None else plan.setting.bounds[0],
        price_per_h=plan.price_per_h,
    )


def runs_per_trace(plan: Plan) -> float:
    """Return about how many runs a trace takes: limits, searches, and the runs that are shown."""
    probes = 0.0
    for contender in plan.contenders:
        candidates = len(contender.candidates)
        few = candidates <= FINALISTS
        raced = 0 if few else candidates - 1
        full = candidates * plan.seeds if few else 1 + FINALISTS * plan.seeds * (plan.seeds > 1)
        probes += EXPECTED_PROBES * full + RACED_PROBES * raced
    probes += plan.achievable * SIMULATIONS * plan.seeds
    return len(plan.levels) * (plan.seeds + probes) + SHOWN_RUNS * len(plan.contenders)


async def compare_on(plan: Plan, title: str, workload: WorkloadChoice, workers: Workers) -> TraceComparison:
    """Find the goodputs on one workload of a plan, and run what is shown of it."""
    setting = replace(plan.setting, workload=workload)
    most_chunk = max(
        each.applied(setting).fleet.engine.max_batch_tokens
        for contender in plan.contenders
        for each in contender.candidates
    )
    limits = {}
    for level in plan.levels:
        limits[level] = await largest_limit(setting, level, most_chunk, range(plan.seeds), workers)
        workers.credit(plan.seeds)

    async def search(level: float, candidate: Candidate, seeds: int, best_rps: float) -> LevelGoodput:
        limit_rps = limits[level]["limit_rps"]
        found = await find_goodput(
            candidate.applied(setting), level, range(seeds), plan.tolerance, limit_rps, workers, best_rps
        )
        return replace(found, chosen=candidate.label)

    searches = {level: partial(search, level) for level in plan.levels}
    found = await asyncio.gather(*(_entry(plan, contender, searches) for contender in plan.contenders))
    rate_rps, rate_is = common_rate([entry for entry, _ in found])
    why, how = unlimited(setting), ""
    if plan.achievable and not why:
        compared, how = await with_reference(setting, found, workers)
        found = [(entry, by_level) for entry, (_, by_level) in zip(compared, found, strict=True)]
    entries = await asyncio.gather(
        *(_with_runs(by_level[0].applied(setting), entry, rate_rps, workers) for entry, by_level in found)
    )
    return TraceComparison(
        trace=workload.trace,
        title=title,
        entries=tuple(entry for entry, _ in entries),
        common_rate_rps=rate_rps,
        common_rate_is=rate_is,
        limit_binding=limits[plan.levels[0]]["binding"],
        warnings=tuple(
            dict.fromkeys(
                [f"no fluid limit: {why}"] * bool(why) + [text for _, texts in entries for text in texts]
            )
        ),
        own_rate_rps=own_rate_rps(requests_of(workload)),
        achieved_by=how,
    )


async def _entry(
    plan: Plan, contender: Contender, searches: Mapping[float, Search]
) -> tuple[ComparedSystem, list[Candidate]]:
    """Return a contender's goodputs and the candidate that is best at each level."""
    found = [
        await search_candidates(contender.candidates, plan.seeds, searches[level]) for level in plan.levels
    ]
    best = [best_candidate(each) for each in found]
    levels = tuple(each[candidate] for each, candidate in zip(found, best, strict=True))
    several = len(contender.candidates) > 1
    others = {candidate.label: each for candidate, each in found[0].items()} if several else {}
    return ComparedSystem(contender.name, levels, others), best


async def search_candidates(
    candidates: Sequence[Candidate], seeds: int, search: Search
) -> dict[Candidate, LevelGoodput]:
    """Search every candidate: one after the other with the first seed, from the best so far on, then the best
    few with every seed. Who ends at the rate of a better one is ranked by what it attained there."""

    async def all_of(chosen: Sequence[Candidate]) -> dict[Candidate, LevelGoodput]:
        found = await asyncio.gather(*(search(each, seeds, 0.0) for each in chosen))
        return dict(zip(chosen, found, strict=True))

    if len(candidates) <= FINALISTS:
        return await all_of(candidates)
    first: dict[Candidate, LevelGoodput] = {}
    for candidate in candidates:
        best_rps = max((each.goodput_rps for each in first.values()), default=0.0)
        first[candidate] = await search(candidate, 1, best_rps)

    def rank(candidate: Candidate) -> float:
        found = first[candidate]
        if found.below_rps is None:
            return found.goodput_rps
        return found.below_rps * min(run.attainment for run in found.probes) / found.level

    return first | (await all_of(sorted(candidates, key=rank)[-FINALISTS:]) if seeds > 1 else {})


def best_candidate(found: Mapping[Candidate, LevelGoodput]) -> Candidate:
    """Return the candidate of the highest goodput among those that were searched with the most seeds."""
    return max(
        found, key=lambda each: (len({run.seed for run in found[each].probes}), found[each].goodput_rps)
    )


def common_rate(entries: Sequence[ComparedSystem]) -> tuple[float | None, str]:
    """Return the rate at which to show all systems, and what it is.

    It is the goodput, at the first level, of the first of ``REFERENCES`` that is there, else of the system in
    the middle; None where no system has one.
    """
    goodputs = {entry.system: entry.levels[0].goodput_rps for entry in entries}
    seeds = max((entry.levels[0].seeds for entry in entries), default=1)
    mean = f", the mean of {seeds} draws" if seeds > 1 else ""
    for system in REFERENCES:
        if goodputs.get(system):
            return goodputs[system], f"the goodput of {system}{mean}"
    ranked = sorted((value, system) for system, value in goodputs.items() if value > 0)
    if not ranked:
        return None, ""
    value, system = ranked[(len(ranked) - 1) // 2]
    return value, f"the goodput of {system}{mean}"


async def _with_runs(
    setting: Setting, entry: ComparedSystem, common_rps: float | None, workers: Workers
) -> tuple[ComparedSystem, list[str]]:
    """Add the runs at the first seed's goodput and at the common rate; return the runs' warnings, too."""
    first = entry.levels[0]
    facts = {
        "system": entry.system,
        "goodput_rps": first.goodput_rps,
        "limit_rps": first.limit_rps,
        "share_of_limit": first.share_of_limit,
        "achievable_rps": first.achievable_rps,
        "share_of_achievable": first.share_of_achievable,
    }
    seen: dict[float, Any] = {}
    for rate_rps in {first.shown_rps, common_rps or 0.0} - {0.0}:
        title = f"{entry.system} at {rate_rps:.2f} requests/s"
        seen[rate_rps] = await workers.do(job_of(run_with_view, setting, title, rate_rps=rate_rps, seed=0))
    workers.credit(SHOWN_RUNS)
    own, common = seen.get(first.shown_rps), seen.get(common_rps or 0.0)
    shown = replace(
        entry,
        at_goodput=None if own is None else own["summary"] | facts,
        at_common=None if common is None else common["summary"] | facts,
        view=None if common is None else RunView(**common["view"]),
    )
    return shown, [text for each in seen.values() for text in each["warnings"]]

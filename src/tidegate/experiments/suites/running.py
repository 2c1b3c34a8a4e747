"""Runs the rows of a suite: what they will take, and what they find."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tidegate
from tidegate.core.errors import ConfigError, TidegateError
from tidegate.experiments.compare import Plan, compare_on, runs_per_trace
from tidegate.experiments.jobs import Workers
from tidegate.experiments.run import job_of, probe, run_once
from tidegate.experiments.search import BLIND_FACTOR
from tidegate.experiments.suites.rows import Claim, Experiment, known
from tidegate.experiments.systems import Candidate, Contender, contenders
from tidegate.measure.percentiles import t_interval
from tidegate.reports.blind import left_out
from tidegate.reports.comparison import TraceComparison
from tidegate.reports.suite import ClaimFound, SuiteReport, SuiteRow
from tidegate.workloads.choice import own_rate_rps, requests_of

SAMPLED_REQUESTS = 200
"""Requests by which the speed of a workload is measured before a suite."""
PER_INSTANCE_RPS = 2.0
"""The rate at which it is measured."""
ROWS_AT_ONCE = 2
"""Rows that are run side by side: workers keep the traces of a few in memory."""


@dataclass(frozen=True, slots=True)
class SuitePlan:
    """What to run of a suite, and how closely.

    ``variants`` are systems of one file, among which the subject's is chosen without its workload.
    """

    suite: str
    rows: tuple[Experiment, ...]
    levels: tuple[float, ...]
    seeds: int
    tolerance: float
    command: str
    facts: Mapping[str, str]
    variants: tuple[str, ...] = ()

    def of(self, row: Experiment) -> Plan:
        """Return a row as a comparison. Raises ConfigError where no system of it is there."""
        return Plan(
            setting=row.setting(),
            workloads={row.name: row.choice},
            contenders=row.contenders(),
            levels=self.levels,
            seeds=self.seeds,
            tolerance=self.tolerance,
            command=self.command,
            facts=self.facts,
        )

    def runs(self, row: Experiment) -> float:
        """Return about how many simulations a row takes."""
        claimed = sum(len(claim.systems) + 1 for claim in row.claims if claim.measure != "goodput")
        return (runs_per_trace(self.of(row)) if row.systems else 0.0) + self.seeds * claimed


@dataclass(frozen=True, slots=True)
class SuiteEstimate:
    """What a suite is thought to take: simulations, requests in them, and seconds of CPU."""

    runs: float
    requests: float
    cpu_s: float


def estimate(plan: SuitePlan) -> SuiteEstimate:
    """Measure each workload's speed on this machine, and count what all rows take.

    Raises ConfigError or TraceError for a workload that cannot be read.
    """
    requests = {row.name: _requests(row) for row in plan.rows}
    first = {row.workload: row for row in reversed(plan.rows)}
    speeds = {workload: _speed(plan, row) for workload, row in first.items()}
    runs = {row.name: plan.runs(row) for row in plan.rows}
    return SuiteEstimate(
        sum(runs.values()),
        sum(runs[name] * requests[name] for name in runs),
        sum(runs[row.name] * requests[row.name] / speeds[row.workload] for row in plan.rows),
    )


def _requests(row: Experiment) -> float:
    """Return how many requests a run of a row has, in the geometric middle of the rates that are tried."""
    known_requests = len(requests_of(row.choice))
    return known_requests * math.sqrt(BLIND_FACTOR) if row.choice.keep_times else known_requests


def _speed(plan: SuitePlan, row: Experiment) -> float:
    """Return how many requests of a row are simulated in a second of CPU."""
    names = known([*row.systems, *(name for claim in row.claims for name in claim.systems)])[0]
    candidate = contenders(names[:1], row.instances)[0].candidates[0]
    setting = candidate.applied(row.setting())
    few = replace(setting, workload=replace(row.choice, limit=SAMPLED_REQUESTS, keep_times=False))
    facts = run_once(few, rate_rps=PER_INSTANCE_RPS * row.instances).facts
    return min(SAMPLED_REQUESTS, len(requests_of(few.workload))) / max(1e-6, facts.cpu_s)


async def run_suite(plan: SuitePlan, workers: Workers) -> SuiteReport:
    """Run every row. One that cannot be run says so in the report, and the others go on."""
    workers.expect(sum(map(plan.runs, plan.rows)))
    free = asyncio.Semaphore(ROWS_AT_ONCE)

    async def limited(row: Experiment) -> SuiteRow:
        async with free:
            return await _run_row(plan, row, workers)

    rows = await asyncio.gather(*map(limited, plan.rows))
    names = list(dict.fromkeys(name for row in plan.rows for name in row.systems))
    there, missing = known(names)
    report = SuiteReport(
        suite=plan.suite,
        subject=there[0],
        missing=tuple(missing),
        rows=tuple(rows),
        levels=plan.levels,
        seeds=plan.seeds,
        tolerance=plan.tolerance,
        version=tidegate.__version__,
        command=plan.command,
        facts=plan.facts,
    )
    return left_out(report, plan.variants, Path(plan.variants[0]).stem) if plan.variants else report


async def _run_row(plan: SuitePlan, row: Experiment, workers: Workers) -> SuiteRow:
    told = SuiteRow(row.name, row.workload, row.fleet, row.world.name, str(row.slo), None)
    try:
        own_rate_rps(requests_of(row.choice))
        found = await compare_on(plan.of(row), row.name, row.choice, workers) if row.systems else None
        claims = [each for claim in row.claims for each in await _claimed(plan, row, claim, found, workers)]
    except TidegateError as error:
        workers.credit(plan.runs(row))
        return replace(told, failed=error.message)
    if found is None:
        return replace(told, claims=tuple(claims))
    # Views are for charts of single comparisons; a suite has hundreds of them.
    entries = tuple(replace(entry, view=None) for entry in found.entries)
    return replace(told, comparison=replace(found, entries=entries), claims=tuple(claims))


async def _claimed(
    plan: SuitePlan, row: Experiment, claim: Claim, found: TraceComparison | None, workers: Workers
) -> list[ClaimFound]:
    """Return what each of a claim's systems has where the paper has its figure."""
    there, _ = known(claim.systems)
    if not there:
        return []
    if found is None:
        taken = {each.name: each.candidates[0] for each in contenders(there, row.instances)}
        values = {name: await _measured(plan, row, taken[name], claim, None, workers) for name in there}
        return [_told(row, claim, name, values[name]) for name in there]
    goodputs = {entry.system: entry.levels[0] for entry in found.entries}
    base = goodputs[claim.against]
    if claim.measure == "goodput":
        values = {name: goodputs[name].goodput_rps for name in (claim.against, *there)}
    else:
        taken = _candidates(row.contenders(), found)
        rate_rps = claim.factor * base.goodput_rps
        runs = [
            _measured(plan, row, taken[name], claim, rate_rps, workers) for name in (claim.against, *there)
        ]
        values = dict(zip((claim.against, *there), await asyncio.gather(*runs), strict=True))
    other = values[claim.against]
    return [_told(row, claim, name, _ratio(values[name], other)) for name in there]


def _ratio(mine: float | None, other: float | None) -> float | None:
    return mine / other if mine is not None and other else None


def _told(row: Experiment, claim: Claim, name: str, value: float | None) -> ClaimFound:
    return ClaimFound(row.name, claim.says, claim.measure, name, claim.against, claim.paper, value)


def _candidates(rows: Iterable[Contender], found: TraceComparison) -> dict[str, Candidate]:
    """Return each system's candidate that was best."""
    chosen = {entry.system: entry.chosen for entry in found.entries}
    return {row.name: next(each for each in row.candidates if each.label == chosen[row.name]) for row in rows}


async def _measured(
    plan: SuitePlan,
    row: Experiment,
    candidate: Candidate,
    claim: Claim,
    rate_rps: float | None,
    workers: Workers,
) -> float | None:
    """Return the mean over the seeds of a claim's measure at a rate, None for the workload's own.

    None where a run has none, or there is no such rate.
    """
    if rate_rps is not None and rate_rps <= 0:
        return None
    setting = replace(candidate.applied(row.setting()), workload=row.choice)
    title = f"{candidate.system} at {'its own rate' if rate_rps is None else f'{rate_rps:.2f} requests/s'}"
    jobs = [job_of(probe, setting, title, rate_rps=rate_rps, seed=seed) for seed in range(plan.seeds)]
    runs: Sequence[Mapping[str, object]] = await asyncio.gather(*map(workers.do, jobs))
    workers.credit(plan.seeds)
    values = [figure(run, claim.measure) for run in runs]
    known_values = [value for value in values if value is not None]
    return t_interval(known_values)[0] if len(known_values) == len(values) else None


def figure(run: Mapping[str, object], measure: str) -> float | None:
    """Return a figure of a run: "attainment", or a latency as in "ttft p90". Raises ConfigError else."""
    if measure == "attainment":
        return float(str(run["attainment"]))
    name, _, percentile = measure.partition(" ")
    found = run.get(f"{name}_s")
    if name not in ("ttft", "tpot") or not isinstance(found, Mapping | None):
        raise ConfigError(f"no run has the figure {measure!r}")
    return None if found is None or found.get(percentile) is None else float(found[percentile])

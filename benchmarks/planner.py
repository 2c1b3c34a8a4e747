"""How good plans are: ``python benchmarks/planner.py [best|fleet|table2|excerpts] --store FILE``.

``best`` plans for 8, 16 and 32 GPUs on three packaged workloads, and then tries every other deployment at 3 %
more than the first choice serves: one simulation each tells whether it is better by more than that. Plan and
trials are of one draw of the workload. Exhaustive: every count and size of replicas with one size per phase
(with ``--mixed-sizes`` any sizes in a phase, which is feasible for 8 GPUs), every budget of a step that the
program chooses from, all families, and every system of each; deployments that leave GPUs idle are left out,
for they serve no more than those that use them. What a bound excludes is not simulated, and a run ends once
it cannot attain the level. Where the plan simulates a part
of the fleet, so does the check: parts are compared with parts, and the first choice is run whole at the rate
that its parts serve. Results are kept in the store, and the same command goes on from there.

``fleet`` plans for 256 GPUs and prints the time. ``table2`` plans Llama-3.1-70B on H20 GPUs for the workloads
of AMPD's Table 2, or those of them that ``--workloads`` names, and shows where its deployments come.

``excerpts`` shows what deployments for long answers attain in trials, which are excerpts, and in a long run
that began empty.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.experiments.jobs import Store, Workers
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.planner import trial
from tidegate.planner.answer import answer
from tidegate.planner.deployment import Deployment, PoolOf, ReplicaKind, deployment, kinds_on, offers
from tidegate.planner.question import MODELLED_CHUNKS, Question, systems_for
from tidegate.planner.search import PlanSearch
from tidegate.planner.trial import attempt, trial_job
from tidegate.sim import SimSettings, simulate
from tidegate.workloads.choice import WorkloadChoice, requests_of

WORKLOADS = ("sample:azure-conv", "sample:reasoning-day", "sample:mooncake-conv")
SLOS = {"sample:mooncake-conv": Slo(3.0, 0.05)}
"""Others have 1 s and 50 ms; Mooncake's prompts of up to 85,000 tokens take more."""
MARGIN = 0.03
TABLE2 = {
    "like:toolbench": (8, (4, 1), (4, 1)),
    "like:hotpotqa": (8, (4, 1), (4, 1)),
    "like:dureader": (16, (4, 2), (8, 1)),
    "like:gaia": (32, (8, 2), (8, 2)),
}
"""AMPD's Table 2 for Llama-3.1-70B: GPUs, then tensor-parallel size and replicas for prefill and decode."""
TABLE2_SLO, TABLE2_SLOS = Slo(3.0, 0.05), {"like:gaia": Slo(10.0, 0.05)}
"""Ours: the paper states none. A prompt of 6,000 tokens takes 2 s on four H20; a tenth of GAIA's
take more than 3.2 s even alone, on eight."""
TABLE2_LEVEL = 0.9
LONG_ANSWERS = (
    ("arrow-lending", ((Role.PREFILL, 1, 3, 2048), (Role.DECODE, 4, 2, 8192)), (29.0, 31.0, 33.0)),
    (
        "minimal-load",
        ((Role.MIXED, 1, 1, 8192), (Role.MIXED, 2, 3, 8192), (Role.DECODE, 4, 1, 8192)),
        (30.0, 32.0, 34.0, 36.0),
    ),
    ("colocated", ((Role.MIXED, 1, 1, 8192), (Role.MIXED, 2, 5, 8192)), (32.0, 34.0)),
)
"""Deployments of ``excerpts``: system, pools (role, tensor-parallel size, replicas, budget), and rates."""
LONG_S = 700.0, 1400.0
"""Arrivals of a long run that count."""


def question_for(trace: str, gpus: int, model: str, gpu: str, slo: Slo | None = None) -> Question:
    """Return the question of a plan."""
    offered = offers([(gpu, None)], gpus, {})
    settings = SimSettings(slo=slo or SLOS.get(trace, Slo()))
    setting = Setting(WorkloadChoice(trace=trace), SimulatedFleet(()), "", None, settings)
    systems = systems_for(requests_of(setting.workload))
    return Question(setting, offered, kinds_on(offered, model), 0.9, systems=systems)


def pools(
    gpus: int, kinds: Sequence[ReplicaKind], role: Role, mixed_sizes: bool
) -> Iterator[list[tuple[ReplicaKind, int]]]:
    """Yield every way to fill exactly ``gpus`` with replicas of one size, or of any."""
    if not mixed_sizes:
        yield from ([(kind, gpus // kind.tp)] for kind in kinds if gpus % kind.tp == 0)
        return
    ranges = [range(gpus // kind.tp + 1) for kind in kinds]
    for counts in product(*ranges):
        if sum(count * kind.tp for count, kind in zip(counts, kinds, strict=True)) == gpus:
            yield [(kind, count) for kind, count in zip(kinds, counts, strict=True) if count]


def every(question: Question, mixed_sizes: bool) -> Iterator[Deployment]:
    """Yield every deployment that uses the whole budget."""
    whole = question.offers[0].count
    forms = {
        "disaggregated": (Role.PREFILL, Role.DECODE),
        "mixed+": (Role.PREFILL, Role.MIXED),
        "mixed-": (Role.MIXED, Role.DECODE),
    }
    assert {name.rstrip("+-") for name in forms} | {"colocated", "adaptive"} == set(question.families)
    for name, (first, second) in forms.items():
        systems = question.systems[name.rstrip("+-")]
        for many in range(1, whole):
            filled = product(
                pools(many, question.kinds, first, mixed_sizes and name == "disaggregated"),
                pools(whole - many, question.kinds, second, mixed_sizes and name == "disaggregated"),
            )
            for one, other in filled:
                for system, *budgets in product(systems, MODELLED_CHUNKS[first], MODELLED_CHUNKS[second]):
                    yield deployment(
                        system,
                        [PoolOf(first, kind, count, budgets[0]) for kind, count in one]
                        + [PoolOf(second, kind, count, budgets[1]) for kind, count in other],
                    )
    for one in pools(whole, question.kinds, Role.MIXED, mixed_sizes):
        systems = (*question.systems["colocated"], *question.systems["adaptive"])
        for system, budget in product(systems, MODELLED_CHUNKS[Role.MIXED]):
            yield deployment(system, [PoolOf(Role.MIXED, kind, count, budget) for kind, count in one])


async def check(question: Question, workers: Workers, mixed_sizes: bool) -> str:
    """Plan, try every other deployment, and say how much better the best is."""
    found = await answer(replace(question, seeds=1), workers)
    parts, whole = found.parts, found.ranked[0].deployment
    first = whole.part(parts)
    search = PlanSearch(found.part, workers)
    search.length = found.length
    goodput_rps = found.ranked[0].goodput.goodput_rps / parts
    print(f"  first choice: {whole.label}, {parts * goodput_rps:.4g} requests/s", flush=True)
    better: dict[Deployment, float] = {}
    candidates = [one for one in dict.fromkeys(every(found.part, mixed_sizes)) if one != first]
    bar_rps = (1.0 + MARGIN) * goodput_rps
    left = [one for one in candidates if search.bounds.rps(one, search.length) > bar_rps]
    left.sort(key=lambda one: -search.predicted_rps(one))
    for one in left:
        if not await search.challenged(one, bar_rps):
            continue
        found_rps = await search.first_measured(one, 1.02 * bar_rps)
        if found_rps >= bar_rps:  # Attainment can rise again above a rate that misses.
            better[one] = found_rps
            print(f"  better: {one.label}, {better[one] / goodput_rps - 1.0:+.1%}", flush=True)
    best = max(better, key=lambda one: better[one], default=None)
    words = "nothing serves 3 % more" if best is None else f"{best.label} serves {parts * better[best]:.4g}"
    text = (
        f"{whole.label} serves {parts * goodput_rps:.4g} requests/s; of {len(candidates)} others "
        f"{len(candidates) - len(left)} excluded by bounds, {len(left)} simulated: {words} "
        f"({len(better)} serve more by more than 3 %)"
    )
    if parts > 1:
        requests = replace(found.length, requests=parts * found.length.requests)
        at = trial_job(whole.applied(question.setting), whole.title, parts * goodput_rps, 0, requests)
        text += f"; {parts} parts, whole it attains {(await workers.do(at))['attainment']:.1%} there"
    return text


async def published(trace: str, workers: Workers) -> str:
    """Plan for a row of Table 2, without changes of roles, and say where the published deployment comes."""
    gpus, (p_tp, p_count), (d_tp, d_count) = TABLE2[trace]
    question = question_for(trace, gpus, "llama-3.1-70b", "h20_sxm", TABLE2_SLOS.get(trace, TABLE2_SLO))
    systems = systems_for(requests_of(question.setting.workload), "minimal-load")
    question = replace(question, systems=systems, level=TABLE2_LEVEL)
    kinds = {kind.tp: kind for kind in question.kinds}
    search = PlanSearch(question, workers)
    theirs = [
        deployment(
            "minimal-load",
            [
                PoolOf(Role.PREFILL, kinds[p_tp], p_count, chunk),
                PoolOf(Role.DECODE, kinds[d_tp], d_count, 8192),
            ],
        )
        for chunk in MODELLED_CHUNKS[Role.PREFILL]
    ]
    await search.run(also=theirs)
    goodputs = search.known.goodput_rps
    split = [one for one in goodputs if one.family == "disaggregated"]
    split.sort(key=lambda one: -goodputs[one])
    best = max(theirs, key=lambda one: goodputs[one])
    # Those that differ in the budget of a step alone are one deployment in the paper.
    sizes = list(dict.fromkeys(tuple((p.role, p.kind.tp, p.count) for p in one.pools) for one in split))
    place = 1 + sizes.index(tuple((p.role, p.kind.tp, p.count) for p in best.pools))
    lines = [
        f"{trace} on {gpus} x h20_sxm: the published {best.title} serves {goodputs[best]:.3g}/s, "
        f"place {place} of the {len(sizes)} with separate phases that were searched"
    ]
    for one in sorted(goodputs, key=lambda one: -goodputs[one])[:6]:
        lines.append(f"    {goodputs[one]:.3g}/s {one.family} {one.title}")
    return "\n".join(lines)


def excerpts() -> Iterator[str]:
    """Yield what each of ``LONG_ANSWERS`` attains in excerpts of three draws and in a long run of one."""
    question = question_for("sample:reasoning-day", 11, "llama-3.1-8b", "h100_sxm")
    kinds = {kind.tp: kind for kind in question.kinds}
    for system, pools_of, rates_rps in LONG_ANSWERS:
        chosen = deployment(system, [PoolOf(role, kinds[tp], *rest) for role, tp, *rest in pools_of])
        setting = chosen.applied(question.setting)
        for rate_rps in rates_rps:
            length = trial.length_for(requests_of(setting.workload), Slo().tpot_s, rate_rps)
            runs = [attempt(setting, rate_rps, seed, length.requests, length.excerpt) for seed in range(3)]
            shares = ", ".join(f"{run['attainment']:.1%}" for run in runs)
            last_s = LONG_S[1] + trial.AFTER_S
            arrivals = trial.drawn(setting.workload, int(rate_rps * last_s), 0)
            arrivals = trial.scaled_to(arrivals, rate_rps)
            served = arrivals, setting.make_system(), setting.fleet.replicas(), setting.settings
            table = simulate(*served, until_s=float(arrivals.arrival_s[-1])).requests
            counted = (table.arrival_s >= LONG_S[0]) & (table.arrival_s < LONG_S[1])
            share = float(table.attained[counted].mean())
            yield f"{chosen.label} at {rate_rps:g}/s: long run {share:.1%}, excerpts {shares}"


def cpu_s() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    return sum(
        resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def main() -> None:
    """Run one of the checks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("best", "fleet", "table2", "excerpts"))
    parser.add_argument("--store", type=Path, default=Path("planner.jsonl"))
    parser.add_argument("--gpus", type=int, nargs="*", default=[8, 16, 32])
    parser.add_argument("--workloads", nargs="*", default=list(WORKLOADS))
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--gpu", default="h100_sxm")
    parser.add_argument("--mixed-sizes", action="store_true")
    parser.add_argument("--requests", type=int, default=trial.MOST, help="of a run that count, at most")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    trial.MOST, trial.FEWEST = given.requests, min(given.requests, trial.FEWEST)
    if given.what == "fleet":
        for trace in given.workloads:
            before_s, before_cpu_s = time.monotonic(), cpu_s()

            async def plan(trace: str = trace) -> str:
                async with Workers(given.jobs, Store(None)) as workers:
                    found = await answer(question_for(trace, 256, given.model, given.gpu), workers)
                    return f"{found.ranked[0].deployment.title}, {found.ranked[0].goodput.goodput_rps:.4g}/s"

            text = asyncio.run(plan())
            took_s, used_s = time.monotonic() - before_s, cpu_s() - before_cpu_s
            print(f"{trace} 256 GPUs: {text}; {took_s:.1f} s, {used_s:.1f} s of CPU", flush=True)
        return
    if given.what == "excerpts":
        for line in excerpts():
            print(line, flush=True)
        return
    os.nice(10)
    store = Store(given.store)
    if given.what == "table2":
        for trace in [each for each in given.workloads if each in TABLE2] or TABLE2:

            async def row(trace: str = trace) -> str:
                async with Workers(given.jobs, store) as workers:
                    return await published(trace, workers)

            print(asyncio.run(row()), flush=True)
        return
    for gpus, trace in product(given.gpus, given.workloads):

        async def one(trace: str = trace, gpus: int = gpus) -> str:
            async with Workers(given.jobs, store) as workers:
                question = question_for(trace, gpus, given.model, given.gpu)
                return await check(question, workers, given.mixed_sizes)

        print(f"{trace} {gpus} GPUs: {asyncio.run(one())}", flush=True)


if __name__ == "__main__":
    main()

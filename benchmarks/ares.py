"""What moving decodes brings on reasoning traffic, in simulation: P99 TPOT, goodput, preemptions.

Run: ``python benchmarks/ares.py --traces DIR`` (DIR has the public traces ``servegen_r1_*``; about 10 minutes
on two cores; ``--pools 8,64 --requests 20000`` takes hours, and a run that is stopped goes on where it was).
``--rates 2,3,4 --seeds 3`` compares at given rates, and ``--beside`` Arrow with ARES beside it to either
alone on all timed traces. docs/policies/ares.md has the tables with their options.

A split with 8 (or 64) decode instances serves a trace whose answers are long beside the KV of an instance:
RTX 4090, Llama 3.1 8B, 41,408 tokens. Goodput is the highest rate at which the level attains ``SLO``, whose
TPOT is 1.25 times the step of a full instance. All systems are then run at the rate where round-robin breaks:
the lowest at which it was seen to miss the level. ARES' constants were chosen on ``servegen_r1_peak2h``;
``servegen_r1_day_thin16`` was not looked at for that. Rows ``NAME/SOURCE`` are by who predicts lengths:
nobody (``max-tokens``), the histogram learnt online, hidden states (with the errors measured of a trained
head), and the truth.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moving_traffic import CASES, Case
from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.dataplane.replica import EngineSettings
from tidegate.experiments.jobs import Store, Workers
from tidegate.experiments.run import job_of, probe
from tidegate.experiments.search import SearchSettings, find_goodput, search_goodput
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.measure.percentiles import t_interval
from tidegate.reports.comparison import LevelGoodput
from tidegate.sim import SimSettings
from tidegate.workloads.choice import WorkloadChoice, requests_of

PROFILE = "rtx_4090/llama-3.1-8b"
SLO = Slo(5.0, 0.030)
TRACES = ("servegen_r1_peak2h", "servegen_r1_day_thin16")
PREFILL_FOR = {8: 2, 64: 16}
"""Prefill instances by the size of the decode pool."""
CHUNKS = (512, 2048, 8192)
"""Token budgets of which a colocated fleet takes the best."""
SOURCES = ("max-tokens", "histogram", "hidden", "oracle")
ABLATED = ("ares", "ares-slo")
TOLERANCE = 0.04
FINE_TOLERANCE = 0.01
BESIDE = ("arrow-lending", "ares", "ares-slo", "arrow+ares")
EVEN = tuple(case for case in CASES if not case.name.startswith("orders"))
"""One case per trace: the fleets and targets of ``moving_traffic``."""


@dataclass(frozen=True)
class Contender:
    """A row: the best of its settings by goodput."""

    name: str
    settings: tuple[Setting, ...]


def contenders(trace: Path, prefill: int, pool: int, requests: int, only: Sequence[str]) -> list[Contender]:
    """Return the systems to compare on one trace and split: all, or ``only`` some beside round-robin."""
    fleet = SimulatedFleet(((packaged_profile(PROFILE), prefill + pool),))
    workload = WorkloadChoice(trace=str(trace), limit=requests)
    base = Setting(workload, fleet, "round-robin", (prefill, pool), SimSettings(slo=SLO))

    def predicted(name: str, source: str) -> Setting:
        return replace(base, system=name, settings=replace(base.settings, lengths=source))

    colocated = tuple(
        replace(base, system="colocated", split=None, fleet=replace(fleet, engine=EngineSettings(chunk)))
        for chunk in CHUNKS
    )
    rows = [
        Contender("round-robin", (base,)),
        Contender("static (current load)", (replace(base, system="static"),)),
        Contender("colocated, tuned", colocated),
        Contender("arrow-lending", (replace(base, system="arrow-lending"),)),
        *(
            Contender(f"{name}/{source}", (predicted(name, source),))
            for name in ABLATED
            for source in SOURCES
        ),
        Contender("arrow+ares/hidden", (predicted("arrow+ares", "hidden"),)),
        Contender("arrow+ares/oracle", (predicted("arrow+ares", "oracle"),)),
    ]
    return [row for row in rows if not only or row.name.split(" ")[0].rstrip(",") in ("round-robin", *only)]


async def compare(rows: list[Contender], level: float, seeds: range, workers: Workers) -> list[str]:
    """Search every goodput, run everyone where round-robin breaks, and return the table's lines."""

    async def best(row: Contender) -> tuple[Setting, LevelGoodput]:
        found = await asyncio.gather(*(goodput_of(each, level, seeds, workers) for each in row.settings))
        pairs = zip(row.settings, found, strict=True)
        return max(pairs, key=lambda pair: pair[1].goodput_rps)

    first = await best(rows[0])
    broken_rps = min(run.rate_rps for run in first[1].probes if run.attainment < level)
    chosen = [first, *await asyncio.gather(*map(best, rows[1:]))]
    runs = await asyncio.gather(*(at_rate(setting, broken_rps, seeds, workers) for setting, _ in chosen))
    lines = [
        f"Round-robin breaks at {broken_rps:.2f} requests/s.",
        "",
        "| system | goodput, requests/s | of round-robin's | attained there, % | p50 / p99 TPOT there, ms "
        "| p99 against round-robin | preemptions | migrations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base, base_p99_s = first[1], runs[0]["p99_s"]
    for row, (_, goodput), run in zip(rows, chosen, runs, strict=True):
        gains = [mine / its for mine, its in zip(goodput.by_seed, base.by_seed, strict=True)]
        falls = [100 * (mine / its - 1) for mine, its in zip(run["p99_s"], base_p99_s, strict=True)]
        lines.append(
            f"| {row.name} | {spread(goodput.by_seed)} | {spread(gains)} "
            f"| {spread([100 * share for share in run['attainment']], '{:.1f}')} "
            f"| {1e3 * mean(run['p50_s']):.0f} / {spread([1e3 * tail for tail in run['p99_s']], '{:.0f}')} "
            f"| {spread(falls, '{:.0f}')} % "
            f"| {mean(run['preemptions']):.0f} | {mean(run['migrations']):.0f} |"
        )
    return lines


async def goodput_of(
    setting: Setting,
    level: float,
    seeds: range,
    workers: Workers,
    guess: tuple[float, float, float] | None = None,
) -> LevelGoodput:
    """Return a setting's goodput, looked for from a ``guess`` on: two rates and the tolerance.

    Without one that is where KV that is always full would put the limit.
    """
    if guess is None:
        full_rps = most_rps(setting)
        guess = (0.35 * full_rps, 0.65 * full_rps, TOLERANCE)

    async def attainment(rate_rps: float, seed: int) -> float:
        title = f"{setting.system} at {rate_rps:.2f}"
        run = await workers.do(job_of(probe, setting, title, rate_rps=rate_rps, seed=seed))
        return float(run["attainment"])

    return await search_goodput(SearchSettings(level, *guess), seeds, attainment)


def most_rps(setting: Setting) -> float:
    """Return the rate at which the decodes of the workload would fill the decode pool's KV on average."""
    assert setting.fleet.groups
    requests = requests_of(setting.workload)
    profile, instances = setting.fleet.groups[0]
    step_s = profile.profile.step.seconds(16, profile.kv_capacity_tokens)
    held = (requests.input_tokens + 0.5 * requests.output_tokens) * requests.output_tokens
    return instances * profile.kv_capacity_tokens / float(held.mean() * step_s)


async def at_rate(
    setting: Setting, rate_rps: float, seeds: range, workers: Workers
) -> dict[str, tuple[float, ...]]:
    """Return what is told of a setting's runs at one rate, seed by seed."""
    title = f"{setting.system} at {rate_rps:.2f}"
    jobs = [job_of(probe, setting, title, rate_rps=rate_rps, seed=seed) for seed in seeds]
    done: list[dict[str, Any]] = [await workers.do(job) for job in jobs]
    return {
        "attainment": tuple(run["attainment"] for run in done),
        "p50_s": tuple(run["tpot_s"]["p50"] for run in done),
        "p99_s": tuple(run["tpot_s"]["p99"] for run in done),
        "preemptions": tuple(run["preemptions"] for run in done),
        "migrations": tuple(run["migrations"] for run in done),
    }


async def at_rates(
    rows: list[Contender], rates_rps: Sequence[float], seeds: range, workers: Workers
) -> list[str]:
    """Run everyone with its first setting at given rates, and return the table's lines."""
    lines = [
        "| requests/s | system | attained, % | P99 TPOT, ms | preemptions | migrations |",
        "|---|---|---|---|---|---|",
    ]
    for rate_rps in rates_rps:
        for row in rows:
            run = await at_rate(row.settings[0], rate_rps, seeds, workers)
            attained = spread([100 * share for share in run["attainment"]], "{:.1f}")
            tails_ms = spread([1e3 * tail_s for tail_s in run["p99_s"]], "{:.0f}")
            counts = f"{mean(run['preemptions']):.0f} | {mean(run['migrations']):.0f}"
            lines.append(f"| {rate_rps:g} | {row.name} | {attained} | {tails_ms} | {counts} |")
    return lines


async def beside(
    cases: Sequence[Case],
    names: Sequence[str],
    traces: Path,
    requests: int,
    level: float,
    rates_rps: Sequence[float],
    seeds: range,
    workers: Workers,
) -> None:
    """Print a table per case: is the last system as good as those before it, from an even split?

    The common rate is the best goodput of those alone. The last line compares seed by seed. With rates there
    is no search, but a row per rate and system.
    """
    for case in cases:
        fleet = SimulatedFleet(((packaged_profile(case.profile), case.instances),))
        workload = WorkloadChoice(trace=str(traces / case.file), limit=requests)
        settings = SimSettings(slo=Slo.parse(case.slo), lengths="hidden")
        rows = [Setting(workload, fleet, name, None, settings) for name in names]
        if rates_rps:
            alike = [Contender(row.system, (row,)) for row in rows]
            print(f"\r{'':70}\r\n{case.name}, {requests} requests, {case.profile}, {case.slo}\n")
            print("\n".join(await at_rates(alike, rates_rps, seeds, workers)), flush=True)
            continue
        first = await find_goodput(rows[0], level, seeds[:1], 0.1, None, workers)
        guess = (0.75 * first.goodput_rps, 1.3 * first.goodput_rps, FINE_TOLERANCE)
        found = await asyncio.gather(*(goodput_of(row, level, seeds, workers, guess) for row in rows))
        *alone, both = found
        better = max(alone, key=lambda each: each.goodput_rps)
        rate_rps = better.goodput_rps
        runs = await asyncio.gather(*(at_rate(row, rate_rps, seeds, workers) for row in rows))
        target = f"{case.instances} x {case.profile}, {case.slo}, level {level:g}"
        print(f"\r{'':70}\r\n{case.name} ({case.file}), {requests} requests, {target}; ", end="")
        print(f"the other columns at {rate_rps:.2f} requests/s\n")
        print("| system | goodput, requests/s | attained, % | P99 TPOT, ms | preemptions | migrations |")
        print("|---|---|---|---|---|---|")
        for row, goodput, run in zip(rows, found, runs, strict=True):
            attained = spread([100 * share for share in run["attainment"]], "{:.1f}")
            tails_ms = spread([1e3 * tail_s for tail_s in run["p99_s"]], "{:.1f}")
            counts = f"{mean(run['preemptions']):.0f} | {mean(run['migrations']):.0f}"
            print(f"| {row.system} | {spread(goodput.by_seed)} | {attained} | {tails_ms} | {counts} |")
        ratios = [mine / other for mine, other in zip(both.by_seed, better.by_seed, strict=True)]
        ahead = rows[found.index(better)].system
        print(f"\n{names[-1]} of {ahead}, the better alone: {spread(ratios, '{:.3f}')}", flush=True)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Return the mean, and with several values half the width of Student's interval for it."""
    middle, _, high = t_interval(values)
    told = form.format(middle)
    return told if len(values) < 2 else f"{told} ± {form.format(high - middle)}"


async def main_async(options: argparse.Namespace) -> None:
    """Print a table per trace, pool and level."""
    store = Store(None if options.out is None else options.out / "results.jsonl")

    def watch(share: float, title: str, fresh: float) -> None:
        print(f"\r{share:.0%} of the runs: {title:<50}", end="", file=sys.stderr, flush=True)

    async with Workers(options.jobs, store, watch) as workers:
        if options.beside:
            cases = [case for case in EVEN if case.name in options.cases.split(",")]
            names = [name for name in BESIDE if not options.rows or name in options.rows.split(",")]
            rates_rps = [float(rate) for rate in options.rates.split(",") if rate]
            for level in map(float, options.levels.split(",")):
                given = (options.traces, options.requests, level, rates_rps, range(options.seeds))
                await beside(cases, names, *given, workers)
            return
        for trace in options.names.split(","):
            for pool in map(int, options.pools.split(",")):
                file = options.traces / f"{trace}.csv.gz"
                requests = options.requests * pool // 8
                prefill = options.prefill or PREFILL_FOR[pool]
                rows = contenders(
                    file, prefill, pool, requests, options.rows.split(",") if options.rows else ()
                )
                seeds, title = range(options.seeds), f"{trace}, {prefill}P{pool}D, {requests} requests"
                if options.rates:
                    rates_rps = [pool / 8 * float(rate) for rate in options.rates.split(",")]
                    lines = await at_rates(rows, rates_rps, seeds, workers)
                    print(f"\r{'':70}\r\n{title}, {SLO}\n\n" + "\n".join(lines), flush=True)
                    continue
                for level in map(float, options.levels.split(",")):
                    lines = await compare(rows, level, seeds, workers)
                    print(
                        f"\r{'':70}\r\n{title}, attainment {level:g} of {SLO}\n\n" + "\n".join(lines),
                        flush=True,
                    )
    store.close()


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder of the traces")
    parser.add_argument("--names", default=",".join(TRACES))
    parser.add_argument("--pools", default="8", help="sizes of the decode pool: 8, 64")
    parser.add_argument("--prefill", type=int, help="prefill instances, else a quarter of the pool")
    parser.add_argument("--requests", type=int, default=1000, help="of each trace, per 8 decode instances")
    parser.add_argument("--levels", default="0.9", help="shares of requests that have to attain")
    parser.add_argument(
        "--rows",
        default="",
        help="only these beside round-robin, as in static,ares/oracle; of --beside: names of systems",
    )
    parser.add_argument(
        "--rates",
        default="",
        help="instead: at these rates, per 8 decode instances, or with --beside as they are",
    )
    parser.add_argument("--beside", action="store_true", help="instead: arrow+ares beside Arrow and ARES")
    parser.add_argument("--cases", default=",".join(case.name for case in EVEN), help="of --beside")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder of results, from which a stopped run goes on")
    asyncio.run(main_async(parser.parse_args()))


if __name__ == "__main__":
    main()

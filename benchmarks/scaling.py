"""Does looking ahead pay? Instance-hours that each system needs for 99 % on traces of production traffic.

Run: ``python benchmarks/scaling.py --traces DIR --out DIR`` (about 20 minutes of CPU; a run that is stopped
goes on where it was). DIR has the files of ``CASES``. Every system serves a whole trace on a fleet that it
sizes between 2 instances and ``most``; one that attains less than ``LEVEL`` is given a larger least fleet,
the smallest with which it attains that. ``static`` and ``reactive`` have as many instances all the time: the
fewest with which they attain it, ``static`` at the split of ``dopd.plan`` or one beside it.

The clairvoyant minimum is ``dopd`` with the true load of every period in place of a forecast, instances that
start at once, and no caution: what cannot be had. ``--constant`` is six hours of constant load instead.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.experiments.jobs import Store, Workers
from tidegate.experiments.run import job_of, probe
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.policies.dopd.controller import DopdConstants, DopdController
from tidegate.policies.dopd.plan import best_split
from tidegate.policies.dopd.ratio import Sizing
from tidegate.policies.dopd.service import ServingModel, Traffic
from tidegate.sim import SimSettings
from tidegate.systems import System, SystemOptions, make_system
from tidegate.workloads.choice import WorkloadChoice, requests_of
from tidegate.workloads.readers import read_trace
from tidegate.workloads.reshape import replicate
from tidegate.workloads.writers import write_trace

LEVEL = 0.99
LEAST = 2
SCALED = ("dopd", "dopd-code", "dynamo-load", "dynamo-sla")
HOPELESS = 0.8
"""What a split attains from which one beside it is not tried."""
SAMPLED = 2000
"""Requests of a trace whose lengths tell the split of a static fleet."""


@dataclass(frozen=True)
class Case:
    """A part of a trace on instances of one profile.

    ``traffic`` is the share of its requests that come, ``tokens`` what its lengths are multiplied by.
    ``first`` is the split at the start; ``guess`` where the search for the smallest static fleet begins.
    """

    trace: str
    traffic: float
    tokens: float
    start_s: float
    profile: str
    slo: Slo
    first: tuple[int, int]
    most: int
    guess: int = 2


CASES = (
    Case(
        "servegen_r1_day_thin16", 0.25, 1.0, 43_200.0, "rtx_4090/llama-3.1-8b", Slo(10.0, 0.06), (1, 2), 10, 6
    ),
    Case("servegen_mlarge_4h", 1.0, 3.0, 0.0, "a100_sxm/llama-3.1-70b/tp4", Slo(6.0, 0.08), (3, 2), 9, 6),
)


def clairvoyant(options: SystemOptions) -> System:
    """Return ``dopd`` without caution, for a simulation with the oracle and no start-up delays."""
    constants = replace(DopdConstants(), agreeing=1, dead_band=0.0)
    controller = DopdController(options.slo, options.fleet, (0.0, 0.0), constants=constants)
    made = make_system("dopd", slo=options.slo, split=options.split, fleet=options.fleet)
    return replace(made, name="clairvoyant", controllers=(controller,))


@dataclass(frozen=True)
class Trials:
    """Simulates one case."""

    case: Case
    workload: WorkloadChoice
    workers: Workers

    @cached_property
    def sizing(self) -> Sizing:
        """Return the model of the trace's lengths."""
        packaged, records = packaged_profile(self.case.profile), requests_of(self.workload)
        every = max(1, len(records) // SAMPLED)
        traffic = Traffic.of(1.0, records.input_tokens[::every], records.output_tokens[::every])
        model = ServingModel(packaged.profile, packaged.kv_capacity_tokens, packaged.kv_bytes_per_token)
        return Sizing(traffic, model, self.case.slo)

    async def run(self, setting: Setting) -> dict[str, Any]:
        title = f"{self.case.trace}, {setting.system} on {setting.bounds or setting.fleet.size}"
        found: dict[str, Any] = await self.workers.do(job_of(probe, setting, title, rate_rps=None, seed=0))
        return found

    async def scaled(self, system: str, least: int, **more: Any) -> dict[str, Any]:
        """Run a system that sizes the fleet from ``least`` on."""
        case = self.case
        prefill, decode = case.first
        first = (prefill, max(decode, least - prefill))
        settings = SimSettings(slo=case.slo, spares=case.most - sum(first), **more)
        fleet = SimulatedFleet(((packaged_profile(case.profile), case.most),))
        return await self.run(Setting(self.workload, fleet, system, first, settings, (least, case.most)))

    async def fixed(self, system: str, instances: int) -> dict[str, Any]:
        """Run a system on a fleet that stays; a static one at the split that attains most of three."""
        case, fleet = self.case, SimulatedFleet(((packaged_profile(self.case.profile), instances),))
        setting = Setting(self.workload, fleet, system, None, SimSettings(slo=case.slo))
        if system != "static":
            return await self.run(setting)
        setting = replace(setting, system="minimal-load")
        computed = best_split(self.sizing, instances, LEVEL, mixed=False).prefill
        best: dict[str, Any] = {"attainment": -1.0}
        for prefill in (computed, computed + 1, computed - 1):
            if 0 < prefill < instances and (prefill == computed or HOPELESS < best["attainment"] < LEVEL):
                split = (prefill, instances - prefill)
                found = await self.run(replace(setting, split=split)) | {"split": split}
                best = max(best, found, key=lambda each: float(each["attainment"]))
        return best


async def smallest(
    low: int, high: int, run: Callable[[int], Awaitable[dict[str, Any]]], guess: int
) -> tuple[int, dict[str, Any]]:
    """Return the least count of ``low..high`` with which a system attains, and its run; else the greatest.

    It begins at ``guess`` and goes on beside what it has tried, for a guess is near.
    """
    found: dict[int, dict[str, Any]] = {}
    while low < high:
        at = min(max(guess, low), high - 1)
        found[at] = await run(at)
        if found[at]["attainment"] >= LEVEL:
            high, guess = at, at - 1
        else:
            low = guess = at + 1
    return low, found.get(low) or await run(low)


def line(name: str, fleet: str, run: dict[str, Any], least_hours: float) -> str:
    """Return a row of the table."""
    actions = run["adds"] + run["drains"] + run["flips"]
    return (
        f"| {name} | {fleet} | {100 * run['attainment']:.2f} | {run['instance_hours']:.1f} | {actions} "
        f"| {run['reversals']} | {least_hours / run['instance_hours']:.2f} |"
    )


async def table(trials: Trials, names: tuple[str, ...]) -> None:
    """Print a case's rows, each as soon as it is known."""
    case = trials.case
    targets = f"TTFT {case.slo.ttft_s:g} s, TPOT {1e3 * case.slo.tpot_s:g} ms"
    cut = f"{case.traffic:g} of the requests from {case.start_s:g} s on, lengths times {case.tokens:g}"
    print(f"\n{case.trace}, {cut}, on {case.profile}; {targets}\n")
    print("| system | instances | attainment, % | instance-hours | actions | reversals | share |")
    print("|---" * 7 + "|", flush=True)
    truth = await trials.scaled(
        f"{__file__}:clairvoyant", LEAST, forecast="oracle", start_delay_s=0.0, decode_start_delay_s=0.0
    )
    hours = truth["instance_hours"]
    print(line("clairvoyant", f"{LEAST}..{case.most}", truth, hours), flush=True)
    missed = []
    for name in (each for each in names if each in SCALED):
        run = await trials.scaled(name, LEAST)
        print(line(name, f"{LEAST}..{case.most}", run, hours), flush=True)
        missed += [name] if run["attainment"] < LEVEL else []
    for name in (each for each in names if each not in SCALED):
        at, run = await smallest(LEAST, case.most, partial(trials.fixed, name), case.guess)
        split = f"{run['split'][0]}:{run['split'][1]}" if "split" in run else str(at)
        print(line(name, split, run, hours), flush=True)
    for name in missed:
        low = LEAST + 1
        at, run = await smallest(low, case.most, partial(trials.scaled, name), case.guess - 2)
        print(line(name, f"{at}..{case.most}", run, hours), flush=True)


async def constant(workers: Workers) -> None:
    """Print the rows of six hours at constant load."""
    loads = ((6.0, "lognormal:1000:1", "100"), (0.75, "lognormal:4000:1", "lognormal:400:1"))
    for rate_rps, prompt, answer in loads:
        case = Case("constant", 1.0, 1.0, 0.0, "l40s/llama-3.1-8b", Slo(4.0, 0.05), (1, 1), 6)
        choice = WorkloadChoice(poisson=rate_rps, duration_s=6 * 3600.0)
        choice = replace(choice, input_tokens=prompt, output_tokens=answer)
        run = await Trials(case, choice, workers).scaled("dopd", LEAST)
        name = f"dopd at {rate_rps:g} requests/s, {prompt} / {answer}"
        print(line(name, f"{LEAST}..{case.most}", run, 0.0), flush=True)


def workloads(options: argparse.Namespace) -> Iterator[tuple[Case, WorkloadChoice]]:
    """Yield the cases that are asked for, with their traces; a part of one is written beside the results."""
    for case in CASES:
        if options.case not in case.trace:
            continue
        trace = options.traces / f"{case.trace}.csv.gz"
        if case.traffic != 1.0:
            drawn = options.out / f"{case.trace}_{case.traffic:g}.csv"
            if not drawn.exists():
                write_trace(drawn, replicate(read_trace(trace), case.traffic, seed=1))
            trace = drawn
        yield case, WorkloadChoice(trace=str(trace), scale_tokens=case.tokens, start_s=case.start_s)


async def main_async(options: argparse.Namespace) -> None:
    """Print the tables."""
    options.out.mkdir(parents=True, exist_ok=True)
    store = Store(options.out / "results.jsonl")

    def watch(share: float, title: str, fresh: float) -> None:
        print(f"\r{title:<80}", end="", file=sys.stderr, flush=True)

    async with Workers(options.jobs, store, watch) as workers:
        if options.constant:
            await constant(workers)
        else:
            for case, workload in workloads(options):
                await table(Trials(case, workload, workers), tuple(options.systems.split(",")))
    store.close()


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path(), help="folder of the traces")
    parser.add_argument("--case", default="", help="only traces whose name holds this")
    parser.add_argument("--systems", default=",".join((*SCALED, "static", "reactive")))
    parser.add_argument("--constant", action="store_true", help="six hours of constant load instead")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    asyncio.run(main_async(parser.parse_args()))


if __name__ == "__main__":
    main()

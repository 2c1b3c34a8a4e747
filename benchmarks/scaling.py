"""Does looking ahead pay? Instance-hours that each system needs for 99 % on traces of production traffic.

Run: ``python benchmarks/scaling.py --traces DIR --out DIR`` (about 20 minutes of CPU; a run that is stopped
goes on where it was). DIR has the files of ``CASES``. Every system serves a whole trace on a fleet that it
sizes between 2 instances and ``most``; one that attains less than ``LEVEL`` is given a larger least fleet,
the smallest with which it attains that. ``static`` and ``reactive`` have as many instances all the time: the
fewest with which they attain it, ``static`` at the split of ``dopd.plan`` or one beside it.

The clairvoyant minimum is ``dopd`` with the true load of every period in place of a forecast, instances that
start at once, and no caution: what cannot be had. ``--constant`` is hours of constant load at several rates
instead. ``--choose`` tries the constants of ``TRIED`` on ``OTHERS``, traffic that is none of ``CASES``, and
says which needs the fewest instance-hours there at ``LEVEL``: those are the defaults of ``DopdConstants``, so
that ``CASES`` only report.
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
from tidegate.workloads.reshape import drift_mix, replicate, sine_drift
from tidegate.workloads.writers import write_trace

LEVEL = 0.99
LEAST = 2
SCALED = ("tidegate", "dopd", "dopd-code", "dynamo-load", "dynamo-sla")
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


L40S, A100 = "l40s/llama-3.1-8b", "a100_sxm/llama-3.1-70b/tp4"
OTHERS = (
    Case("m-small", 1.0, 4.0, 14_400.0, L40S, Slo(4.0, 0.05), (2, 5), 14),
    Case("mm-image", 1.0, 1.0, 14_400.0, L40S, Slo(4.0, 0.05), (1, 4), 10),
    Case("azure2023_conv", 1.0, 3.0, 0.0, A100, Slo(6.0, 0.08), (4, 2), 12),
)
"""Rates of m-small with lengths of Azure's conversations, rates of mm-image with lengths like reasoning, and
Azure's conversations with a ratio of prompts to answers that drifts; the curves are of other models and days
than ``CASES``."""
CURVES_RPS = {"m-small": 4.0, "mm-image": 3.5}
CHOOSING_S = 2.5 * 3600.0
TRIED = tuple(
    replace(DopdConstants(), agreeing=agreeing, prefill_upper=prefill, decode_upper=decode)
    for agreeing in (8, 12)
    for prefill, decode in ((0.25, 1.0), (0.0, 0.5))
)


def tried(number: int, options: SystemOptions) -> System:
    """Return ``dopd`` with the constants of a number in ``TRIED``."""
    controller = DopdController(options.slo, options.fleet, options.start_delay_s, constants=TRIED[number])
    made = make_system("dopd", slo=options.slo, split=options.split, fleet=options.fleet)
    return replace(made, name=f"tried{number}", controllers=(controller,))


globals().update({f"tried{number}": partial(tried, number) for number in range(len(TRIED))})


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
    long, short = ("lognormal:4000:1", "lognormal:400:1"), ("lognormal:1000:1", "lognormal:200:1")
    for rate_rps, (prompt, answer), hours in (
        *((rate_rps, long, 6.0) for rate_rps in (0.3, 0.75, 1.2, 2.0)),
        *((rate_rps, short, 6.0) for rate_rps in (3.0, 6.0, 10.0)),
    ):
        case = Case("constant", 1.0, 1.0, 0.0, L40S, Slo(4.0, 0.05), (1, 2), 12)
        choice = WorkloadChoice(poisson=rate_rps, duration_s=hours * 3600.0)
        choice = replace(choice, input_tokens=prompt, output_tokens=answer)
        run = await Trials(case, choice, workers).scaled("dopd", LEAST)
        name = f"dopd at {rate_rps:g} requests/s, {prompt} / {answer}"
        print(line(name, f"{LEAST}..{case.most}", run, 0.0), flush=True)


def other(case: Case, options: argparse.Namespace) -> WorkloadChoice:
    """Return the traffic of one of ``OTHERS``."""
    conversations = options.traces / "azure2023_conv.csv.gz"
    if case.trace == "azure2023_conv":
        drifting = options.out / "azure2023_conv_drift.csv"
        if not drifting.exists():
            write_trace(drifting, drift_mix(read_trace(conversations), sine_drift(1.5, 1800.0)))
        return WorkloadChoice(trace=str(drifting), scale_tokens=case.tokens)
    curve = f"{options.traces / 'servegen_rate_curves_10min.csv.gz'}:{case.trace}"
    rate_rps = CURVES_RPS[case.trace]
    choice = WorkloadChoice(rate_curve=curve, rate_rps=rate_rps, cv=1.5, scale_tokens=case.tokens, seed=3)
    choice = replace(choice, start_s=case.start_s, duration_s=CHOOSING_S)
    if case.trace == "mm-image":
        return replace(choice, input_tokens="lognormal:1367:2", output_tokens="lognormal:885:1.4")
    return replace(choice, lengths_from=str(conversations))


async def choose(workers: Workers, options: argparse.Namespace) -> None:
    """Print what each of ``TRIED`` does on ``OTHERS``, and which is chosen."""
    print("| agreeing | prefill_upper | decode_upper | attainment, % | instance-hours | actions |")
    print("|---" * 6 + "|", flush=True)
    hours: dict[int, float] = {}
    for number, each in enumerate(TRIED):
        runs = [
            await Trials(case, other(case, options), workers).scaled(f"{__file__}:tried{number}", LEAST)
            for case in OTHERS
        ]
        attained = ", ".join(f"{100 * run['attainment']:.2f}" for run in runs)
        used = ", ".join(f"{run['instance_hours']:.1f}" for run in runs)
        actions = ", ".join(str(run["adds"] + run["drains"] + run["flips"]) for run in runs)
        constants = f"{each.agreeing} | {each.prefill_upper:g} | {each.decode_upper:g}"
        print(f"| {constants} | {attained} | {used} | {actions} |", flush=True)
        if all(run["attainment"] >= LEVEL for run in runs):
            hours[number] = sum(run["instance_hours"] for run in runs)
    print(f"chosen: {TRIED[min(hours, key=lambda at: hours[at])] if hours else 'none attains'}")


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
        elif options.choose:
            await choose(workers, options)
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
    parser.add_argument("--choose", action="store_true", help="choose the constants, on other traffic")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    asyncio.run(main_async(parser.parse_args()))


if __name__ == "__main__":
    main()

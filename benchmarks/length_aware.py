"""What scheduling by length brings on a fixed split, in simulation: TTFT, TPOT, goodput.

Run: ``python benchmarks/length_aware.py --traces DIR`` (DIR has the public traces ``azure2023_conv`` and
``lengths_arxiv_summarization``; about 15 minutes of CPU). Arrivals are those of Azure's conversations; of a
share of the requests the lengths are drawn from arXiv summaries. Rates are shares of what the prefill
instances could compute alone, prompt by prompt. Goodput is the highest rate at which 90 % attain the targets.

Constants of the order and of the placement were chosen on the case ``chosen``, 1P1D, seed 0; all other rows
only report. ``--rules`` compares them there with others. Every system of a split places as ``minimal-load``.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from tidegate.core.slo import Slo
from tidegate.costs.forms import TransferCost
from tidegate.costs.library import PackagedProfile, packaged_profile
from tidegate.dataplane.replica import EngineSettings
from tidegate.experiments.run import run_once
from tidegate.experiments.search import SearchSettings, search_goodput
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.policies import order
from tidegate.policies.baselines import MINIMAL_LOAD
from tidegate.policies.dopd import length_placement
from tidegate.policies.dopd.length_placement import LengthPlacement
from tidegate.sim import SimSettings
from tidegate.systems import System, SystemOptions
from tidegate.workloads.choice import WorkloadChoice, requests_of
from tidegate.workloads.readers import read_trace, read_untimed

SLO = Slo(1.0, 0.025)
LEVEL = 0.9
TOLERANCE = 0.02
LOADS = (0.6, 0.75, 0.85, 0.95)
CHUNKS = (512, 1024, 2048, 8192)
"""Token budgets of which a tuned colocated fleet takes the best."""


def beside(options: SystemOptions) -> System:
    """Prefills on decode instances where that costs less."""
    name, summary = "beside", "prefills on decode instances where that costs less"
    prefill = LengthPlacement(MINIMAL_LOAD)
    return System(name=name, summary=summary, roles=options.roles(), prefill=prefill, decode=MINIMAL_LOAD)


BESIDE = f"{__file__}:beside"
ROWS = {
    "fifo": "minimal-load",
    "sjf": "minimal-load+sjf",
    "feasible-first": "minimal-load+feasible-first",
    "length-aware order": "minimal-load+length-aware",
    "placement": BESIDE,
    "both": f"{BESIDE}+length-aware",
    "placement and sjf": f"{BESIDE}+sjf",
    "both held": f"{BESIDE}+held-length-aware",
    "colocated": "colocated",
}


@dataclass(frozen=True)
class Case:
    """A workload, instances, targets; ``gbit_s`` replaces what the links carry."""

    profile: str = "h100_sxm/llama-3.1-8b"
    slo: Slo = SLO
    long_share: float = 0.3
    gbit_s: float | None = None

    @property
    def packaged(self) -> PackagedProfile:
        found = packaged_profile(self.profile)
        if self.gbit_s is None:
            return found
        link = TransferCost(0.001, self.gbit_s * 1e9 / 8)
        return replace(found, profile=replace(found.profile, transfer=link), inter_node=link)

    def __str__(self) -> str:
        links = "" if self.gbit_s is None else f", links of {self.gbit_s:g} Gbit/s"
        return f"{self.profile}, {self.slo}, {self.long_share:.0%} arXiv lengths{links}"


CASES = {
    "chosen": Case(),
    "few": Case(long_share=0.1),
    "many": Case(long_share=0.7),
    "tight": Case(slo=Slo(1.0, 0.015)),
    "a100": Case("a100_sxm/llama-3.1-8b", Slo(2.0, 0.02)),
    "links": Case(gbit_s=40.0),
}


@cache
def mixed(traces: Path, share: float) -> str:
    """Write the mixed trace and return its name."""
    timed = read_trace(str(traces / "azure2023_conv.csv.gz"))
    other = read_untimed(str(traces / "lengths_arxiv_summarization.csv.gz"))
    rng = np.random.default_rng(0)
    drawn = rng.random(len(timed)) < share
    which = rng.integers(len(other), size=len(timed))
    prompts = np.where(drawn, other.input_tokens[which], timed.input_tokens).tolist()
    answers = np.where(drawn, other.output_tokens[which], timed.output_tokens).tolist()
    path = Path(tempfile.mkdtemp()) / f"mixed-{share:g}.csv"
    rows = zip(timed.arrival_s.tolist(), prompts, answers, strict=True)
    lines = [f"{at_s:.4f},{prompt},{max(1, answer)}\n" for at_s, prompt, answer in rows]
    path.write_text("".join(["arrival_s,input_tokens,output_tokens\n", *lines]))
    return str(path)


@dataclass(frozen=True)
class Measured:
    """What is told of one run: seconds, seconds, seconds, a share."""

    ttft_p90_s: float
    long_ttft_p99_s: float
    tpot_p90_s: float
    attained: float


class Experiment:
    """Runs the systems of one case on one fleet."""

    def __init__(self, case: Case, pairs: int, options: argparse.Namespace) -> None:
        self._case, self._pairs = case, pairs
        self._workload = WorkloadChoice(
            trace=mixed(options.traces, case.long_share), limit=options.requests * pairs
        )
        self._seeds = range(options.seeds)
        prompts = requests_of(self._workload).input_tokens
        self._mean_tokens = float(prompts.mean())
        profile = case.packaged.profile
        self.prefill_rps = pairs / float(np.mean([profile.prefill_s(n) for n in prompts.tolist()]))

    def setting(self, system: str, chunk: int = 8192) -> Setting:
        """Return the simulation of a system."""
        fleet = SimulatedFleet(((self._case.packaged, 2 * self._pairs),), EngineSettings(chunk))
        split = None if system == "colocated" else (self._pairs, self._pairs)
        return Setting(self._workload, fleet, system, split, SimSettings(slo=self._case.slo))

    def measured(self, system: str, rate_rps: float) -> list[Measured]:
        """Run a system at a rate, once per seed."""
        return [self._once(self.setting(system), rate_rps, seed) for seed in self._seeds]

    def _once(self, setting: Setting, rate_rps: float, seed: int) -> Measured:
        table = run_once(setting, rate_rps=rate_rps, seed=seed).run.requests
        long = table.ok & (table.input_tokens > self._mean_tokens)
        return Measured(
            float(np.quantile(table.ttft_s[table.ok], 0.9)),
            float(np.quantile(table.ttft_s[long], 0.99)),
            float(np.nanquantile(table.tpot_s[table.ok], 0.9)),
            float(np.mean(table.attained)),
        )

    def goodput_rps(self, setting: Setting) -> float:
        """Return the goodput of seed 0."""

        async def attainment(rate_rps: float, seed: int) -> float:
            return self._once(setting, rate_rps, seed).attained

        wanted = SearchSettings(LEVEL, 0.8 * self.prefill_rps, self.prefill_rps, TOLERANCE)
        return asyncio.run(search_goodput(wanted, (0,), attainment)).goodput_rps


def mean(runs: Sequence[Measured], value: Callable[[Measured], float]) -> float:
    return sum(map(value, runs)) / len(runs)


def lines_at(experiment: Experiment, load: float, rows: dict[str, str]) -> list[str]:
    """Run all systems at one rate and return the table's lines; the first is compared with."""
    rate_rps = load * experiment.prefill_rps
    lines, first = [], None
    for name, system in rows.items():
        runs = experiment.measured(system, rate_rps)
        first = first or runs
        pairs = list(zip(runs, first, strict=True))
        ttft = sum(100 * (own.ttft_p90_s / base.ttft_p90_s - 1) for own, base in pairs) / len(pairs)
        tpot = sum(100 * (own.tpot_p90_s / base.tpot_p90_s - 1) for own, base in pairs) / len(pairs)
        long = [own.long_ttft_p99_s / base.long_ttft_p99_s for own, base in pairs]
        lines.append(
            f"| {rate_rps:.1f} | {name} | {mean(runs, lambda run: run.ttft_p90_s):.2f} ({ttft:+.0f} %) "
            f"| {sum(long) / len(long):.2f} (at most {max(long):.2f}) "
            f"| {1e3 * mean(runs, lambda run: run.tpot_p90_s):.1f} ({tpot:+.0f} %) "
            f"| {100 * mean(runs, lambda run: run.attained):.1f} |"
        )
    return lines


def goodputs(experiment: Experiment, rows: dict[str, str]) -> list[str]:
    """Search all goodputs, colocated also with the best token budget, and return the table's lines."""
    found = {name: experiment.goodput_rps(experiment.setting(system)) for name, system in rows.items()}
    tuned = {chunk: experiment.goodput_rps(experiment.setting("colocated", chunk)) for chunk in CHUNKS}
    best = max(tuned, key=lambda chunk: tuned[chunk])
    return [
        f"| {name} | {rps:.1f} | {rps / found['fifo']:.2f} | {rps / found['colocated']:.2f} "
        f"| {rps / tuned[best]:.2f} |"
        for name, rps in (*found.items(), (f"colocated, budget {best}", tuned[best]))
    ]


def rules(experiment: Experiment) -> list[str]:
    """Run the system with other constants, one changed at a time, and return the table's lines."""
    lines = []
    changes = [
        (order, "OVERTAKEN", (0.15, 0.0, 0.3, 1e9)),
        (order, "SLACK", (0.0, 1.0)),
        (order, "SHARED", (0.0, 1e9)),
        (length_placement, "HEADROOM", (0.6, 0.9)),
    ]
    for module, name, values in changes:
        chosen = getattr(module, name)
        for value in values:
            setattr(module, name, value)
            for load in (0.75, 0.95):
                changed = {"fifo": ROWS["fifo"], f"{name} = {value:g}": ROWS["both"]}
                _, line = lines_at(experiment, load, changed)
                lines.append(line)
        setattr(module, name, chosen)
    return lines


def main() -> None:
    """Read the options and print the tables, each as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder of the traces")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--pairs", default="1,2", help="prefill and as many decode instances")
    parser.add_argument("--requests", type=int, default=5000, help="of the trace, per pair")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", default=",".join(ROWS), help="systems, fifo first")
    parser.add_argument("--loads", default=",".join(map(str, LOADS)), help="shares of the prefill capacity")
    parser.add_argument("--rules", action="store_true", help="instead: other constants on the first case")
    parser.add_argument("--no-goodput", action="store_true", help="without the search of goodputs")
    options = parser.parse_args()
    titles = "| requests/s | system | P90 TTFT, s | long P99 TTFT of FIFO's | P90 TPOT, ms | attained, % |"
    rows = {name: ROWS[name] for name in options.rows.split(",")}
    for name in options.cases.split(","):
        for pairs in map(int, options.pairs.split(",")):
            experiment = Experiment(CASES[name], pairs, options)
            print(f"\n{name}, {pairs}P{pairs}D: {CASES[name]}\n\n{titles}\n" + "|---" * 6 + "|", flush=True)
            if options.rules:
                print("\n".join(rules(experiment)), flush=True)
                continue
            for load in map(float, options.loads.split(",")):
                print("\n".join(lines_at(experiment, load, rows)), flush=True)
            if not options.no_goodput:
                print("\n| system | goodput, requests/s | of FIFO's | of colocated | of tuned |")
                print("|---" * 5 + "|\n" + "\n".join(goodputs(experiment, rows)), flush=True)


if __name__ == "__main__":
    main()

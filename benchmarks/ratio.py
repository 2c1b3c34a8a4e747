"""Does the computed split serve the most? Simulated goodput over all splits of 8 and of 16 instances.

Run: ``python benchmarks/ratio.py`` (about an hour of one core; with ``--out DIR`` a run that is stopped goes
on where it was). Every pair of lengths is Poisson traffic of one prompt length and one answer length on H100s
with Llama 3.1 8B, within ``SLO`` for 90 % of the requests; placement is ``minimal-load``. The computed split
and both beside it are searched. Any other split is tried at a rate just above the best of those, and searched
only if it attains the level there. Of the computed model nothing is fitted to these runs.

``--mixed`` compares another choice: one fleet of mixed instances (``colocated``) against the computed split.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.experiments.jobs import Store, Workers
from tidegate.experiments.run import job_of, probe
from tidegate.experiments.search import SearchSettings, search_goodput
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.policies.dopd.ratio import ServingModel, Sizing, Traffic
from tidegate.sim import SimSettings
from tidegate.workloads.choice import WorkloadChoice

PROFILE = "h100_sxm/llama-3.1-8b"
SLO = Slo(1.0, 0.025)
LEVEL = 0.9
PAIRS = (
    (512, 128),
    (1024, 64),
    (1024, 256),
    (1024, 512),
    (2048, 32),
    (2048, 256),
    (4096, 64),
    (4096, 256),
    (4096, 512),
    (8192, 64),
    (8192, 256),
    (16384, 128),
)
"""Prompt and answer tokens."""
TOLERANCE = 0.02
LIFETIMES, SHORTEST_S = 6.0, 20.0
"""A run lasts so many times as long as an answer, at least so long."""
FEWEST, MOST = 3_000, 12_000
"""Requests of a run."""


@dataclass(frozen=True)
class Pair:
    """Lengths on a fleet, with what the model says of them."""

    prompt: int
    answer: int
    instances: int

    @property
    def sizing(self) -> Sizing:
        packaged = packaged_profile(PROFILE)
        model = ServingModel(packaged.profile, packaged.kv_capacity_tokens, packaged.kv_bytes_per_token)
        return Sizing(Traffic.of(1.0, np.array([self.prompt]), np.array([self.answer])), model, SLO)

    def setting(self, predicted_rps: float, prefill: int) -> Setting:
        """Return the simulation of a split, of a length that the predicted goodput tells; 0 is all mixed."""
        span_s = max(SHORTEST_S, LIFETIMES * self.answer * SLO.tpot_s)
        requests = min(MOST, max(FEWEST, int(predicted_rps * span_s)))
        workload = WorkloadChoice(
            poisson=1.0, input_tokens=str(self.prompt), output_tokens=str(self.answer), limit=requests
        )
        fleet = SimulatedFleet(((packaged_profile(PROFILE), self.instances),))
        split = (prefill, self.instances - prefill)
        split_setting = Setting(workload, fleet, "minimal-load", split, SimSettings(slo=SLO))
        return split_setting if prefill else replace(split_setting, system="colocated", split=None)


class Searches:
    """Finds goodputs of one pair by simulation."""

    def __init__(self, pair: Pair, predicted_rps: float, workers: Workers) -> None:
        self._pair, self._predicted_rps, self._workers = pair, predicted_rps, workers

    async def attains(self, prefill: int, rate_rps: float) -> float:
        """Return what a split attains at a rate."""
        setting = self._pair.setting(self._predicted_rps, prefill)
        title = f"{self._pair.prompt}/{self._pair.answer}, {prefill} of {self._pair.instances}"
        run = await self._workers.do(job_of(probe, setting, title, rate_rps=rate_rps, seed=0))
        return float(run["attainment"])

    async def goodput_rps(self, prefill: int, near_rps: float) -> float:
        """Return a split's goodput, looked for first near a rate."""
        wanted = SearchSettings(LEVEL, 0.95 * near_rps, 1.02 * near_rps, TOLERANCE)

        async def attainment(rate_rps: float, seed: int) -> float:
            return await self.attains(prefill, rate_rps)

        return (await search_goodput(wanted, (0,), attainment)).goodput_rps


async def row(pair: Pair, workers: Workers) -> str:
    """Search one pair and return its line of the table."""
    sizing, fleet = pair.sizing, pair.instances
    predicted = {p: sizing.split_goodput_rps(p, fleet - p, LEVEL) for p in range(1, fleet)}
    computed = max(predicted, key=lambda p: predicted[p])
    searches = Searches(pair, predicted[computed], workers)
    found = {computed: await searches.goodput_rps(computed, predicted[computed])}
    for beside in (computed - 1, computed + 1):
        if 0 < beside < fleet:
            found[beside] = await searches.goodput_rps(beside, predicted[beside])
    for other in predicted:
        top_rps = max(found.values())
        if other not in found and await searches.attains(other, top_rps * (1 + TOLERANCE)) >= LEVEL:
            found[other] = await searches.goodput_rps(other, top_rps * (1 + TOLERANCE))
    best = max(found, key=lambda p: found[p])
    loss = 100 * (1 - found[computed] / found[best])
    balance = fleet * sizing.ratio / (1 + sizing.ratio)
    return (
        f"| {pair.prompt} / {pair.answer} | {fleet} | {balance:.2f} | {computed}:{fleet - computed} "
        f"| {best}:{fleet - best} | {predicted[computed]:.1f} | {found[computed]:.1f} | {found[best]:.1f} "
        f"| {loss:.1f} |"
    )


async def main_async(options: argparse.Namespace) -> None:
    """Print the table, a row as soon as it is known."""
    store = Store(None if options.out is None else options.out / "results.jsonl")

    def watch(share: float, title: str, fresh: float) -> None:
        print(f"\r{title:<60}", end="", file=sys.stderr, flush=True)

    print(
        "| prompt / answer | instances | prefill at the balance | computed split | best simulated "
        "| predicted, requests/s | computed split's goodput | best goodput | loss, % |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    async with Workers(options.jobs, store, watch) as workers:
        for fleet in map(int, options.instances.split(",")):
            for prompt, answer in PAIRS:
                print(await row(Pair(prompt, answer, fleet), workers), flush=True)
    store.close()


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--instances", default="8,16", help="sizes of the fleet")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder of results, from which a stopped run goes on")
    asyncio.run(main_async(parser.parse_args()))


if __name__ == "__main__":
    main()

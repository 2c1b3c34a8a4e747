"""Does the computed split serve the most? Simulated goodput over all splits of 8 and of 16 instances.

Run: ``python benchmarks/ratio.py`` (about 10 minutes of CPU; with ``--out DIR`` a run that is stopped goes
on where it was). Every pair of lengths is Poisson traffic of one prompt length and one answer length on H100s
with Llama 3.1 8B, within ``SLO`` for 90 % of the requests; placement is ``minimal-load``. The computed split
and both beside it are searched. Any other split is tried at a rate just above the best of those, and searched
only if it attains the level there. Of the computed model nothing is fitted to these runs.

``--spread`` does the same for lengths of log-normal distributions. ``--mixed`` compares instead the computed
split with a fleet where all instances do both (``colocated``), as predicted and as simulated.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path

from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.experiments.jobs import Store, Workers
from tidegate.experiments.run import job_of, probe
from tidegate.experiments.search import SearchSettings, search_goodput
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.policies.dopd.plan import best_split
from tidegate.policies.dopd.ratio import Sizing
from tidegate.policies.dopd.service import ServingModel, Traffic
from tidegate.sim import SimSettings
from tidegate.workloads.choice import WorkloadChoice, requests_of

PROFILE = "h100_sxm/llama-3.1-8b"
SLO = Slo(1.0, 0.025)
LEVEL = 0.9
PAIRS = (
    ("512", "128"),
    ("1024", "64"),
    ("1024", "256"),
    ("1024", "512"),
    ("2048", "32"),
    ("2048", "256"),
    ("4096", "64"),
    ("4096", "256"),
    ("4096", "512"),
    ("8192", "64"),
    ("8192", "256"),
    ("16384", "128"),
)
"""Prompt and answer tokens."""
SPREAD = (
    ("lognormal:1024:1", "lognormal:128:1"),
    ("lognormal:1024:1", "lognormal:512:1"),
    ("lognormal:2048:2", "lognormal:128:1"),
    ("lognormal:4096:1", "lognormal:256:0.5"),
)
SAMPLED = 500
"""Requests of which the model knows the lengths, where they differ."""
TOLERANCE = 0.02
LIFETIMES, SHORTEST_S = 6.0, 20.0
"""A run lasts so many times as long as an answer, at least so long."""
FEWEST, MOST = 3_000, 12_000
"""Requests of a run."""


@dataclass(frozen=True)
class Pair:
    """Lengths on a fleet, with what the model says of them."""

    prompt: str
    answer: str
    instances: int

    @property
    def sizing(self) -> Sizing:
        """Return the model of the lengths that the simulation draws."""
        packaged = packaged_profile(PROFILE)
        model = ServingModel(packaged.profile, packaged.kv_capacity_tokens, packaged.kv_bytes_per_token)
        drawn = requests_of(self.workload(SAMPLED if ":" in self.prompt else 1))
        return Sizing(Traffic.of(1.0, drawn.input_tokens, drawn.output_tokens), model, SLO)

    def workload(self, requests: int) -> WorkloadChoice:
        """Return Poisson traffic of these lengths."""
        return WorkloadChoice(
            poisson=1.0, input_tokens=self.prompt, output_tokens=self.answer, limit=requests
        )

    def setting(self, predicted_rps: float, prefill: int) -> Setting:
        """Return the simulation of a split, of a length that the predicted goodput tells; 0 is all mixed."""
        lifetime_s = SLO.tpot_s * self.sizing.traffic.steps
        requests = int(predicted_rps * max(SHORTEST_S, LIFETIMES * lifetime_s))
        fleet = SimulatedFleet(((packaged_profile(PROFILE), self.instances),))
        workload, settings = self.workload(min(MOST, max(FEWEST, requests))), SimSettings(slo=SLO)
        if not prefill:
            return Setting(workload, fleet, "colocated", None, settings)
        return Setting(workload, fleet, "minimal-load", (prefill, self.instances - prefill), settings)


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
    computed = best_split(sizing, fleet, LEVEL, mixed=False).prefill
    predicted = {p: sizing.split_goodput_rps(p, fleet - p, LEVEL) for p in range(1, fleet)}
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


async def mixed_row(pair: Pair, workers: Workers) -> str:
    """Compare the computed split of one pair with a mixed fleet and return the table's line."""
    sizing, fleet = pair.sizing, pair.instances
    split = best_split(sizing, fleet, LEVEL, mixed=False)
    assert split.goodput_rps is not None
    both_rps = sizing.mixed_goodput_rps(fleet, LEVEL)
    searches = Searches(pair, split.goodput_rps, workers)
    apart = await searches.goodput_rps(split.prefill, split.goodput_rps)
    both = await searches.goodput_rps(0, both_rps)
    return (
        f"| {pair.prompt} / {pair.answer} | {fleet} | {split.prefill}:{split.decode} "
        f"| {split.goodput_rps:.1f} | {apart:.1f} | {both_rps:.1f} | {both:.1f} "
        f"| {both_rps / split.goodput_rps:.2f} | {both / apart:.2f} |"
    )


SPLIT_TITLES = (
    "prompt / answer",
    "instances",
    "prefill at the balance",
    "computed split",
    "best simulated",
    "predicted, requests/s",
    "computed split's goodput",
    "best goodput",
    "loss, %",
)
MIXED_TITLES = (
    "prompt / answer",
    "instances",
    "split",
    "split predicted, requests/s",
    "split simulated",
    "mixed predicted",
    "mixed simulated",
    "mixed of split, predicted",
    "mixed of split, simulated",
)


async def main_async(options: argparse.Namespace) -> None:
    """Print the table, a row as soon as it is known."""
    store = Store(None if options.out is None else options.out / "results.jsonl")

    def watch(share: float, title: str, fresh: float) -> None:
        print(f"\r{title:<60}", end="", file=sys.stderr, flush=True)

    titles, line = (MIXED_TITLES, mixed_row) if options.mixed else (SPLIT_TITLES, row)
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|", flush=True)
    async with Workers(options.jobs, store, watch) as workers:
        for fleet in map(int, options.instances.split(",")):
            for prompt, answer in SPREAD if options.spread else PAIRS:
                print(await line(Pair(prompt, answer, fleet), workers), flush=True)
    store.close()


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--instances", default="8,16", help="sizes of the fleet")
    parser.add_argument("--spread", action="store_true", help="lengths of distributions, not fixed ones")
    parser.add_argument(
        "--mixed", action="store_true", help="compare the computed split with mixed instances"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder of results, from which a stopped run goes on")
    asyncio.run(main_async(parser.parse_args()))


if __name__ == "__main__":
    main()

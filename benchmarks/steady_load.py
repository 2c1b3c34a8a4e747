"""Does a system hold still at constant load, and how soon is it back after a spike?

Run: ``python benchmarks/steady_load.py constant`` (six hours each, about fifteen minutes of CPU), ``waves``
(loads that come and go, about five) or ``spikes`` (about four). ``--systems`` takes what ``compare
--systems`` does. A row of ``constant`` or ``waves`` counts the flips of the first ten minutes, in which the
traffic becomes known, and those of each hour after them, in which at most one is wanted at constant load. A
row of ``spikes`` has the attainment of what arrives during a spike and in parts of the time after it; it
is back from when on as many attain, of all that arrive until the next spike, as in a run without spikes, less
one in a hundred.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.experiments.run import run_once
from tidegate.experiments.setting import Setting
from tidegate.experiments.suites.rows import WORLDS, Experiment
from tidegate.experiments.systems import contenders
from tidegate.measure.request_table import RequestTable
from tidegate.workloads.choice import WorkloadChoice

HOURS = 6.0
KNOWN_S = 600.0
"""By then the traffic is known."""
SMALL, LARGE = "h100_sxm/llama-3.1-8b", "h100_sxm/llama-3.1-70b/tp4"
EDGES_S = (0.0, 2.0, 5.0, 10.0)
"""Where the time after a spike is parted; within the last of them requests are to attain again."""
SPIKE_S, CYCLE_S, CYCLES = 5.0, 60.0, 6
WORSE = 0.01


@dataclass(frozen=True)
class Kind:
    """Lognormal lengths (mean and CV) under targets on a fleet."""

    prompt: str
    answer: str
    profile: str
    slo: Slo
    instances: int

    def setting(self, choice: WorkloadChoice, world: str) -> Setting:
        """Return the setting of the traffic without a system."""
        choice = replace(choice, input_tokens=self.prompt, output_tokens=self.answer)
        (found,) = (each for each in WORLDS if each.name == world)
        packaged = packaged_profile(self.profile)
        return Experiment("", choice, packaged, self.instances, self.slo, (), found).setting()


KINDS = {
    "long": Kind("lognormal:15000:0.8", "lognormal:150:1", SMALL, Slo(2.0, 0.05), 4),
    "long, 25 ms": Kind("lognormal:15000:0.8", "lognormal:150:1", SMALL, Slo(2.0, 0.025), 4),
    "chat, 70B": Kind("lognormal:1000:1", "lognormal:200:1", LARGE, Slo(1.0, 0.05), 4),
    "reading, 70B": Kind("lognormal:6000:0.7", "lognormal:60:0.7", LARGE, Slo(2.0, 0.05), 4),
}
CONSTANT = (
    ("long", "ideal", (3.0, 4.5, 5.5)),
    ("long, 25 ms", "ideal", (4.0,)),
    ("reading, 70B", "ideal", (4.0,)),
    ("long", "links", (4.5,)),
    ("chat, 70B", "ideal", (20.0,)),
)
WAVES = (("long", "ideal", ("5.5:3600,3:3600", "5:1800,2:1800,5.8:1800", "5.5:600,4:600")),)
"""Rates, each with its seconds, in turn."""
SPIKES = (("chat, 70B", (10.0, 20.0)), ("long", (2.0, 3.0)))
"""Rates between spikes, on twice the instances."""


def settings(system: str, setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Yield each candidate of a system with its name."""
    for contender in contenders([system], setting.fleet.size):
        for candidate in contender.candidates:
            name = contender.name if len(contender.candidates) == 1 else f"{system} {candidate.label}"
            yield name, candidate.applied(setting)


def by_the_hour(
    rows: Iterable[tuple[str, str, tuple[float | str, ...]]], systems: list[str], hours: float, only: str
) -> None:
    """Print a row per system, workload and load, which is a rate or rates that take turns."""
    heads = ("system", "workload", "world", "requests/s", "attainment", "flips at first", "then by the hour")
    print(f"| {' | '.join(heads)} |")
    print("|---" * 7 + "|", flush=True)
    for kind, world, loads in rows:
        for load in loads if only in kind else ():
            arrives = {"bursts": load} if isinstance(load, str) else {"poisson": load}
            choice = WorkloadChoice(**arrives, duration_s=hours * 3600.0)
            for system in systems:
                for name, setting in settings(system, KINDS[kind].setting(choice, world)):
                    run = run_once(setting).run
                    at_s = np.array([flip.at_s for flip in run.timeline.flips])
                    edges = [KNOWN_S, *np.arange(1.0, hours + 1.0) * 3600.0]
                    counts = np.histogram(at_s, edges)[0].tolist()
                    share = run.attained / len(run.requests)
                    early = int(np.count_nonzero(at_s < KNOWN_S))
                    row = f"{name} | {kind} | {world} | {load} | {share:.3f} | {early}"
                    print(f"| {row} | {' '.join(map(str, counts))} |", flush=True)


def by_time_after(requests: RequestTable, edges_s: tuple[float, ...]) -> list[float]:
    """Return which share attains of what arrives in each part of a cycle, from a spike's end on."""
    since_s = requests.arrival_s - (CYCLE_S - SPIKE_S)
    phase_s = since_s % CYCLE_S - SPIKE_S
    counts, _ = np.histogram(phase_s[since_s >= 0], edges_s)
    attained, _ = np.histogram(phase_s[(since_s >= 0) & requests.attained], edges_s)
    shares: list[float] = (attained / np.maximum(counts, 1)).tolist()
    return shares


def back_after_s(requests: RequestTable, calm: float) -> float:
    """Return the first whole second after a spike's end from which on the share ``calm`` attains."""
    calm_s = CYCLE_S - SPIKE_S
    for second in range(int(calm_s)):
        if by_time_after(requests, (float(second), calm_s))[0] >= calm:
            return float(second)
    return calm_s


def spikes(systems: list[str], factor: float, only: str) -> None:
    """Print a row per system, workload and rate."""
    parts = [f"{low:g}-{high:g} s" for low, high in pairwise((*EDGES_S, CYCLE_S - SPIKE_S))]
    heads = ["system", "workload", "requests/s", "without spikes", "spike", *parts, "back after", "flips"]
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|", flush=True)
    for kind, rates in SPIKES:
        base = replace(KINDS[kind], instances=2 * KINDS[kind].instances)
        for rate_rps in rates if only in kind else ():
            bursts = f"{rate_rps}:{CYCLE_S - SPIKE_S},{factor * rate_rps}:{SPIKE_S}"
            length_s = CYCLES * CYCLE_S + CYCLE_S - SPIKE_S
            for system in systems:
                calm = base.setting(WorkloadChoice(poisson=rate_rps, duration_s=length_s), "ideal")
                spiky = replace(calm, workload=replace(calm.workload, poisson=None, bursts=bursts))
                for (name, still), (_, setting) in zip(
                    settings(system, calm), settings(system, spiky), strict=True
                ):
                    without = run_once(still).run
                    run = run_once(setting).run
                    share = without.attained / len(without.requests)
                    edges = (-SPIKE_S, *EDGES_S, CYCLE_S - SPIKE_S)
                    shares = " | ".join(f"{each:.3f}" for each in by_time_after(run.requests, edges))
                    back_s = back_after_s(run.requests, share - WORSE)
                    row = f"{name} | {kind} | {rate_rps:g} | {share:.3f} | {shares} | {back_s:g} s"
                    print(f"| {row} | {run.flips} |", flush=True)


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("constant", "waves", "spikes"))
    parser.add_argument("--systems", default="tidegate", help="with commas, as compare takes them")
    parser.add_argument("--hours", type=float, default=HOURS)
    parser.add_argument("--factor", type=float, default=10.0, help="a spike's rate over that between them")
    parser.add_argument("--only", default="", help="workloads whose names hold this")
    options = parser.parse_args()
    systems = options.systems.split(",")
    if options.what == "spikes":
        spikes(systems, options.factor, options.only)
    else:
        by_the_hour(CONSTANT if options.what == "constant" else WAVES, systems, options.hours, options.only)


if __name__ == "__main__":
    main()

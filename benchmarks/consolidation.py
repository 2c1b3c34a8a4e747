"""What emptying decode instances under low load brings, in simulation, and what it costs.

Run: ``python benchmarks/consolidation.py --traces DIR`` (DIR has the public traces ``servegen_r1_*``; some
minutes on one core). Every 16th request of a trace, its time scaled to each of the mean rates: the day keeps
its shape. The fleet is that of ``benchmarks/ares.py``: 2P8D of RTX 4090 with Llama 3.1 8B.

An instance is empty while it is labelled for decodes and holds none, nor KV that waits for one: looked at
once a second. One that is drained as well gets nothing new and could be stopped or flipped. The constants of
the controller were chosen on ``servegen_r1_peak2h`` at 0.3 requests/s.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ares import PROFILE, SLO, mean, spread
from tidegate.core.decision import ControlDecision
from tidegate.core.instance import Role
from tidegate.costs.library import packaged_profile
from tidegate.experiments.setting import SimulatedFleet
from tidegate.ledger.snapshot import Snapshot
from tidegate.measure.attainment import score_table
from tidegate.policies.protocols import Signal
from tidegate.sim import SimSettings, simulate
from tidegate.systems import make_system
from tidegate.workloads.choice import WorkloadChoice, at_rate, requests_of

SPLIT = (2, 8)
EVERY = 16
SYSTEMS = "ares-slo,ares-slo+consolidate"


@dataclass
class Watch:
    """A controller that only counts seconds of instances labelled for decodes, and how many drains began."""

    decoding_s: float = 0.0
    empty_s: float = 0.0
    drained_s: float = 0.0
    drains: int = 0
    period_s: float = 1.0
    name: str = "watch"
    needs: frozenset[Signal] = frozenset()

    def initial(self) -> frozenset[str]:
        return frozenset()

    def decide(self, snapshot: Snapshot, drained: frozenset[str]) -> ControlDecision[frozenset[str]]:
        decoding = snapshot.labelled(Role.DECODE)
        empty = decoding & (snapshot.decode_requests == 0) & (snapshot.handoff_tokens == 0)
        self.decoding_s += decoding.sum()
        self.empty_s += empty.sum()
        self.drained_s += (empty & snapshot.draining).sum()
        drains = frozenset(snapshot.ids[at] for at in np.flatnonzero(snapshot.draining))
        self.drains += len(drains - drained)
        return ControlDecision(drains)


def run(name: str, trace: Path, rate_rps: float, seed: int, lengths: str) -> dict[str, float]:
    """Return what one simulation says."""
    requests = at_rate(requests_of(WorkloadChoice(trace=str(trace)))[::EVERY], rate_rps, seed)
    fleet = SimulatedFleet(((packaged_profile(PROFILE), sum(SPLIT)),))
    watch, system = Watch(), make_system(name, split=SPLIT, slo=SLO)
    system = replace(system, controllers=(*system.controllers, watch))
    done = simulate(requests, system, fleet.replicas(), SimSettings(slo=SLO, lengths=lengths))
    return {
        "attained": 100 * score_table(done.requests).share,
        "p99_ms": 1e3 * float(np.nanpercentile(done.requests.tpot_s, 99)),
        "empty": 100 * watch.empty_s / watch.decoding_s,
        "drained": 100 * watch.drained_s / watch.decoding_s,
        "drains": watch.drains,
        "migrations": done.migrations,
        "preemptions": done.preemptions,
    }


def main() -> None:
    """Read the options, run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder of the traces")
    parser.add_argument("--name", default="servegen_r1_day_thin16")
    parser.add_argument("--rates", default="1,2", help="mean requests/s")
    parser.add_argument("--systems", default=SYSTEMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lengths", default="hidden", help="who predicts lengths")
    options = parser.parse_args()
    trace = options.traces / f"{options.name}.csv.gz"
    print(
        "| mean requests/s | system | attained, % | P99 TPOT, ms | decode instances empty, % of their time "
        "| drained and empty, % | drains | migrations | preemptions |\n|---|---|---|---|---|---|---|---|---|"
    )
    for rate in map(float, options.rates.split(",")):
        for name in options.systems.split(","):
            runs = [run(name, trace, rate, seed, options.lengths) for seed in range(options.seeds)]
            told = {key: [each[key] for each in runs] for key in runs[0]}
            shares = [spread(told[key], "{:.1f}") for key in ("attained", "p99_ms", "empty", "drained")]
            counts = [f"{mean(told[key]):.0f}" for key in ("drains", "migrations", "preemptions")]
            print(f"| {rate:g} | {name} | {' | '.join(shares + counts)} |", flush=True)


if __name__ == "__main__":
    main()

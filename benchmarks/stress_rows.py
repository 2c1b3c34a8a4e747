"""What systems attain on rows of the suite ``stress`` at one rate.

Run: ``python benchmarks/stress_rows.py half-speed --rate 70`` (about a minute of CPU per system and draw).
``--systems`` takes what ``compare --systems`` does, with an order behind ``+``. A cell of the table has the
mean attainment of the draws, and behind it that of each draw with its flips.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from tidegate.experiments.run import run_once
from tidegate.experiments.suites.rows import Experiment
from tidegate.experiments.suites.stress import rows
from tidegate.experiments.systems import contenders


def row_named(name: str, world: str, seconds: float | None) -> Experiment:
    """Return the row ``name`` of the suite in ``world``, its traffic cut to ``seconds``."""
    (row,) = (each for each in rows(quick=True) if each.workload == name and each.world.name == world)
    return replace(row, choice=replace(row.choice, duration_s=seconds)) if seconds else row


def main() -> None:
    """Print one line per rate and system."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row")
    parser.add_argument("--rate", type=float, nargs="+", required=True, help="requests/s")
    parser.add_argument("--systems", default="tidegate,colocated:slack+feasible-sjf")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--world", default="ideal")
    parser.add_argument("--seconds", type=float, help="of traffic; by default the quick suite's")
    args = parser.parse_args()
    row = row_named(args.row, args.world, args.seconds)
    systems = [
        (each.name, candidate)
        for each in contenders(args.systems.split(","), row.instances)
        for candidate in each.candidates
    ]
    print("row | requests/s | system | attainment | by draw (flips)")
    for rate_rps in args.rate:
        for name, system in systems:
            setting = system.applied(row.setting())
            found = [run_once(setting, rate_rps=rate_rps, seed=seed).run for seed in range(args.seeds)]
            attained = [run.requests.attained.mean() for run in found]
            told = ", ".join(
                f"{share:.3f} ({len(run.timeline.flips)})" for share, run in zip(attained, found, strict=True)
            )
            mean = sum(attained) / len(attained)
            print(f"{args.row} | {rate_rps:g} | {name} | {mean:.3f} | {told}", flush=True)


if __name__ == "__main__":
    main()

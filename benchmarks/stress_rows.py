"""What systems attain on rows of the suites ``stress``, ``traces`` and ``papers`` at one rate.

Run: ``python benchmarks/stress_rows.py half-speed/8x --rate 70`` (a few seconds per system and draw). A row
is named by a part of its name, as for ``compare --only``; of several the first is taken. ``--systems`` takes
what ``compare --systems`` does. A line has the mean attainment of the draws, and behind it that of each draw
with its flips. ``--slowed i1:2`` has an instance take twice as long for every step, of which nobody is told.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from tidegate.experiments.run import run_once
from tidegate.experiments.suites import papers, stress, traces
from tidegate.experiments.suites.rows import Experiment, chosen
from tidegate.experiments.systems import contenders


def row_named(pattern: str, requests: int, slowed: str) -> Experiment:
    """Return the first row whose name matches, of ``traces`` with at most so many requests."""
    row = chosen([*stress.rows(quick=True), *traces.rows(None, requests), *papers.rows()], pattern)[0]
    pairs = [each.split(":") for each in slowed.split(",") if each]
    return replace(row, slowed={name: float(factor) for name, factor in pairs}) if pairs else row


def main() -> None:
    """Print one line per rate and system."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row")
    parser.add_argument("--rate", type=float, nargs="+", required=True, help="requests/s")
    parser.add_argument("--systems", default="tidegate,colocated:slack+feasible-sjf")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0, help="of the draws, to see others")
    parser.add_argument("--requests", type=int, default=2000, help="of rows of traces")
    parser.add_argument("--slowed", default="", metavar="NAME:FACTOR,..")
    args = parser.parse_args()
    row = row_named(args.row, args.requests, args.slowed)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    print("row | requests/s | system | attainment | by draw (flips)")
    for rate_rps in args.rate:
        for contender in contenders(args.systems.split(","), row.instances):
            for candidate in contender.candidates:
                setting = candidate.applied(row.setting())
                found = [run_once(setting, rate_rps=rate_rps, seed=seed).run for seed in seeds]
                shares = [run.attained / len(run.requests) for run in found]
                pairs = zip(shares, found, strict=True)
                told = ", ".join(f"{share:.3f} ({len(run.timeline.flips)})" for share, run in pairs)
                name = " ".join(filter(None, (contender.name, candidate.label)))
                mean = sum(shares) / len(shares)
                print(f"{row.workload} | {rate_rps:g} | {name} | {mean:.3f} | {told}", flush=True)


if __name__ == "__main__":
    main()

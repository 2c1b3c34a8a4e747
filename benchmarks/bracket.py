"""How far the two sides of what is possible are apart: the fluid limit, and what a search attains.

Run: ``python benchmarks/bracket.py TRACE[=SLO] ...`` for 8 instances at 90 %, a Markdown row per trace;
``--instances``, ``--level``, ``--profile`` and ``--simulations`` change that. Of the first draw; the search
begins at a quarter of the limit.
"""

from __future__ import annotations

import argparse
import time

from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.experiments.achievable import find_achievable, title_of
from tidegate.experiments.run import find_limit
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.sim import SimSettings
from tidegate.workloads.choice import WorkloadChoice

CHUNK_TOKENS = 8192
START = 0.25


def row(trace: str, slo: Slo, options: argparse.Namespace) -> str:
    """Return the table row of a trace."""
    fleet = SimulatedFleet(((packaged_profile(options.profile), options.instances),))
    setting = Setting(WorkloadChoice(trace=trace), fleet, "", settings=SimSettings(slo=slo))
    limit_rps = find_limit(setting, options.level, CHUNK_TOKENS, 0)["limit_rps"]
    began_s = time.process_time()
    found = find_achievable(
        setting,
        options.level,
        0,
        start_rps=START * limit_rps if limit_rps else None,
        simulations=options.simulations,
    )
    cpu_s = time.process_time() - began_s
    ratio = f"{limit_rps / found.rate_rps:.2f}" if limit_rps and found.rate_rps else "-"
    limit = "none" if limit_rps is None else f"{limit_rps:.1f}"
    given_up = f"{100 * found.given_up.mean():.1f} %"
    return (
        f"| `{trace}`, {slo} | {limit} | {found.rate_rps:.1f} | {ratio} | "
        f"{title_of(found.candidate)} | {given_up} | {found.simulations} ({cpu_s:.0f}) |"
    )


def main() -> None:
    """Print a row per trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("traces", nargs="+", metavar="TRACE[=SLO]")
    parser.add_argument("--profile", default="h100_sxm/llama-3.1-8b")
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--level", type=float, default=0.9)
    parser.add_argument("--simulations", type=int, default=60)
    options = parser.parse_args()
    print("| trace, SLO | limit | achieved | limit / achieved | by | given up | simulations (CPU s) |")
    print("|---|---|---|---|---|---|---|")
    for text in options.traces:
        trace, _, slo = text.partition("=")
        print(row(trace, Slo.parse(slo or "ttft:500,tpot:50"), options), flush=True)


if __name__ == "__main__":
    main()

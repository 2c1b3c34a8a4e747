"""How far the two sides of what is possible are apart: the fluid limit, and what a search attains.

Run: ``python benchmarks/bracket.py TRACE[=SLO] ...`` for 8 instances at 90 %, a Markdown row per trace, with
what one system reaches beside both; ``--instances``, ``--level``, ``--profile``, ``--simulations`` and
``--system`` change that. Of the first draw. The search begins at the system's goodput.
"""

from __future__ import annotations

import argparse
import asyncio
import time

from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.experiments.achievable import SIMULATIONS, find_achievable, title_of
from tidegate.experiments.jobs import Store, Workers
from tidegate.experiments.run import find_limit
from tidegate.experiments.search import find_goodput
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.experiments.systems import Candidate
from tidegate.sim import SimSettings
from tidegate.workloads.choice import WorkloadChoice

CHUNK_TOKENS = 8192


async def row(trace: str, slo: Slo, options: argparse.Namespace) -> str:
    """Return the table row of a trace."""
    fleet = SimulatedFleet(((packaged_profile(options.profile), options.instances),))
    setting = Setting(WorkloadChoice(trace=trace), fleet, "", settings=SimSettings(slo=slo))
    limit_rps = find_limit(setting, options.level, CHUNK_TOKENS, 0)["limit_rps"]
    began_s = time.process_time()
    system = Candidate(options.system)
    async with Workers(1, Store(None)) as workers:
        reached = await find_goodput(system.applied(setting), options.level, [0], 0.02, limit_rps, workers)
        found = await find_achievable(
            setting,
            options.level,
            0,
            workers,
            known={system: reached.goodput_rps},
            simulations=options.simulations,
        )
    cpu_s = time.process_time() - began_s
    ratio = f"{limit_rps / found.rate_rps:.2f}" if limit_rps and found.rate_rps else "-"
    share = f"{100 * reached.goodput_rps / found.rate_rps:.0f} %" if found.rate_rps else "-"
    limit = "none" if limit_rps is None else f"{limit_rps:.1f}"
    given_up = f"{100 * found.given_up.mean():.1f} %"
    return (
        f"| `{trace}`, {slo} | {limit} | {found.rate_rps:.1f} | {ratio} | "
        f"{reached.goodput_rps:.1f} | {share} | {title_of(found.candidate)} | "
        f"{given_up} | {found.simulations} ({cpu_s:.0f}) |"
    )


def main() -> None:
    """Print a row per trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("traces", nargs="+", metavar="TRACE[=SLO]")
    parser.add_argument("--profile", default="h100_sxm/llama-3.1-8b")
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--level", type=float, default=0.9)
    parser.add_argument("--system", default="tidegate")
    parser.add_argument("--simulations", type=int, default=SIMULATIONS)
    options = parser.parse_args()
    head = ["trace, SLO", "limit", "achieved", "limit / achieved", options.system, "of achieved", "by"]
    head += ["given up", "simulations (CPU s)"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for text in options.traces:
        trace, _, slo = text.partition("=")
        print(asyncio.run(row(trace, Slo.parse(slo or "ttft:500,tpot:50"), options)), flush=True)


if __name__ == "__main__":
    main()

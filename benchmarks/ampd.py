"""Where and in which order rounds are prefilled, in simulation: attainment of AMPD and of what it is compared
with, at the rates where always-remote and colocated serving break.

Run: ``python benchmarks/ampd.py --traces DIR --out DIR`` (DIR has the traces that CASES name; a run that is
stopped goes on where it was). docs/policies/ampd.md has the tables with their options.

A case is a workload on a number of GPUs. Sessions arrive as a Poisson process or in bursts; a turn waits for
the answer before it, and for its client's pause. The targets follow from one rule for all (``slo_of``), and
``--slo-scales`` sweeps them. First the session rate is searched up to which each of ``BASES`` attains 90 % on
the best of its deployments; then everybody runs at ``--factors`` times those rates, on the deployment where
it attains most with the first seed. Rates relate to one system, so a relative gain says by how much more of
the rounds are in time where that one breaks; it grows without bound where that serves nothing. Constants of
``ampd-cost`` were chosen on ``toolbench``, ``taubench``, ``agentic`` and ``mooncake``, with the first seed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tidegate.core.slo import Slo
from tidegate.costs.library import PackagedProfile, packaged_profile
from tidegate.dataplane.replica import EngineSettings
from tidegate.experiments.jobs import Store, Workers
from tidegate.experiments.run import job_of
from tidegate.experiments.search import SearchSettings, search_goodput
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.experiments.suites.papers import h20 as on_h20
from tidegate.experiments.suites.papers import round_targets
from tidegate.measure.percentiles import t_interval
from tidegate.sim import SimSettings, simulate
from tidegate.workloads.choice import WorkloadChoice, load_workload

TP4, TP8, SMALL = "h100_sxm/llama-3.1-70b/tp4", "h100_sxm/llama-3.1-70b/tp8", "h200_sxm/llama-3.1-8b"
FACTORS = "1,1.5,2"
"""Times the rate up to which a baseline attains ``LEVEL``."""
LEVEL = 0.9
TOLERANCE = 0.15
CHUNKS = (128, 512, 2048)
"""Token budgets of which a tuned colocated fleet takes the best."""
SPLIT = ("always-remote", "always-remote-return", "always-local", "ppd", "ampd", "ampd-cost")
ABLATION = ("always-remote-return", "ampd+fifo", "always-remote-return+reorder", "ampd")
BASES = ("always-remote-return", "colocated")
"""Whose breaking sets the rates: the first is how the paper describes Dynamo (section 4.2)."""
BURSTY_CV = 4.0


@dataclass(frozen=True)
class Deployment:
    """Instances in groups, prefill first; ``split`` None is colocated."""

    groups: tuple[tuple[str, int], ...]
    split: tuple[int, int] | None = None

    def fleet(self, chunk: int, *, h20: bool, cache: bool) -> SimulatedFleet:
        groups = tuple((profile_of(name, h20=h20), count) for name, count in self.groups)
        return SimulatedFleet(groups, EngineSettings(chunk, prefix_cache=cache))


def profile_of(name: str, *, h20: bool) -> PackagedProfile:
    """Return a packaged profile, or what the paper's GPU, an H20, would make of an H100's."""
    return on_h20(name) if h20 else packaged_profile(name)


@dataclass(frozen=True)
class Case:
    """A workload, and the deployments among which each kind of system takes its best."""

    name: str
    trace: str
    split: tuple[Deployment, ...]
    colocated: tuple[Deployment, ...]
    turn_gap_s: float | None = None
    scale_tokens: float = 1.0
    requests: int | None = None
    sessions: bool = True
    h20: bool = True

    def workload(self, traces: Path, process: str, rate: float, seed: int) -> WorkloadChoice:
        made = self.trace.startswith("like:")
        choice = WorkloadChoice(
            trace=f"{self.trace}:{seed}" if made else str(traces / self.trace),
            turn_gap_s=self.turn_gap_s,
            scale_tokens=self.scale_tokens,
            limit=self.requests,
            seed=seed,
        )
        if not self.sessions:
            return replace(choice, scale_rate=rate)
        if process == "bursty":
            return replace(choice, gamma=rate, cv=BURSTY_CV)
        return replace(choice, poisson=rate)


EIGHT = (Deployment(((TP4, 2),), (1, 1)),)
SIXTEEN = (Deployment(((TP4, 2), (TP8, 1)), (2, 1)), Deployment(((TP4, 4),), (2, 2)))
THIRTY_TWO = (Deployment(((TP8, 4),), (2, 2)), Deployment(((TP8, 4),), (1, 3)))
ONE_EACH = tuple(Deployment(((SMALL, 8),), (p, 8 - p)) for p in (2, 4))
PAIR = (Deployment(((SMALL, 2),), (1, 1)),)
CASES = (
    Case(
        *("taubench", "taubench_airline_rounds.csv.gz", EIGHT),
        (Deployment(((TP4, 2),)), Deployment(((TP8, 1),))),
        turn_gap_s=1.0,
        requests=1200,
    ),
    Case(
        *("agentic", "agentic_claude_code_sessions_a.csv.gz", PAIR, (Deployment(((SMALL, 2),)),)),
        scale_tokens=0.125,
        h20=False,
        requests=1500,
    ),
    Case(
        *("mooncake", "mooncake_fast25_conversation.csv.gz", ONE_EACH, (Deployment(((SMALL, 8),)),)),
        sessions=False,
        h20=False,
        requests=1200,
    ),
    Case(
        *("toolbench", "like:toolbench:400", EIGHT),
        (Deployment(((TP4, 2),)), Deployment(((TP8, 1),))),
    ),
    Case(
        *("hotpotqa", "like:hotpotqa:250", EIGHT),
        (Deployment(((TP4, 2),)), Deployment(((TP8, 1),))),
    ),
    Case(
        *("dureader", "like:dureader:250", SIXTEEN),
        (Deployment(((TP4, 4),)), Deployment(((TP8, 2),))),
    ),
    Case(
        *("gaia", "like:gaia:50", THIRTY_TWO),
        (Deployment(((TP4, 8),)), Deployment(((TP8, 4),))),
    ),
)


def slo_of(case: Case, traces: Path, scale: float) -> Slo:
    """Return the targets, by ``round_targets`` on the first group of the case's first deployment."""
    requests = load_workload(case.workload(traces, "poisson", 1.0, 0))
    return round_targets(requests, profile_of(case.split[0].groups[0][0], h20=case.h20), scale)


def rounds(setting: Setting, *, rate_rps: float | None = None, seed: int = 0) -> dict[str, Any]:
    """Run a setting; return what the tables show."""
    requests = load_workload(setting.workload)
    run = simulate(requests, setting.make_system(), setting.fleet.replicas(), setting.settings)
    table = run.requests
    ok, home = table.ok, table.prefill_on == table.decode_on
    return {
        "attainment": float(table.attained.mean()),
        "ttft_met": float(table.ttft_met.mean()),
        "tpot_met": float(table.tpot_met.mean()),
        "local": float(home[ok].mean()) if ok.any() else 0.0,
        "cached": float(table.cached_tokens.sum() / table.input_tokens.sum()),
        "ttft_p99_s": float(np.percentile(table.ttft_s[ok], 99)) if ok.any() else 0.0,
        "tpot_p99_s": float(np.nanpercentile(table.tpot_s[ok], 99)) if ok.any() else 0.0,
        "kv_gb": run.kv_transfer_bytes / 1e9,
        "preemptions": float(run.preemptions),
    }


Attained = dict[str, float]
"""What ``rounds`` found, averaged."""


@dataclass(frozen=True)
class Contender:
    """A system on one deployment, with one token budget."""

    system: str
    deployment: Deployment
    chunk: int = 8192

    def setting(self, case: Case, options: argparse.Namespace, rate: float, seed: int) -> Setting:
        return Setting(
            case.workload(options.traces, options.process, rate, seed),
            self.deployment.fleet(self.chunk, h20=case.h20, cache=self.system != "always-remote"),
            self.system,
            self.deployment.split,
            SimSettings(slo=options.slo, closed_loop=case.sessions, lengths=""),
        )

    @property
    def title(self) -> str:
        groups = " + ".join(f"{count} x {name.rpartition('/')[2]}" for name, count in self.deployment.groups)
        split = (
            ""
            if self.deployment.split is None
            else f", {self.deployment.split[0]}P{self.deployment.split[1]}D"
        )
        return f"{groups}{split}, {self.chunk}"


class Bench:
    """Runs and searches of one case, process and SLO."""

    def __init__(self, case: Case, options: argparse.Namespace, workers: Workers) -> None:
        self.case, self.options, self.workers = case, options, workers

    async def run(self, contender: Contender, rate: float, seed: int) -> dict[str, Any]:
        title = f"{self.case.name} {contender.system} at {rate:.2f}"
        setting = contender.setting(self.case, self.options, rate, seed)
        found: dict[str, Any] = await self.workers.do(job_of(rounds, setting, title, rate_rps=None, seed=0))
        return found

    async def holds(self, contender: Contender) -> float:
        """Return the rate up to which a contender attains ``LEVEL``: sessions per second."""

        async def attainment(rate: float, seed: int) -> float:
            return float((await self.run(contender, rate, seed))["attainment"])

        guess = SearchSettings(LEVEL, 0.5, 4.0, TOLERANCE)
        return (await search_goodput(guess, range(1), attainment)).goodput_rps

    async def best(self, contenders: Sequence[Contender]) -> tuple[Contender, float]:
        """Return who holds longest, and up to which rate."""
        rates = await asyncio.gather(*map(self.holds, contenders))
        return max(zip(contenders, rates, strict=True), key=lambda pair: pair[1])

    async def best_at(
        self, contenders: Sequence[Contender], rates: Sequence[float]
    ) -> tuple[Contender, list[Attained]]:
        """Return who attains most on average over the rates with the first seed, and its runs with all."""
        first = await asyncio.gather(*(self.at_rates(each, rates, 1) for each in contenders))
        means = [sum(run["attainment"] for run in runs) for runs in first]
        best = contenders[means.index(max(means))]
        return best, await self.at_rates(best, rates, self.options.seeds)

    async def at_rates(self, contender: Contender, rates: Sequence[float], seeds: int) -> list[Attained]:
        """Return the means over the seeds at each rate, with ``half``, half of attainment's interval."""
        found = await asyncio.gather(
            *(asyncio.gather(*(self.run(contender, rate, seed) for seed in range(seeds))) for rate in rates)
        )
        means = [{key: t_interval([run[key] for run in runs])[0] for key in runs[0]} for runs in found]
        for mean, runs in zip(means, found, strict=True):
            low, high = t_interval([run["attainment"] for run in runs])[1:]
            mean["half"] = (high - low) / 2
        return means


def split_of(case: Case, system: str) -> list[Contender]:
    """Return a system on each of the case's splits; AMPD, whose local prefills pause decodes, with a small
    token budget as well."""
    chunks = (512, 8192) if system == "ampd" else (8192,)
    return [Contender(system, each, chunk) for each in case.split for chunk in chunks]


async def compare(bench: Bench) -> list[str]:
    """Return a table: who attains how much at the rates where the two baselines break."""
    case, factors = bench.case, bench.options.factors
    tuned = [Contender("colocated-sticky", each, chunk) for each in case.colocated for chunk in CHUNKS]
    plain = [Contender("colocated", each) for each in case.colocated]
    among = {name: split_of(case, name) for name in SPLIT} | {"colocated": plain, "sticky, tuned": tuned}
    if bench.options.rows:
        among = {name: among[name] for name in bench.options.rows.split(";")}
    given = bench.options.rates
    held = [] if given else [(await bench.best(among[name]))[1] for name in BASES]
    rates = given or [factor * rate for rate in held for factor in factors]
    rows = {name: await bench.best_at(contenders, rates) for name, contenders in among.items()}
    titles = [f"{rate:.2f}" for rate in rates]
    lines = [
        f"Attained, %, by sessions/s: {', '.join(f'{factor:g}' for factor in factors)} times "
        + " and ".join(f"{rate:.2f} ({name})" for name, rate in zip(BASES, held, strict=True))
        if held
        else "Attained, %, by sessions/s",
        "",
        "| system | " + " | ".join(titles) + " | local, % | deployment |",
        "|---|" + "---|" * (len(rates) + 2),
    ]
    for name, (contender, runs) in rows.items():
        shares = " | ".join(map(share, runs))
        home = 100 * float(np.mean([run["local"] for run in runs]))
        lines.append(f"| {name} | {shares} | {home:.1f} | {contender.title} |")
    lines.append("")
    for at, base in enumerate((*BASES, "sticky, tuned")):
        if not {base, "ampd", "ampd-cost"} <= rows.keys():
            continue
        own = held and at < len(BASES)
        part = slice(at * len(factors), (at + 1) * len(factors)) if own else slice(None)
        its = rows[base][1][part]
        told = [
            f"{name} {spread(list(map(gain, rows[name][1][part], its)))}" for name in ("ampd", "ampd-cost")
        ]
        lines.append(f"Against {base}: {'; '.join(told)}.")
    return lines


def share(run: Attained) -> str:
    """Return attainment in percent, with half its interval where there are several seeds."""
    return f"{100 * run['attainment']:.1f}" + (f" ± {100 * run['half']:.1f}" if run["half"] else "")


def gain(mine: Attained, its: Attained) -> float:
    """Return by how much more is attained, in percent of the other; one that attains nothing counts 0.1 %."""
    return 100.0 * (mine["attainment"] / max(its["attainment"], 1e-3) - 1.0)


def spread(gains: Sequence[float]) -> str:
    """Return single gains and their mean."""
    return f"{', '.join(f'{each:+.0f}' for each in gains)} (mean {np.mean(gains):+.1f} %)"


async def ablate(bench: Bench) -> list[str]:
    """Return what routing and reordering bring each, in the paper's shape (section 4.9)."""
    case, factors = bench.case, bench.options.factors
    among = split_of(case, "always-remote-return")
    rates = bench.options.rates
    if rates:
        base = (await bench.best_at(among, rates))[0]
    else:
        base, rate = await bench.best(among)
        rates = [factor * rate for factor in factors]
    lines = [
        f"Rates: {', '.join(f'{each:.2f}' for each in rates)} sessions/s.",
        "",
        "| system | attained, % | local, % | more than without, % |",
        "|---|---|---|---|",
    ]
    first: list[Attained] = []
    for name in ABLATION:
        found = await bench.at_rates(replace(base, system=name), rates, bench.options.seeds)
        first = first or found
        more = [
            mine["attainment"] / max(its["attainment"], 1e-3) for mine, its in zip(found, first, strict=True)
        ]
        cells = (
            ", ".join(map(share, found)),
            ", ".join(f"{100 * run['local']:.1f}" for run in found),
            ", ".join(f"{100 * each - 100:+.1f}" for each in more),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


async def main_async(options: argparse.Namespace) -> None:
    """Print a table per case, process and scale of the targets."""
    store = Store(None if options.out is None else options.out / "results.jsonl")

    def watch(share: float, title: str, fresh: float) -> None:
        print(f"\r{title:<70}", end="", file=sys.stderr, flush=True)

    async with Workers(options.jobs, store, watch) as workers:
        for case in CASES:
            if case.name not in options.cases.split(","):
                continue
            for scale in map(float, options.slo_scales.split(",")):
                options.slo = slo_of(case, options.traces, scale)
                for process in options.processes.split(",") if case.sessions else ("trace",):
                    options.process = process
                    bench = Bench(case, options, workers)
                    lines = await (ablate(bench) if options.ablation else compare(bench))
                    title = f"{case.name}, {process} arrivals, {options.slo}, {options.seeds} seeds"
                    print(f"\r{'':72}\r\n{title}\n\n" + "\n".join(lines), flush=True)
    store.close()


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder of the traces")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--processes", default="poisson,bursty", help="of session arrivals")
    parser.add_argument("--slo-scales", default="1", help="factors on both targets")
    parser.add_argument("--factors", default=FACTORS, help="times the rates at which the baselines break")
    parser.add_argument("--rates", default="", help="instead: at these, in sessions/s")
    parser.add_argument("--rows", default="", help="only these rows, as in ampd;sticky, tuned")
    parser.add_argument("--ablation", action="store_true", help="instead: routing and reordering apart")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder of results, from which a stopped run goes on")
    options = parser.parse_args()
    options.factors = [float(factor) for factor in options.factors.split(",")]
    options.rates = [float(rate) for rate in options.rates.split(",") if rate]
    asyncio.run(main_async(options))


if __name__ == "__main__":
    main()

"""A day of production traffic, compressed, on emulated engines under a system that sizes its fleet: live and
simulated, side by side.

The day's arrivals are thinned at random, its times and lengths divided; engines keep their pace. ``tidegate
serve --emulate PROFILE:A..B`` serves it with ``tidegate bench`` as the client. The simulator gets the same
arrivals on the same fleet; its front-end time is the live run's median time of a prefill leg outside the
engine's own clock. Both journals are read by the same code.

*Lead time*: a rise is a time at which a pool needs one instance more than before, by the model of the ratio
and what really arrived in the three periods around it, for two periods at least. Its lead is how long before
it the pool had that many, as labelled and not draining; below 0 the pool was late.

Run: ``python benchmarks/live_day.py`` (20 minutes and a little; ``--minutes 5 --simulate`` tries settings).
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from msgspec import UNSET

from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.dataplane.replica import parse_groups, replicas_in
from tidegate.journal.reader import Journal, read_journal
from tidegate.journal.schema import FlipLine, InstanceLine
from tidegate.measure.instance_time import up_s
from tidegate.policies.dopd.plan import smallest_fleet
from tidegate.policies.dopd.ratio import Sizing
from tidegate.policies.dopd.service import ServingModel, Traffic
from tidegate.sim import SimSettings, simulate
from tidegate.systems import make_system
from tidegate.workloads.choice import WorkloadChoice, load_workload
from tidegate.workloads.trace import Workload
from tidegate.workloads.writers import write_trace

TIDEGATE = (sys.executable, "-m", "tidegate")
DAY_S = 86400.0
LABELS = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Day:
    """What one journal tells of the requests of the trace."""

    offered: int
    lost: int
    attained: float
    instance_hours: float
    adds: int
    drains: int
    flips: int
    most: int
    rises: int
    ahead: int
    lead_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    front_s: float

    def rows(self) -> dict[str, float]:
        return {
            "requests offered": self.offered,
            "requests lost": self.lost,
            "attainment %": 100 * self.attained,
            "instance-minutes": 60 * self.instance_hours,
            "most instances": self.most,
            "instances added": self.adds,
            "instances drained": self.drains,
            "flips": self.flips,
            "rises of a pool's need": self.rises,
            "of them met ahead": self.ahead,
            "median lead s": self.lead_s,
            "TTFT p50 ms": 1e3 * self.ttft_p50_s,
            "TTFT p99 ms": 1e3 * self.ttft_p99_s,
            "TPOT p50 ms": 1e3 * self.tpot_p50_s,
            "TPOT p99 ms": 1e3 * self.tpot_p99_s,
            "front ms": 1e3 * self.front_s,
        }


def workload_of(args: argparse.Namespace) -> Workload:
    """Return the compressed day."""
    day = load_workload(WorkloadChoice(trace=args.trace, scale_rate=DAY_S / (60.0 * args.minutes)))
    prompts, answers = (
        np.maximum(1, np.rint(tokens * factor)).astype(np.int64)
        for tokens, factor in zip((day.input_tokens, day.output_tokens), args.scale_tokens, strict=True)
    )
    day = replace(day, input_tokens=prompts, output_tokens=answers)
    keep = np.random.default_rng(args.seed).random(len(day)) < args.rate * 60.0 * args.minutes / len(day)
    return day[np.flatnonzero(keep)]


def live(args: argparse.Namespace, trace: Path) -> Path:
    """Serve the day, and return the journal."""
    journal: Path = args.out / "live.jsonl"
    for name in (journal, args.out / "live.bench.jsonl"):
        name.unlink(missing_ok=True)  # serve would go on with an earlier run's
    serve = [*TIDEGATE, "serve", "--emulate", args.emulate, "--system", args.system, "--slo", args.slo]
    serve += ["--port", "0", "--journal", str(journal), "--admission", "0", "--forecast", args.forecast]
    serve += ["--forecast-period", str(args.period), "--forecast-steps", str(args.steps)]
    serve += ["--start-delay", str(args.start_delay)]
    server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = next(filter(None, (re.search(r"serving on (http://\S+)/v1", line) for line in server.stdout)))
        bench = [*TIDEGATE, "bench", "--url", found[1], "--trace", str(trace), "--slo", args.slo, "--json"]
        bench += ["--out", str(args.out / "live.bench.jsonl")]
        report = json.loads(subprocess.run(bench, stdout=subprocess.PIPE, check=True).stdout)
        attained = 100 * report["attainment"]["share"]
        print(f"as the client saw it: {attained:.2f} % attained, outcomes {report['outcomes']}", flush=True)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    return journal


def simulated(args: argparse.Namespace, workload: Workload, front_s: float) -> Path:
    """Simulate the same arrivals, and return the journal."""
    slo, groups = Slo.parse(args.slo), parse_groups([args.emulate])
    least, most = groups[0].count, groups[0].count + groups[0].spares
    replicas = replicas_in(parse_groups([f"{groups[0].packaged.name}:{most}"]))
    delays_s = (args.start_delay, args.start_delay)
    system = make_system(args.system, slo=slo, fleet=(least, most), start_delay_s=delays_s)
    settings = SimSettings(
        slo=slo,
        front_s=front_s,
        spares=most - least,
        start_delay_s=args.start_delay,
        decode_start_delay_s=args.start_delay,
        forecast=args.forecast,
        forecast_period_s=args.period,
        forecast_steps=args.steps,
    )
    path: Path = args.out / "simulated.jsonl"
    with path.open("wb") as file:
        simulate(workload, system, replicas, settings, journal=file)
    return path


def day_of(path: Path, args: argparse.Namespace, workload: Workload) -> Day:
    """Read a journal."""
    journal = read_journal(path)
    # The client asks for a token first, to learn what answers.
    ends = sorted(journal.outcomes, key=lambda o: o.arrival_s)[-len(workload) :]
    first_s, end_s = ends[0].arrival_s - float(workload.arrival_s[0]), max(o.end_s for o in ends)
    good = [o for o in ends if o.ok]
    ttft, tpot = [o.ttft_s or 0.0 for o in good], [o.tpot_s for o in good if o.tpot_s is not None]
    changes = [change for change in counts(journal) if change[0] <= end_s]
    leads = list(leads_s(changes, needed(args, workload), args.period, first_s))
    starts = [e for e in journal.instance_events if e.start_s is not UNSET]
    drains = [e for e in journal.instance_events if e.event == "draining"]
    outside = [o.stages_s["other"] for o in good if "other" in o.stages_s]
    return Day(
        offered=len(workload),
        lost=len(workload) - len(good),
        attained=sum(bool(o.attained) for o in ends) / len(workload),
        instance_hours=up_s(journal.instance_events, end_s, first_s) / 3600.0,
        adds=len(starts),
        drains=len(drains),
        flips=len(journal.flips),
        most=max(sum(count) for _, count in changes),
        rises=len(leads),
        ahead=sum(lead >= 0 for lead in leads),
        lead_s=float(np.median(leads)) if leads else float("nan"),
        ttft_p50_s=float(np.percentile(ttft, 50)),
        ttft_p99_s=float(np.percentile(ttft, 99)),
        tpot_p50_s=float(np.percentile(tpot, 50)),
        tpot_p99_s=float(np.percentile(tpot, 99)),
        front_s=float(np.median(outside)) if outside else 0.0,
    )


def counts(journal: Journal) -> Iterator[tuple[float, tuple[int, int]]]:
    """Yield how many instances prefill and decode, with the time of each change."""
    roles: dict[str, str] = {}
    lines: list[InstanceLine | FlipLine] = [*journal.instance_events, *journal.flips]
    for line in sorted(lines, key=lambda line: line.t_s):
        if not isinstance(line, InstanceLine):
            if line.instance in roles:
                roles[line.instance] = line.to_role
        elif line.event == "up":
            roles[line.instance] = line.role
        elif line.event in ("down", "draining"):
            roles.pop(line.instance, None)
        labels = list(roles.values())
        yield line.t_s, (labels.count(LABELS[0]), labels.count(LABELS[1]))


def needed(args: argparse.Namespace, workload: Workload) -> list[tuple[int, int]]:
    """Return by period what the pools need for what arrives in it and beside it."""
    group = parse_groups([args.emulate])[0]
    packaged = group.packaged
    model = ServingModel(packaged.profile, packaged.kv_capacity_tokens, packaged.kv_bytes_per_token)
    slo = Slo.parse(args.slo)
    found = []
    for at in range(int(workload.arrival_s[-1] // args.period) + 1):
        around = (at - 1) * args.period, (at + 2) * args.period
        first, end = np.searchsorted(workload.arrival_s, around)
        if first == end:
            found.append((1, 1))
            continue
        lengths = workload.input_tokens[first:end], workload.output_tokens[first:end]
        span_s = around[1] - max(0.0, around[0])
        traffic = Traffic.of((end - first) / span_s, *lengths, args.gaps_scv)
        plan = smallest_fleet(
            Sizing(traffic, model, slo), 0.99, budget=group.count + group.spares, mixed=False
        )
        found.append((plan.prefill, plan.decode))
    return found


def leads_s(
    changes: Sequence[tuple[float, tuple[int, int]]],
    need: Sequence[tuple[int, int]],
    period_s: float,
    first_s: float,
) -> Iterator[float]:
    """Yield the lead of every rise (see above)."""
    for pool in (Role.PREFILL, Role.DECODE):
        wanted = [each[pool] for each in need]
        for at in range(1, len(wanted) - 1):
            for count in range(wanted[at - 1] + 1, min(wanted[at], wanted[at + 1]) + 1):
                at_s = first_s + at * period_s
                since_s = None
                for changed_s, have in changes:
                    if have[pool] < count:
                        if changed_s > at_s and since_s is not None and since_s <= at_s:
                            break
                        since_s = None
                    elif since_s is None:
                        since_s = changed_s
                        if changed_s > at_s:
                            break
                if since_s is not None:
                    yield at_s - since_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trace", default="../shared/traces/servegen_r1_day_thin16.csv.gz", help="a day of requests")
    add("--minutes", type=float, default=20.0, help="that the day takes")
    add("--rate", type=float, default=3.0, help="mean requests per second")
    add("--scale-tokens", type=float, nargs=2, default=(1.0, 0.25), help="prompts and answers by so much")
    add("--emulate", default="a100_sxm/llama-3.1-70b/tp4:2..5")
    add("--system", default="dopd")
    add("--slo", default="ttft:5000,tpot:45")
    add("--start-delay", type=float, default=5.0)
    add("--forecast", default="ewma")
    add("--period", type=float, default=10.0)
    add("--steps", type=int, default=6)
    add("--gaps-scv", type=float, default=2.0, help="of the need that leads are counted from")
    add("--seed", type=int, default=0)
    add("--simulate", action="store_true", help="only simulate, without a front-end time")
    add("--out", type=Path, default=Path("runs/live-day"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    workload = workload_of(args)
    days = {}
    if not args.simulate:
        trace = args.out / "day.csv"
        write_trace(trace, workload, force=True)
        days["live"] = day_of(live(args, trace), args, workload)
    front_s = days["live"].front_s if days else 0.0
    days["simulated"] = day_of(simulated(args, workload, front_s), args, workload)
    print(f"{'':24}" + "".join(f"{name:>12}" for name in days))
    for name in days["simulated"].rows():
        print(f"{name:24}" + "".join(f"{day.rows()[name]:12.2f}" for day in days.values()))
    if not args.simulate:
        one, other = days["live"], days["simulated"]
        print(
            f"simulated over live: attainment {other.attained / one.attained - 1:+.2%}, instance-hours "
            f"{other.instance_hours / one.instance_hours - 1:+.2%}"
        )


if __name__ == "__main__":
    main()

"""The live gateway over emulated instances beside the simulator, on the same requests.

For each system: start ``tidegate serve --emulate``, replay a stretch of the sample trace with ``tidegate
bench``, read the journal, and simulate the same requests on the same fleet: at the times of the trace, and at
those when they came to the gateway, for one client sends a burst one by one. The simulator's front-end time
is what the live run shows: the median time of a prefill leg outside the engine's own clock, which is two
trips over HTTP and the gateway's work. Its 99th percentile tells whether the machine kept up. Run:
``python benchmarks/live_vs_sim.py`` (about twelve minutes).
``--row stress/spikes --rate 8 --duration 60`` takes workload, fleet and targets of a row of a suite.
``--slower 4`` has engines take four times as long for everything, and stretches arrivals and targets alike,
for a machine that does not keep up with the real pace; what follows clocks of its own, as the periods of
controllers, is not stretched, in neither world.
``--draws 8`` simulates the arrivals as they came eight times more, each moved by chance (``JITTER_S``):
between the least and the most of these, worlds that are the same differ. ``--journal`` takes a live run that
was recorded earlier in the place of a new one.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tidegate import __version__
from tidegate.core.notation import parse_split
from tidegate.core.slo import Slo
from tidegate.costs.forms import TransferCost
from tidegate.costs.saved_profile import SavedProfile, save_profile
from tidegate.dataplane.replica import parse_groups, replicas_in
from tidegate.experiments.suites.catalogue import suite_rows
from tidegate.journal.reader import read_journal
from tidegate.sim import SimSettings, simulate
from tidegate.systems import make_system
from tidegate.workloads.choice import WorkloadChoice, draw_at_rate, load_workload
from tidegate.workloads.trace import Workload
from tidegate.workloads.transform import window
from tidegate.workloads.writers import write_trace

TIDEGATE = (sys.executable, "-m", "tidegate")
FIXED = ("static", "minimal-load", "round-robin")
"""Systems whose split stays what ``--split`` says."""
JITTER_S = 0.005
"""Deviation of what a draw moves arrivals by: what passes in front of engines when a machine keeps up."""
FIGURES = ("ttft p50", "ttft p99", "tpot p50", "tpot p99", "attainment", "flips")


@dataclass(frozen=True, slots=True)
class Run:
    """What both worlds tell of a run. The live run's only: when requests came, in order, and what passes in
    front of engines, p50 and p99."""

    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]
    attained: float
    flips: int
    arrival_s: NDArray[np.float64] | None = None
    front_s: tuple[float, float] = (0.0, 0.0)

    def figures(self) -> tuple[float, ...]:
        ttft, tpot = (np.nanpercentile(values, (50, 99)) * 1e3 for values in (self.ttft_s, self.tpot_s))
        return (*map(float, ttft), *map(float, tpot), self.attained, float(self.flips))


def live(system: str, args: argparse.Namespace) -> Run:
    """Serve and replay once."""
    journal, results = args.out / f"{system}.jsonl", args.out / f"{system}.bench.jsonl"
    for earlier in (journal, results):
        earlier.unlink(missing_ok=True)
    serve = [*TIDEGATE, "serve", "--emulate", args.emulate, "--system", system, "--slo", args.slo]
    serve += ["--port", "0", "--journal", str(journal), "--admission", "0"]
    if split := split_of(system, args):
        serve += ["--split", split]
    server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = next(filter(None, (re.search(r"serving on (http://\S+)/v1", line) for line in server.stdout)))
        bench = [*TIDEGATE, "bench", "--url", found[1], "--trace", args.trace, "--slo", args.slo]
        bench += ["--scale-rate", str(args.scale_rate), "--duration", str(args.duration)]
        bench += ["--start", str(args.start), "--out", str(results), "--json"]
        report = json.loads(subprocess.run(bench, stdout=subprocess.PIPE, check=True).stdout)
        ttft = [report["ttft_s"][name] * 1e3 for name in ("p50", "p99")]
        print(f"{system}: TTFT as the client saw it: p50 {ttft[0]:.1f} ms, p99 {ttft[1]:.1f} ms")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    return of_journal(journal)


def of_journal(path: Path) -> Run:
    """Read a live run's figures from its journal."""
    journal = read_journal(path)
    # The client asks for a token first, to learn what answers.
    every = sorted(journal.outcomes, key=lambda end: end.arrival_s)[1:]
    ends = [end for end in every if end.ok]
    outside = [end.stages_s["other"] for end in ends]
    return Run(
        np.array([end.ttft_s for end in ends], dtype=np.float64),
        np.array([end.tpot_s for end in ends if end.output_tokens > 1], dtype=np.float64),
        sum(bool(end.attained) for end in ends) / len(every),
        len(journal.flips),
        np.array([end.arrival_s - every[0].arrival_s for end in every]),
        (float(np.median(outside)), float(np.percentile(outside, 99))),
    )


def simulated(system: str, args: argparse.Namespace, reality: Run, *, as_it_came: bool, draw: int = 0) -> Run:
    """Simulate the same requests, at the times of the trace or at those when they came to the gateway; every
    draw but 0 moves them by chance."""
    slo, front_s = Slo.parse(args.slo), reality.front_s[0]
    split = split_of(system, args)
    requests = load(args)
    if as_it_came and reality.arrival_s is not None:
        requests = replace(requests, arrival_s=reality.arrival_s)
    if draw:
        moved = np.random.default_rng(draw).normal(0.0, JITTER_S, len(requests))
        requests = replace(requests, arrival_s=np.maximum(0.0, requests.arrival_s + moved))
        requests = requests[requests.arrival_s.argsort(kind="stable")]
    run = simulate(
        requests,
        make_system(system, split=parse_split(split) if split else None, slo=slo),
        replicas_in(parse_groups([args.emulate])),
        SimSettings(slo=slo, front_s=front_s),
    )
    table = run.requests
    return Run(table.ttft_s, table.tpot_s, float(np.mean(table.attained)), run.flips)


def split_of(system: str, args: argparse.Namespace) -> str:
    """Return the split that a system is given: the systems with fixed labels only."""
    return args.split if system in FIXED else ""


def take_row(args: argparse.Namespace) -> None:
    """Put a suite's row into the options, its requests in a file for both worlds."""
    suite, _, name = args.row.partition("/")
    row, *others = suite_rows(suite, only=name)
    if others and row.workload != name:
        raise SystemExit(f"--row {args.row} is several: {', '.join(each.name for each in (row, *others))}")
    if row.slowed or row.deaths or row.link_share != 1.0 or row.world.host_s:
        raise SystemExit(f"{row.name}: an emulation has neither slow nor dying instances, nor other links")
    file = args.out / f"{row.workload}.jsonl"
    requests = window(draw_at_rate(row.choice, args.rate, 0), args.start, args.duration)
    write_trace(file, replace(requests, arrival_s=requests.arrival_s - requests.arrival_s[0]), force=True)
    args.trace, args.scale_rate, args.start = str(file), 1.0, 0.0
    args.emulate, args.slo = f"{row.profile.name}:{row.instances}", args.slo or str(row.slo)
    print(f"{row.name}: {len(requests)} requests in {args.duration:g} s, {args.slo}", flush=True)


def slow_down(args: argparse.Namespace) -> None:
    """Stretch the times of engines, arrivals and targets, for both worlds."""
    factor, slo = args.slower, Slo.parse(args.slo)
    (group,) = parse_groups([args.emulate])
    packaged, link = group.packaged, group.packaged.profile.transfer
    saved = SavedProfile(
        profile=replace(
            packaged.profile.scaled(factor, factor),
            transfer=TransferCost(link.latency_s * factor, link.bytes_per_s / factor),
        ),
        created=datetime.now(UTC).isoformat(),
        tidegate=__version__,
        url="",
        model=packaged.model,
        engine="",
        hardware="",
        max_model_len=0,
        block_tokens=0,
        kv_capacity_tokens=packaged.kv_capacity_tokens,
        kv_bytes_per_token=packaged.kv_bytes_per_token,
        max_batch_tokens=None,
        held_out=(),
        notes=(f"{packaged.name}, {factor:g} times slower",),
        samples={},
    )
    save_profile(file := args.out / "slower.json", saved)
    args.emulate = f"{file}:{group.count}"
    args.slo = f"ttft:{1e3 * factor * slo.ttft_s:g},tpot:{1e3 * factor * slo.tpot_s:g}"
    args.scale_rate, args.start = args.scale_rate / factor, args.start * factor
    args.duration *= factor


def load(args: argparse.Namespace) -> Workload:
    """Return the requests that both worlds serve."""
    choice = WorkloadChoice(
        trace=args.trace, scale_rate=args.scale_rate, start_s=args.start, duration_s=args.duration
    )
    return load_workload(choice)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--emulate", default="h100_sxm/llama-3.1-8b:4")
    parser.add_argument("--systems", default="arrow-lending,static")
    parser.add_argument("--split", default="2:2", help="of static, minimal-load and round-robin")
    parser.add_argument("--row", default="", help="instead of trace, fleet and targets: SUITE/WORKLOAD")
    parser.add_argument("--rate", type=float, help="of a row: requests/s, by default its own")
    parser.add_argument("--trace", default="sample:azure-conv")
    parser.add_argument("--scale-rate", type=float, default=3.0)
    parser.add_argument("--start", type=float, default=0.0)
    parser.add_argument("--duration", type=float, default=150.0)
    parser.add_argument("--slo", default="", help="by default ttft:150,tpot:8, or a row's own")
    parser.add_argument("--slower", type=float, default=1.0, help="stretch all times by so much")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--draws", type=int, default=0, help="of arrivals that chance moves, simulated")
    parser.add_argument("--journal", type=Path, help="of a live run with the same options, instead of one")
    parser.add_argument("--out", type=Path, default=Path("runs/live-vs-sim"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.row:
        take_row(args)
    args.slo = args.slo or "ttft:150,tpot:8"
    if args.slower != 1.0:
        slow_down(args)
    print(f"{'':28}" + "".join(f"{name:>12}" for name in FIGURES) + f"{'front p50':>12}{'front p99':>12}")
    for system in args.systems.split(","):
        for _ in range(args.repeats):
            reality = of_journal(args.journal) if args.journal else live(system, args)
            show(f"{system} live", reality.figures(), reality.front_s)
            for as_it_came in (False, True):
                model = simulated(system, args, reality, as_it_came=as_it_came)
                pairs = list(zip(reality.figures(), model.figures(), strict=True))
                show("  simulated" + ", as it came" * as_it_came, model.figures(), reality.front_s[:1])
                show("  live over that", [one / other if other else float(one == 0) for one, other in pairs])
            drawn = [
                simulated(system, args, reality, as_it_came=True, draw=draw).figures()
                for draw in range(1, args.draws + 1)
            ]
            if drawn:
                show(f"  least of {args.draws} draws", [min(column) for column in zip(*drawn, strict=True)])
                show("  most of them", [max(column) for column in zip(*drawn, strict=True)])


def show(name: str, values: Sequence[float], front_s: tuple[float, ...] = ()) -> None:
    shown = [*values, *(seconds * 1e3 for seconds in front_s)]
    print(f"{name:28}" + "".join(f"{value:12.3f}" for value in shown), flush=True)


if __name__ == "__main__":
    main()

"""What the simulator does per CPU second, everything included, on chat traffic near goodput.

Run: ``python benchmarks/simulator.py`` for 2P2D, 16P16D and 250P250D; ``--curve`` for requests by instances;
``--day FILE`` for that trace as it is on 4P12D. Every figure is taken in a process of its own, so that the
peak memory is that run's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from dataclasses import dataclass, replace
from itertools import islice

from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.dataplane.replica import replicas_of
from tidegate.sim import SimSettings, simulate
from tidegate.systems import make_system
from tidegate.workloads.generate import Poisson, arrival_times_s, resample
from tidegate.workloads.readers import read_trace
from tidegate.workloads.trace import Workload

SLO = Slo(0.5, 0.05)
PROFILE = "h100_sxm/llama-3.1-8b"
SAMPLE = "sample:azure-conv"
PER_INSTANCE_RPS = 17.5
"""Near goodput of 2P2D on the lengths of Azure's conversations of 2023."""
LEAST_PER_INSTANCE = 100
"""Requests per instance, so that a large fleet fills up, too."""


@dataclass(frozen=True)
class Case:
    """``prefill`` and ``decode`` instances, and the trace: a file as it is, or lengths of the sample."""

    prefill: int
    decode: int
    requests: int
    system: str = "arrow-lending"
    leap: bool = True
    trace: str = ""
    lengths: str = SAMPLE
    rps: float = PER_INSTANCE_RPS

    def workload(self) -> Workload:
        if self.trace:
            return read_trace(self.trace)
        rate_rps = self.rps * (self.prefill + self.decode)
        requests = max(self.requests, LEAST_PER_INSTANCE * (self.prefill + self.decode))
        times_s = islice(arrival_times_s(Poisson(rate_rps), seed=1), requests)
        return resample(times_s, read_trace(self.lengths), seed=1)


def measure(case: Case) -> str:
    """Simulate once and return a line of figures."""
    instances = case.prefill + case.decode
    fleet = replicas_of(packaged_profile(PROFILE), instances)
    system = make_system(case.system, slo=SLO, split=(case.prefill, case.decode))
    workload = case.workload()
    start_s = time.process_time()
    run = simulate(workload, system, fleet, SimSettings(slo=SLO, leap=case.leap))
    cpu_s = time.process_time() - start_s
    count = len(run.requests)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"{case.system:7} {f'{case.prefill}P{case.decode}D':9} {count:8d} requests  "
        f"{'leap' if case.leap else 'step'}  {cpu_s:7.2f} CPU-s  {count / cpu_s:7.0f} requests/CPU-s  "
        f"{peak_mb:5.0f} MB  {run.events / count:5.1f} events each  attained {run.attained / count:.3f}"
    )


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000, help="requests per case")
    parser.add_argument("--system", default="arrow-lending", help="system to simulate")
    parser.add_argument("--step", action="store_true", help="every step an event")
    parser.add_argument("--curve", action="store_true", help="10^4 to 10^6 requests, 8 to 1,000 instances")
    parser.add_argument("--day", metavar="FILE", help="a trace to serve as it is on 4P12D")
    parser.add_argument("--lengths", metavar="TRACE", default=SAMPLE, help="where lengths are drawn from")
    parser.add_argument(
        "--rps", type=float, default=PER_INSTANCE_RPS, help="requests per second and instance"
    )
    options = parser.parse_args()
    if options.day:
        cases = [Case(4, 12, 0, options.system, trace=options.day)]
    elif options.curve:
        cases = [Case(4, 4, count, options.system) for count in (10_000, 100_000, 1_000_000)]
        cases += [Case(half, half, 10_000, options.system) for half in (16, 50, 250, 500)]
    else:
        sizes = ((2, 2), (16, 16), (250, 250))
        cases = [Case(p, d, options.requests, options.system, not options.step) for p, d in sizes]
    cases = [replace(case, lengths=options.lengths, rps=options.rps) for case in cases]
    print(f"{options.rps:g} requests/s per instance, lengths of {options.lengths}")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for line in pool.imap(measure, cases, chunksize=1):
            print(line, flush=True)


if __name__ == "__main__":
    main()

"""What the simulator does per CPU second, on lengths drawn from the packaged chat trace.

Run: ``python benchmarks/simulator.py`` (about half a minute).
"""

from __future__ import annotations

import argparse
import time
from itertools import islice

from tidegate.core.slo import Slo
from tidegate.sim import Replica, SimSettings, simulate
from tidegate.systems import make_system
from tidegate.testing import REFERENCE, instance
from tidegate.workloads import Poisson, read_trace, resample

SLO = Slo(0.5, 0.05)


def row(system: str, instances: int, per_instance_rps: float, requests: int, *, leap: bool) -> str:
    """Simulate once and return a line of figures."""
    lengths = list(read_trace("sample:azure-conv"))
    trace = list(islice(resample(Poisson(per_instance_rps * instances), lengths, seed=1), requests))
    half = instances // 2
    fleet = [Replica(instance(f"i{i}"), REFERENCE) for i in range(instances)]
    made = make_system(system, slo=SLO, split=(half, instances - half))
    start_s = time.process_time()
    run = simulate(trace, made, fleet, SimSettings(slo=SLO, leap=leap))
    cpu_s = time.process_time() - start_s
    steps = sum(use.steps for use in run.instances)
    return (
        f"{system:8} {half}P{instances - half}D {per_instance_rps * instances:6.0f} req/s  "
        f"{'leap' if leap else 'step'}  {requests / cpu_s:7.0f} requests/CPU-s  "
        f"{steps / requests:6.1f} steps and {run.events / requests:5.1f} events per request  "
        f"attained {run.attained / requests:.3f}"
    )


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    requests = parser.parse_args().requests
    for system in ("static", "arrow"):
        for instances in (4, 32):
            for per_instance_rps in (2.0, 13.0):
                for leap in (True, False):
                    print(row(system, instances, per_instance_rps, requests, leap=leap), flush=True)


if __name__ == "__main__":
    main()

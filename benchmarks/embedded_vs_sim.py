"""Hold the simulator against a live engine: ``embedded_vs_sim.py --url URL --profile FILE.json``.

The engine at URL, otherwise idle, answers Poisson requests; the same arrivals and lengths are then served by
one simulated instance of the profile that ``tidegate profile --url URL --out FILE.json`` measured. Prints p50
and p99 of TTFT, TPOT and E2E of both. What is not modelled and so shows: the load client and the engine share
the machine's cores, tokens wait for the event loop that delivers them, and garbage is collected.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tidegate.bench import BenchSettings, bench
from tidegate.cli.instance_keys import shared_key
from tidegate.costs.named_profile import load_profile
from tidegate.costs.saved_profile import read_profile
from tidegate.dataplane.replica import EngineSettings, replicas_of
from tidegate.measure.results import RequestResult, read_results
from tidegate.sim import SimSettings, simulate
from tidegate.systems import make_system
from tidegate.workloads.choice import WorkloadChoice, load_workload


def percentiles(values: NDArray[np.float64]) -> list[float]:
    """Return p50 and p99 of what is a number."""
    return [float(np.nanpercentile(values, q)) for q in (50, 99)]


def column(results: list[RequestResult], name: str) -> NDArray[np.float64]:
    """Return one column of the answered requests; NaN where there is none."""
    return np.array([getattr(r, name) or np.nan for r in results if r.status == "ok"], dtype=np.float64)


def main() -> None:
    """Run the load, then the simulation, and print both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--rps", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    args = parser.parse_args()
    saved = read_profile(args.profile)
    choice = WorkloadChoice(
        poisson=args.rps,
        duration_s=args.seconds,
        input_tokens="lognormal:256:0.5",
        output_tokens="lognormal:64:0.5",
    )
    records = load_workload(choice)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.jsonl"
        known = shared_key([args.url])  # of a gateway on this machine, for its engines
        bench(BenchSettings(args.url, api_key=known.api_key if known else ""), records, out=out)
        results = read_results(out).results
    engine = EngineSettings(
        max_batch_tokens=saved.max_batch_tokens or saved.max_model_len, max_num_seqs=args.max_num_seqs
    )
    fleet = replicas_of(load_profile(str(args.profile)), 1, engine=engine)
    table = simulate(
        records, make_system("colocated"), fleet, SimSettings(front_s=saved.profile.front_s)
    ).requests
    print(f"{len(records)} requests\n{'':>6}{'':>5}{'measured':>12}{'simulated':>12}{'off':>9}")
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        pairs = zip(percentiles(column(results, name)), percentiles(getattr(table, name)), strict=True)
        for q, (real, mine) in zip(("p50", "p99"), pairs, strict=True):
            print(f"{name[:-2]:>6}{q:>5}{1e3 * real:>10.2f}ms{1e3 * mine:>10.2f}ms{mine / real - 1:>+9.1%}")


if __name__ == "__main__":
    main()

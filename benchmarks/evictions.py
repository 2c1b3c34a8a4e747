"""Which KV to forget first: by when it was used last, or by what it is worth (``policies/eviction.py``).

Simulates a workload on two instances whose caches hold ``--holds`` times the median of what its live
sessions have said, once with either rule. ``hits`` is the share of prompt tokens that were found in caches,
``saved`` that of the prefill seconds, ``ttft_s`` the mean, ``met`` the share of requests within the targets.
Run: ``python benchmarks/evictions.py --traces DIR``. The rule was chosen on ``toolbench``, ``taubench``,
``agentic``, ``hotpotqa`` and ``tool+code``, by replays of one cache; the others were not looked at for it.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import orjson

from tidegate.core.slo import Slo
from tidegate.costs.forms import attention_work
from tidegate.costs.library import packaged_profile
from tidegate.dataplane.replica import EngineSettings
from tidegate.experiments.setting import SimulatedFleet
from tidegate.sim import SimSettings, simulate
from tidegate.systems import make_system
from tidegate.workloads.choice import WorkloadChoice, load_workload
from tidegate.workloads.trace import TraceRecord

PROFILE = "h200_sxm/llama-3.1-8b"
CASES = {
    "toolbench": (("like:toolbench", 4.0),),
    "taubench": (("taubench_airline_rounds.csv.gz", 0.5),),
    "agentic": (("agentic_claude_code_sessions_a.csv.gz", 0.4),),
    "hotpotqa": (("like:hotpotqa", 2.0),),
    "tool+code": (("like:toolbench", 4.0), ("like:code", 4.0)),
    "dureader": (("like:dureader", 2.0),),
    "gaia": (("like:gaia", 0.5),),
    "gaia+code": (("like:gaia", 0.5), ("like:code", 4.0)),
}


def workload_of(case: str, traces: Path, requests: int, seed: int) -> list[TraceRecord]:
    """Return the parts of a case together, each with a tenant of its own."""
    rows: list[TraceRecord] = []
    for number, (name, rate) in enumerate(CASES[case]):
        made = name.startswith("like:")
        choice = WorkloadChoice(
            trace=f"{name}:{requests}:{seed}" if made else str(traces / name),
            poisson=rate,
            limit=requests,
            seed=seed,
            scale_tokens=0.125 if case == "agentic" else 1.0,
            turn_gap_s=1.0 if case == "taubench" else None,
        )
        for row in load_workload(choice):
            ids = tuple(each * len(CASES[case]) + number for each in row.hash_ids)
            session = row.session_id and f"{number}-{row.session_id}"
            rows.append(row._replace(hash_ids=ids, session_id=session, client_id=f"t{number}"))
    return sorted(rows, key=lambda row: row.arrival_s)


def median_tokens(rows: list[TraceRecord]) -> int:
    """Return the median over time of the tokens of sessions that have begun and not ended."""
    spans: dict[str, list[float]] = {}
    for number, row in enumerate(rows):
        span = spans.setdefault(row.session_id or str(number), [row.arrival_s, 0.0, 0.0])
        span[1] = row.arrival_s
        span[2] = max(span[2], row.input_tokens + row.output_tokens)
    moves = sorted([(a, n) for a, _, n in spans.values()] + [(b, -n) for _, b, n in spans.values()])
    return int(np.median(np.cumsum([n for _, n in moves])))


def play(rows: list[TraceRecord], system: str, kv_tokens: int, *, by_worth: bool) -> str:
    """Return a row of figures."""
    engine = EngineSettings(evicts_by_worth=by_worth)
    profile = packaged_profile(PROFILE)
    fleet = SimulatedFleet(((profile, 2),), engine, kv_tokens)
    lines = io.BytesIO()
    settings = SimSettings(slo=Slo(2.0, 0.1))
    run = simulate(rows, make_system(system), fleet.replicas(), settings, journal=lines)
    prefill = profile.profile.prefill
    asked = found = spent_s = saved_s = 0.0
    for line in lines.getvalue().splitlines():
        row = orjson.loads(line)
        if row["type"] == "outcome" and row["outcome"] == "ok":
            prompt, cached = row["input_length"], row.get("cached_tokens", 0)
            asked, found = asked + prompt, found + cached
            whole = float(prefill.seconds(prompt, attention_work(prompt, 0)))
            rest = float(prefill.seconds(prompt - cached, attention_work(prompt - cached, cached)))
            spent_s, saved_s = spent_s + whole, saved_s + whole - rest
    table = run.requests
    ttft_s = float(np.nanmean(table.ttft_s))
    return f"{found / asked:7.1%} {saved_s / spent_s:7.1%} {ttft_s:8.3f} {run.attained / len(rows):7.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--systems", default="colocated")
    parser.add_argument("--holds", default="0.5,0.25")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print(f"{'case':10} {'system':14} {'KV':>7} {'rule':6} {'hits':>7} {'saved':>7} {'ttft_s':>8} {'met':>7}")
    for case in args.cases.split(","):
        rows = workload_of(case, args.traces, args.requests, args.seed)
        for holds in map(float, args.holds.split(",")):
            longest = max(row.input_tokens + row.output_tokens for row in rows)
            kv_tokens = max(int(1.2 * longest), int(holds * median_tokens(rows) / 2)) // 16 * 16
            for system in args.systems.split(","):
                for by_worth in (False, True):
                    figures = play(rows, system, kv_tokens, by_worth=by_worth)
                    rule = "worth" if by_worth else "last"
                    print(f"{case:10} {system:14} {kv_tokens:7} {rule:6} {figures}", flush=True)


if __name__ == "__main__":
    main()

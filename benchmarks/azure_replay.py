"""Ten recorded minutes of chat traffic under several systems, side by side.

For each system: start ``tidegate serve`` with three embedded engines, replay the sample trace with
``tidegate bench``, stop, and read the journal. Rate and lengths are scaled to a tiny model on two
cores. Run: ``python benchmarks/azure_replay.py`` (about twelve minutes). A system may have a split and a
token budget of its steps, as in ``static:1:2`` and ``colocated@128``. Traffic whose phases invert, on a real
model, is ``--model smollm2 --trace like:inversion --systems colocated,static:1:2,static:2:1,arrow-lending``
with the scales that the machine bears.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

TIDEGATE = (sys.executable, "-m", "tidegate")
Report = dict[str, Any]


def ms(report: Report, *path: str) -> str:
    """p50 / p90 / p99 of a latency, in milliseconds."""
    for name in path:
        report = report.get(name) or {}
    return " / ".join(f"{report[q] * 1e3:.1f}" for q in ("p50", "p90", "p99")) if report else "-"


def stage_rows(journal: Report, group: str) -> dict[str, str]:
    """The latencies of one group of stages; the group's name says what they are part of."""
    title = group.removesuffix("_s").replace("_", " ").removeprefix("stages ")
    return {f"  {title}: {name} ms": ms(journal, group, name) for name in journal[group]}


def rows(bench: Report, journal: Report) -> dict[str, str]:
    """What the table shows of one system."""
    attained, goodput, prediction = bench["attainment"], bench["goodput"], journal["prediction"]
    return {
        "requests offered": str(attained["offered"]),
        "answered in full": str(bench["successful"]),
        "lost or failed": str(attained["offered"] - bench["successful"]),
        "attainment": f"{attained['share']:.2%}",
        "offered rate, req/s": f"{goodput['offered_rps']:.2f}",
        "goodput, req/s": f"{goodput['attained_rps']:.2f}",
        "TTFT ms p50/p90/p99": ms(bench, "ttft_s"),
        **stage_rows(journal, "stages_of_ttft_s"),
        **stage_rows(journal, "stages_after_first_token_s"),
        "TPOT ms p50/p90/p99": ms(bench, "tpot_s"),
        "flips": str(sum(journal["flip_counts"].values())),
        "busy share by instance": " ".join(f"{i['busy_share']:.0%}" for i in journal["instances"]),
        "prefill prediction, median error": f"{prediction['median_abs_error']:.0%}" if prediction else "-",
    }


def replay(system: str, args: argparse.Namespace, out: Path) -> tuple[Report, Report]:
    """Serve and replay once; return the bench's and the journal's report."""
    composed, _, chunk = system.partition("@")
    composed, _, order = composed.partition("+")
    name, _, split = composed.partition(":")
    journal = out / f"{system.replace(':', '-')}.jsonl"
    journal.unlink(missing_ok=True)  # serve would go on with an earlier run's
    serve = [
        *TIDEGATE,
        "serve",
        "--model",
        args.model,
        "--system",
        "+".join(filter(None, (name, order))),
        "--slo",
        args.slo,
        "--port",
        "0",
        "--journal",
        str(journal),
        "--admission",
        "0",
    ]
    serve += ["--split", split] if split else []
    serve += ["--max-batch-tokens", chunk] if chunk else []
    serve += shlex.split(args.serve)
    server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = None
        for line in server.stdout:
            if found := re.search(r"serving on (http://\S+)/v1", line):
                url = found[1]
                break
        if url is None:
            raise SystemExit(f"tidegate serve --system {system} ended early")
        bench = [*TIDEGATE, "bench", "--url", url, "--trace", args.trace, "--slo", args.slo]
        bench += ["--scale-rate", str(args.scale_rate), "--scale-tokens", str(args.scale_tokens)]
        results = out / f"{system.replace(':', '-')}.bench.jsonl"
        results.unlink(missing_ok=True)
        bench += ["--out", str(results), "--json"]
        if args.limit:
            bench += ["--limit", str(args.limit)]
        if args.duration:
            bench += ["--duration", str(args.duration)]
        answer = subprocess.run(bench, stdout=subprocess.PIPE, text=True, check=False)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    report = subprocess.run(
        [*TIDEGATE, "report", str(journal), "--slo", args.slo, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(answer.stdout), json.loads(report.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--systems", default="colocated,static,arrow-lending")
    parser.add_argument("--scale-rate", type=float, default=3.0)
    parser.add_argument("--scale-tokens", type=float, default=0.2)
    parser.add_argument("--slo", default="ttft:500,tpot:50")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--trace", default="sample:azure-conv")
    parser.add_argument("--duration", type=float, default=0.0, help="seconds of it, after scaling")
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/azure"))
    parser.add_argument("--serve", default="", metavar="'FLAGS'", help="more flags of `tidegate serve`")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    reports = {}
    for system in args.systems.split(","):
        print(f"{system} ...", file=sys.stderr, flush=True)
        reports[system] = replay(system, args, args.out)
    (args.out / "reports.json").write_text(json.dumps(reports, indent=1))
    table = {system: rows(*pair) for system, pair in reports.items()}
    names = list(dict.fromkeys(name for column in table.values() for name in column))
    print(f"{'':36}" + "".join(f"{system:>26}" for system in table))
    for name in names:
        print(f"{name:36}" + "".join(f"{column.get(name, '-'):>26}" for column in table.values()))


if __name__ == "__main__":
    main()

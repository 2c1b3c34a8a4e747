"""Does an adaptive split pay off on traffic that moves? Goodput of systems on recorded traces, in one table.

Run: ``python benchmarks/moving_traffic.py --traces DIR --out DIR`` (about an hour on two cores; a run that is
stopped goes on where it was). DIR has the public traces that the cases name
(docs/results.md says where they come from). Every case is one ``tidegate
compare``, whose command is printed and whose report is kept in a folder of its own.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEMS = ("arrow-lending", "arrow", "static:even", "static:best", "colocated:tuned")
ORDERED = (
    "static:best",
    "static:best+feasible-first",
    "static:best+sjf",
    "arrow-lending",
    "arrow-lending+feasible-first",
    "arrow-lending+sjf",
)
BOTH = (0.9, 0.99)
"""At 0.99 only where a fleet is small enough that every split can be searched once more."""


@dataclass(frozen=True)
class Case:
    """A trace on a fleet: sizes at which the trace's changes take minutes, not seconds."""

    name: str
    file: str
    profile: str
    instances: int
    slo: str
    requests: int | None = None
    systems: tuple[str, ...] = SYSTEMS
    levels: tuple[float, ...] = (0.9,)

    def command(self, traces: Path, out: Path) -> list[str]:
        """Return the arguments of ``tidegate`` that measure the case."""
        most = [] if self.requests is None else ["--requests", str(self.requests)]
        return [
            *("compare", "--traces", str(traces / self.file), "--profile", self.profile),
            *("--instances", str(self.instances), "--slo", self.slo, *most),
            *("--systems", ",".join(self.systems), "--seeds", "1"),
            *("--levels", ",".join(map(str, self.levels)), "--out", str(out / self.name)),
        ]


CASES = (
    Case("chat-32b", "azure2023_conv.csv.gz", "h100_sxm/qwen3-32b/tp2", 8, "ttft:1000,tpot:50"),
    Case("day-8b", "servegen_r1_day_thin16.csv.gz", "h100_sxm/llama-3.1-8b", 8, "ttft:500,tpot:30", 20_000),
    Case(
        *("peak-70b", "servegen_r1_peak2h.csv.gz", "h100_sxm/llama-3.1-70b/tp4", 4, "ttft:1000,tpot:50"),
        requests=8_000,
        levels=BOTH,
    ),
    Case("mlarge-32b", "servegen_mlarge_4h.csv.gz", "h100_sxm/qwen3-32b/tp2", 8, "ttft:1000,tpot:50", 25_000),
    Case("long-8b", "mooncake_fast25_conversation.csv.gz", "h100_sxm/llama-3.1-8b", 8, "ttft:2000,tpot:30"),
    Case(
        *("orders-8b", "azure2023_conv.csv.gz", "h100_sxm/llama-3.1-8b", 4, "ttft:500,tpot:30"),
        systems=ORDERED,
        levels=BOTH,
    ),
)


def table(found: dict[str, dict[str, Any]], systems: tuple[str, ...], level: float) -> str:
    """Return the goodputs at one level as Markdown: requests/s and share of the limit, the best in bold."""
    lines = ["| case | limit | " + " | ".join(systems) + " |", "|---|---|" + "---|" * len(systems)]
    for name, report in found.items():
        rows = {row["system"]: row for row in report["goodputs"] if row["level"] == level}
        best = max(row["goodput_rps"] for row in rows.values())
        cells = []
        for system in systems:
            row = rows[system]
            share = row["share_of_limit"]
            text = f"{row['goodput_rps']:.2f}" + ("" if share is None else f" ({share:.0%})")
            text += f" {row['chosen'].replace('split ', '')}" if row["chosen"] else ""
            cells.append(f"**{text}**" if row["goodput_rps"] == best else text)
        limit = next(iter(rows.values()))["limit_rps"]
        lines.append(f"| {name} | {'-' if limit is None else f'{limit:.1f}'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run the cases and print a table per level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder of the traces")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--jobs", type=int, default=None)
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    cases = [case for case in CASES if case.name in options.cases.split(",")]
    missing = sorted({case.file for case in cases if not (options.traces / case.file).exists()})
    if missing:
        without = ",".join(case.name for case in CASES if case.file not in missing)
        parser.error(
            f"{options.traces} lacks {', '.join(missing)}; docs/results.md says where they come from"
            + (f", and --cases {without} runs without" if without else "")
        )
    for case in cases:
        words = case.command(options.traces, options.out)
        words += [] if options.jobs is None else ["--jobs", str(options.jobs)]
        print("$ tidegate " + shlex.join(words), file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, "-m", "tidegate", *words, "--json"], stdout=subprocess.PIPE)
        if done.returncode:
            return done.returncode
        found[case.name] = json.loads(done.stdout)
    for systems in (SYSTEMS, ORDERED):
        for level in BOTH:
            measured = {
                case.name: found[case.name]
                for case in CASES
                if case.name in found and case.systems is systems and level in case.levels
            }
            if measured:
                print(f"\nGoodput at attainment {level:g}, requests/s (share of the fluid limit)\n")
                print(table(measured, systems, level))
    return 0


if __name__ == "__main__":
    sys.exit(main())

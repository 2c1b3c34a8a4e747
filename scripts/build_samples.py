"""Build the sample traces of ``src/tidegate/workloads/samples`` from a folder of published traces.

    python scripts/build_samples.py TRACES

``TRACES`` holds servegen_r1_day_thin16.csv.gz, mooncake_fast25_conversation.csv.gz and
taubench_airline_rounds.csv.gz. Same input, same bytes. ``samples/README.md`` says what is in them.
"""

from __future__ import annotations

import csv
import gzip
import sys
from pathlib import Path

import numpy as np

SAMPLES = Path(__file__).parents[1] / "src" / "tidegate" / "workloads" / "samples"
KEPT_OF_THE_DAY = 0.1
MOONCAKE_S = 600.0
SESSIONS_PER_S = 0.25
TOOL_PAUSE_S, USER_PAUSE_S = 1.0, 10.0
"""Assumed mean pauses of the dialogues, exponential: the source has no times."""
NOMINAL_TOKEN_S = 0.02

Rows = list[dict[str, str]]


def main(traces: Path) -> None:
    write("reasoning-day", thinned(read(traces / "servegen_r1_day_thin16.csv.gz")))
    conversation = read(traces / "mooncake_fast25_conversation.csv.gz")
    write("mooncake-conv", [row for row in conversation if float(row["arrival_s"]) < MOONCAKE_S])
    write("tau-airline", scheduled(read(traces / "taubench_airline_rounds.csv.gz")))


def thinned(rows: Rows) -> Rows:
    kept = np.random.default_rng(0).random(len(rows)) < KEPT_OF_THE_DAY
    columns = ("arrival_s", "input_tokens", "output_tokens", "client_id")
    return [{name: row[name] for name in columns} for row, keep in zip(rows, kept, strict=True) if keep]


def scheduled(rows: Rows) -> Rows:
    """Give the dialogues Poisson starts and pauses; a turn's nominal arrival assumes 20 ms per token."""
    rng = np.random.default_rng(0)
    start_s = now_s = 0.0
    made: list[tuple[float, dict[str, str]]] = []
    before: dict[str, str] | None = None
    for row in rows:
        delay = ""
        if before is None or before["session_id"] != row["session_id"]:
            start_s += float(rng.exponential(1.0 / SESSIONS_PER_S))
            now_s = start_s
        else:
            pause_s = round(
                float(rng.exponential(TOOL_PAUSE_S if before["next"] == "tool" else USER_PAUSE_S)), 3
            )
            now_s += int(before["output_tokens"]) * NOMINAL_TOKEN_S + pause_s
            delay = f"{pause_s:g}"
        before = row
        line = {
            "arrival_s": f"{now_s:.3f}",
            "input_tokens": row["input_tokens"],
            "output_tokens": row["output_tokens"],
            "session_id": row["session_id"],
            "turn": row["round"],
            "delay_s": delay,
            "prefix_hit_tokens": row["prefix_hit_tokens"],
        }
        made.append((now_s, line))
    return [line for _, line in sorted(made, key=lambda pair: pair[0])]


def read(path: Path) -> Rows:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(name: str, rows: Rows) -> None:
    text = ",".join(rows[0]) + "\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    path = SAMPLES / f"{name}.csv.gz"
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    sys.stdout.write(f"{name}: {len(rows)} rows, {path.stat().st_size} bytes\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

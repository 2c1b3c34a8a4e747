"""Traffic whose phases shift, on embedded engines with a real model: systems side by side, in turns.

First one engine is measured (``tidegate profile``). All then keep a pace (``--pace``) that is slower by as
much as leaves cores to spare, so that engines slow each other down as little as GPUs do. From that pace come
the targets and the rates: a slow machine gets a load and targets that it can bear. The fleet serves phases of
long prompts with short answers and of short prompts with long answers, once per system and turn. A system may
have a split, an order and a token budget of its steps: ``static:1:2+sjf``, ``colocated@128``. Run: ``python
benchmarks/phase_shift.py`` (a quarter of an hour per turn, on a machine with nothing else to do).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

from azure_replay import TIDEGATE, Report, ms, replay
from tidegate.core.slo import Slo
from tidegate.costs.profile import Profile
from tidegate.costs.saved_profile import read_profile, save_profile
from tidegate.workloads.choice import WorkloadChoice, load_workload
from tidegate.workloads.reshape import concatenate
from tidegate.workloads.writers import write_trace

BESIDE = 4
"""Decodes of the step that the TPOT target is a multiple of (ours)."""
SPARE = 0.45
"""Share of the cores that is left for the gateway, the client, and whatever else slows engines (ours)."""
CONTEXT = 1024
"""Longest prompt that the engine is measured with: longer ones take minutes on a CPU."""
SYSTEMS = (
    "tidegate",
    "colocated+feasible-sjf@512",
    "colocated+feasible-sjf@128",
    "static:1:2+feasible-sjf",
    "static:2:1+feasible-sjf",
)
"""Rivals have tidegate's own order."""
SPREAD = 0.4
"""Deviation of the logarithm of lengths."""


def pace(args: argparse.Namespace) -> Profile:
    """Measure one engine that has the machine for itself; return and write the pace that all can keep."""
    serve = [*TIDEGATE, "serve", "--model", args.model, "--instances", "1", "--system", "colocated"]
    serve += ["--max-model-len", str(CONTEXT), "--port", "0"]
    server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        up = (re.search(r" up after .* at (http://[^,]+),", line) for line in server.stdout)
        url = next(filter(None, up))[1]
        file = args.out / "engine.json"
        file.unlink(missing_ok=True)
        probe = [*TIDEGATE, "profile", "--url", url, "--budget", str(args.budget), "--out", str(file)]
        subprocess.run(probe, check=True, stdout=subprocess.DEVNULL)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    slower = max(1.0, args.instances / ((1.0 - SPARE) * (os.cpu_count() or 1)))
    saved = read_profile(file)
    paced = replace(saved, profile=saved.profile.scaled(slower, slower))
    save_profile(args.out / "pace.json", paced)
    return paced.profile


def decode_s(profile: Profile, prompt: int, answer: int) -> float:
    """Return what a step takes with some decodes in the middle of their answers."""
    return float(profile.step.seconds(BESIDE, BESIDE * (prompt + answer / 2)))


def targets(args: argparse.Namespace, profile: Profile) -> Slo:
    """Return multiples of what the longer prompt and a step of the longer answers take alone."""
    (prompt, _), (short, answer) = args.read, args.write
    ttft, tpot = args.targets
    return Slo(ttft * profile.prefill_s(prompt), tpot * decode_s(profile, short, answer))


def served_rps(args: argparse.Namespace, profile: Profile, slo: Slo, prompt: int, answer: int) -> float:
    """Return what the engines serve if nothing waits: steps take their target, prefills what is left."""
    step = profile.step
    batch = (slo.tpot_s - step.a_s) / (step.b_s + step.c_s * (prompt + answer / 2))
    return float(args.instances / (profile.prefill_s(prompt) + answer * slo.tpot_s / batch))


def requests_of(args: argparse.Namespace, profile: Profile, slo: Slo, turn: int) -> Path:
    """Write the requests of a turn; each phase asks for the same share of what the engines serve."""
    phases = []
    for at, (prompt, answer) in enumerate((args.read, args.write) * args.cycles):
        choice = WorkloadChoice(
            poisson=args.load * served_rps(args, profile, slo, prompt, answer),
            duration_s=args.phase_s,
            input_tokens=f"lognormal:{prompt}:{SPREAD}",
            output_tokens=f"lognormal:{answer}:{SPREAD}",
            seed=1000 * args.seed + 100 * turn + at,
        )
        phases.append(load_workload(choice))
    file: Path = args.out / f"turn{turn}.csv"
    write_trace(file, concatenate(*phases), force=True)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="smollm2")
    add("--instances", type=int, default=3, help="what `tidegate serve` starts without being told")
    add("--systems", default=",".join(SYSTEMS))
    add("--turns", type=int, default=2)
    add("--read", type=int, nargs=2, default=(256, 8), help="tokens of prompt and answer in one phase")
    add("--write", type=int, nargs=2, default=(24, 128), help="and in the other")
    add("--phase-s", type=float, default=45.0)
    add("--cycles", type=int, default=1)
    add("--load", type=float, default=0.6, help="share of what the engines serve if nothing waits")
    add("--targets", type=float, nargs=2, default=(4.0, 3.0), help="multiples of prefill and step alone")
    add("--seed", type=int, default=0)
    add("--budget", type=float, default=120.0, help="seconds of measuring")
    add("--out", type=Path, default=Path("runs/phase-shift"))
    args = parser.parse_args()
    args.serve = shlex.join(["--pace", str(args.out / "pace.json")])
    args.out.mkdir(parents=True, exist_ok=True)
    args.scale_rate = args.scale_tokens = 1.0
    args.limit, args.duration = 0, 0.0
    profile = pace(args)
    slo = targets(args, profile)
    args.slo = f"ttft:{1e3 * slo.ttft_s:.0f},tpot:{1e3 * slo.tpot_s:.0f}"
    alone_s = profile.prefill_s(args.read[0])
    print(f"prefill of {args.read[0]} at the pace: {alone_s:.2f} s; targets {args.slo}", flush=True)
    met: dict[str, list[tuple[int, int]]] = {}
    reports: list[dict[str, tuple[Report, Report]]] = []
    for turn in range(args.turns):
        args.trace = str(requests_of(args, profile, slo, turn))
        reports.append({})
        for system in args.systems.split(","):
            bench, journal = reports[-1][system] = replay(system, args, args.out)
            score = bench["attainment"]
            met.setdefault(system, []).append((round(score["share"] * score["offered"]), score["offered"]))
            print(
                f"turn {turn} {system:16} attained {score['share']:7.1%} of {score['offered']}"
                f"  lost {score['offered'] - bench['successful']}  TTFT {ms(bench, 'ttft_s')}"
                f"  TPOT {ms(bench, 'tpot_s')}  flips {sum(journal['flip_counts'].values())}",
                flush=True,
            )
    (args.out / "reports.json").write_text(json.dumps(reports, indent=1))
    print(f"{'all turns':24}{'attained':>10}{'of':>6}{'share':>8}")
    for system, scores in met.items():
        attained, offered = (sum(each) for each in zip(*scores, strict=True))
        print(f"{system:24}{attained:>10}{offered:>6}{attained / offered:>8.1%}")


if __name__ == "__main__":
    main()

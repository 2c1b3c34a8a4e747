"""What a client sees of a migration: ``migration_gap.py [--moves N] [--contexts 256,1024,4096,8192]``.

Three embedded engines with a tiny random model behind a gateway. Per context length one stream, beside
``--beside`` short ones, moves back and forth between two engines: in stages, then by ending its leg, pinning
its KV and having it pulled, as vLLM servers do it. Prints the gap that a move adds between two tokens, in
normal token intervals of the same stream, and what a normal interval adds at p99: on a machine that has other
work, only such ratios mean something. A move that ends the leg delivers one token in between, whose
interval counts as part of the gap. Copies are small after the first two moves, for the engines' prefix caches
keep what was there.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import numpy as np
import orjson

from tidegate.control.live_request import Stage
from tidegate.core.decision import Migrate
from tidegate.engines.embedded.tiny_model import make_tiny_model
from tidegate.fleet.processes import EngineLaunch, LocalFleet
from tidegate.gateway.dispatcher import Dispatcher
from tidegate.gateway.run import Gateway
from tidegate.gateway.settings import GatewaySettings
from tidegate.systems import make_system

BETWEEN_TOKENS = 12
"""A stream moves again once it has so many more tokens."""
SHORT = 128


@dataclass(frozen=True, slots=True)
class Gaps:
    """Of one stream, in seconds: between tokens, and at moves."""

    tokens_s: list[float]
    moves_s: list[float]


async def stream(
    client: aiohttp.ClientSession, url: str, prompt: int, tokens: int, times: list[float]
) -> None:
    """Stream a completion and note when each token came."""
    body = {
        "prompt": [5 + (prompt * 31 + k * 7) % 480 for k in range(prompt)],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    async with client.post(url + "/v1/completions", data=orjson.dumps(body)) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                times += [time.perf_counter()] * len(orjson.loads(line[6:])["choices"][0]["token_ids"])


async def move_on(dispatcher: Dispatcher, context: int, moves: int) -> None:
    """Have the one long decode move whenever it has come far enough."""
    moved_at = 0
    while True:
        await asyncio.sleep(0.001)
        for live in list(dispatcher.plane.requests.values()):
            long = live.as_request().prompt_tokens - live.generated >= context > SHORT
            if not long or live.stage is not Stage.DECODE or live.migrate or live.decode_on is None:
                continue
            if live.migrations < moves and live.generated >= moved_at + BETWEEN_TOKENS:
                moved_at = live.generated
                others = (n for n in dispatcher.upstreams if n not in (live.decode_on, live.prefill_on))
                dispatcher.act([Migrate(live.id, live.decode_on, next(others), "benchmark")])


async def measure(
    model: Path, contexts: list[int], moves: int, beside: int, *, staged: bool
) -> dict[int, Gaps]:
    """Return what each context length's stream saw."""
    found: dict[int, Gaps] = {}
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal.jsonl"
        fleet = LocalFleet(EngineLaunch(model=model, instances=3, kv_memory_mb=128))
        gateway = Gateway(
            GatewaySettings(port=0, admission=0.0, journal=journal), fleet, make_system("static")
        )
        url = await gateway.start()
        upstreams = gateway.dispatcher.upstreams
        for name, upstream in upstreams.items():
            capabilities = replace(upstream.member.capabilities, staged=staged)
            upstreams[name] = replace(upstream, member=replace(upstream.member, capabilities=capabilities))
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as client:
            for context in contexts:
                tokens, times = (moves + 3) * (BETWEEN_TOKENS + 4), list[float]()
                others = [
                    asyncio.create_task(stream(client, url, SHORT - 1 - n, 4 * tokens, []))
                    for n in range(beside)
                ]
                mover = asyncio.create_task(move_on(gateway.dispatcher, context, moves))
                await stream(client, url, context, tokens, times)
                for task in (mover, *others):
                    task.cancel()
                    with suppress(asyncio.CancelledError):
                        await task
                rows = map(orjson.loads, journal.read_bytes().splitlines())
                done = [row for row in rows if row["type"] == "migration" and row["event"] == "done"]
                before = sum(len(gaps.moves_s) for gaps in found.values())
                pauses = [row["pause_s"] for row in done[before:]]
                found[context] = Gaps(np.diff(times)[1:].tolist(), pauses)
        await gateway.stop()
    return found


def main() -> None:
    """Measure both ways of moving and print their gaps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moves", type=int, default=100)
    parser.add_argument("--contexts", default="256,1024,4096,8192")
    parser.add_argument("--beside", type=int, default=4)
    args = parser.parse_args()
    contexts = [int(text) for text in args.contexts.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "tiny", max_len=2 * max(contexts) + 4096)
        print("how, context, moves, interval in ms; added in intervals: a move p50, p99; a token p99")
        for name, staged in (("staged", True), ("ended leg", False)):
            measured = asyncio.run(measure(model, contexts, args.moves, args.beside, staged=staged))
            for context, gaps in measured.items():
                interval_s = float(np.median(gaps.tokens_s))
                moves, tokens = (np.array(s) / interval_s - 1 for s in (gaps.moves_s, gaps.tokens_s))
                p50, p99 = np.percentile(moves, [50, 99])
                noise = float(np.percentile(tokens, 99))
                print(
                    f"{name:>10}{context:>7}{len(moves):>5}{1e3 * interval_s:>8.2f}"
                    f"{p50:>8.2f}{p99:>8.2f}{noise:>8.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

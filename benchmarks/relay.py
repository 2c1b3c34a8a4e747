"""What the gateway costs: CPU per relayed chunk and per two-leg request, added TTFT, requests/s.

A fake engine streams over real HTTP; the same load goes to the engine directly and through the
gateway, in one run. Run: ``python benchmarks/relay.py`` (Linux: CPU time is read from /proc).
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import orjson
import uvloop

from tidegate.engines.wire import Wire

STREAMS = 64
LONG, SHORT = 160, 2
STEP_MS = 10
LOW_LOAD_REQUESTS = 400
SATURATION_REQUESTS = 4000


def cpu_s(pid: int) -> float:
    """CPU seconds a process has used, all threads."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def start(*argv: str) -> tuple[subprocess.Popen[str], int]:
    """Start a process that prints a ready line with its port."""
    process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())["port"]


def body(tokens: int, index: int) -> bytes:
    """A completion of ``tokens`` tokens for a 64-token prompt."""
    prompt = [(index * 7 + i) % 500 for i in range(64)]
    return orjson.dumps(
        {"model": "fake", "prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0}
    )


class Load:
    """Sends streamed completions to one URL."""

    def __init__(self, port: int) -> None:
        self.wire = Wire(f"http://127.0.0.1:{port}", connect_s=5, stall_s=60, headers={})

    async def one(self, tokens: int, index: int = 0) -> float:
        """Send one request; return its seconds to the first bytes."""
        began, first = time.perf_counter(), [0.0]

        def sink(data: bytes) -> None:
            if not first[0]:
                first[0] = time.perf_counter() - began
            seen[0] += data.count(b"data: {")

        seen = [0]
        answer = await self.wire.exchange(
            "POST", "/v1/completions", body(tokens, index), sink=sink, deadline_s=120
        )
        assert answer.status == 200, answer
        assert seen[0] >= tokens, (seen, tokens)
        return first[0]

    async def many(self, requests: int, concurrency: int, tokens: int) -> float:
        """Closed loop: keep ``concurrency`` requests open until ``requests`` are done; return seconds."""
        todo = iter(range(requests))

        async def worker() -> None:
            for index in todo:
                await self.one(tokens, index)

        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return time.perf_counter() - began


QUANTILES = {"p50": 0.5, "p99": 0.99}


def quantile(ordered: list[float], q: float) -> float:
    """Nearest-rank quantile of ascending values."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


async def measure() -> None:
    paced, fast = (
        start("-m", "tidegate.testing.fake_engine", "--step-ms", str(STEP_MS)),
        start("-m", "tidegate.testing.fake_engine"),
    )
    behind = [start(__file__, "gateway", f"http://127.0.0.1:{engine[1]}") for engine in (paced, fast)]
    try:
        await report_chunks(paced, behind[0])
        await report_requests(fast, behind[1])
    finally:
        for process, _ in (paced, fast, *behind):
            process.kill()


Server = tuple[subprocess.Popen[str], int]


async def report_chunks(engine: Server, gateway: Server) -> None:
    """CPU per chunk: what long streams cost beyond short ones, for the gateway and for the engine itself."""
    through = Load(gateway[1])
    await through.many(200, 32, SHORT)
    spent = {}
    for tokens in (SHORT, LONG):
        before = [cpu_s(process.pid) for process, _ in (gateway, engine)]
        await through.many(STREAMS * 4, STREAMS, tokens)
        after = [cpu_s(process.pid) for process, _ in (gateway, engine)]
        spent[tokens] = [end - begin for begin, end in zip(before, after, strict=True)]
    chunks = STREAMS * 4 * (LONG - SHORT)
    gateway_us, engine_us = (
        (long_s - short_s) / chunks * 1e6 for short_s, long_s in zip(spent[SHORT], spent[LONG], strict=True)
    )
    print(
        f"gateway CPU per 100,000 relayed chunks   {gateway_us / 10:8.2f} s    ({gateway_us:.1f} us each)   "
        f"bare engine {engine_us / 10:.2f} s, x{gateway_us / engine_us:.2f}"
    )


async def report_requests(engine: Server, gateway: Server) -> None:
    """CPU per request, added TTFT with one request at a time, requests/s with 64 open."""
    loads = {"bare": Load(engine[1]), "gateway": Load(gateway[1])}
    low, rps, cpu_ms = {}, {}, {}
    for name, load in loads.items():
        await load.many(400, 32, SHORT)
        low[name] = sorted([await load.one(SHORT, i) for i in range(LOW_LOAD_REQUESTS)])
    for name, load in loads.items():
        process = gateway[0] if name == "gateway" else engine[0]
        before = cpu_s(process.pid)
        rps[name] = SATURATION_REQUESTS / await load.many(SATURATION_REQUESTS, 64, SHORT)
        cpu_ms[name] = (cpu_s(process.pid) - before) / SATURATION_REQUESTS * 1e3
    print(
        f"gateway CPU per 1,000 two-leg requests   {cpu_ms['gateway']:8.2f} s    "
        f"({cpu_ms['gateway']:.3f} ms each)  bare engine, one leg {cpu_ms['bare']:.2f} s, "
        f"x{cpu_ms['gateway'] / cpu_ms['bare']:.2f}"
    )
    for name, q in QUANTILES.items():
        with_ms, bare_ms = quantile(low["gateway"], q) * 1e3, quantile(low["bare"], q) * 1e3
        print(
            f"TTFT {name}, one request at a time        {with_ms:8.3f} ms   "
            f"(added {with_ms - bare_ms:.3f} ms)   bare {bare_ms:.3f} ms, x{with_ms / bare_ms:.2f}"
        )
    print(
        f"requests/s, 64 open, two tokens each     {rps['gateway']:8.0f}                    "
        f"bare, one leg {rps['bare']:.0f}, x{rps['gateway'] / rps['bare']:.2f}"
    )


async def serve_gateway(url: str) -> None:
    """The gateway under test: static 1P:1D over the same fake engine twice."""
    from tidegate.gateway.run import run_gateway
    from tidegate.gateway.settings import GatewaySettings
    from tidegate.systems import make_system
    from tidegate.testing.members import GivenFleet

    def ready(base: str) -> None:
        print(json.dumps({"event": "ready", "port": int(base.rsplit(":", 1)[1])}), flush=True)

    await run_gateway(
        GatewaySettings(port=0), GivenFleet({"i0": url, "i1": url}), make_system("static"), on_ready=ready
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["gateway"]:
        uvloop.run(serve_gateway(sys.argv[2]))
    else:
        uvloop.run(measure())

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
    paced, paced_port = start("-m", "tidegate.testing.fake_engine", "--step-ms", str(STEP_MS))
    fast, fast_port = start("-m", "tidegate.testing.fake_engine")
    gateways = {
        "paced": start(__file__, "gateway", f"http://127.0.0.1:{paced_port}"),
        "fast": start(__file__, "gateway", f"http://127.0.0.1:{fast_port}"),
    }
    try:
        await report(paced_port, fast_port, gateways)
    finally:
        for process in (paced, fast, *(g[0] for g in gateways.values())):
            process.kill()


async def report(
    paced_port: int, fast_port: int, gateways: dict[str, tuple[subprocess.Popen[str], int]]
) -> None:
    process, port = gateways["paced"]
    through = Load(port)
    await through.many(200, 32, SHORT)
    marks = [cpu_s(process.pid)]
    for tokens in (SHORT, LONG):
        await through.many(STREAMS * 4, STREAMS, tokens)
        marks.append(cpu_s(process.pid))
    short_s, long_s = marks[1] - marks[0], marks[2] - marks[1]
    chunks = STREAMS * 4 * (LONG - SHORT)
    chunk_us = (long_s - short_s) / chunks * 1e6

    process, port = gateways["fast"]
    bare, through = Load(fast_port), Load(port)
    await through.many(400, 32, SHORT)
    await bare.many(400, 32, SHORT)
    low = {}
    for name, load in (("bare", bare), ("gateway", through)):
        low[name] = sorted([await load.one(SHORT, i) for i in range(LOW_LOAD_REQUESTS)])
    before = cpu_s(process.pid)
    busy_s = await through.many(SATURATION_REQUESTS, 64, SHORT)
    used_s = cpu_s(process.pid) - before
    bare_s = await bare.many(SATURATION_REQUESTS, 64, SHORT)

    added = {name: quantile(low["gateway"], q) - quantile(low["bare"], q) for name, q in QUANTILES.items()}
    ratios = {name: quantile(low["gateway"], q) / quantile(low["bare"], q) for name, q in QUANTILES.items()}
    request_ms = used_s / SATURATION_REQUESTS * 1e3
    rps, bare_rps = SATURATION_REQUESTS / busy_s, SATURATION_REQUESTS / bare_s
    print(f"CPU per relayed chunk      {chunk_us:7.1f} us   {chunk_us / 10:5.2f} s per 100,000 chunks")
    print(f"CPU per two-leg request    {request_ms:7.3f} ms   {request_ms:5.2f} s per 1,000 requests")
    for name, q in QUANTILES.items():
        bare_ms = quantile(low["bare"], q) * 1e3
        print(
            f"TTFT {name}, one at a time   {bare_ms + added[name] * 1e3:7.3f} ms   "
            f"bare {bare_ms:.3f} ms, added {added[name] * 1e3:.3f} ms, x{ratios[name]:.2f}"
        )
    print(f"requests/s, 64 open        {rps:7.0f}      bare (one leg) {bare_rps:.0f}, x{rps / bare_rps:.2f}")


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

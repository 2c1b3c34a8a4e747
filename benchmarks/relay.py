"""What the gateway costs: CPU per relayed chunk and per two-leg request, added TTFT, requests/s.

A fake engine streams over real HTTP; the same load goes to the engine directly and through the
gateway, in one run, and through vLLM's router (Rust) where ``vllm-router`` is on the PATH or named by
``--router``. They take turns, ``ROUNDS`` times, and the median counts: one turn beside a busy neighbour is
off by a half. Run: ``python benchmarks/relay.py`` (Linux: CPU time is read from /proc).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import orjson
import uvloop

from tidegate.engines.wire import Wire

STREAMS = 64
LONG, SHORT = 160, 2
STEP_MS = 10
LOW_LOAD_REQUESTS = 400
SATURATION_REQUESTS = 1500
ROUNDS = 7


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


class Server(NamedTuple):
    """A process that listens on ``port``, and what it costs while it is loaded."""

    process: subprocess.Popen[str]
    port: int

    def cpu_s(self) -> float:
        """CPU seconds it has used."""
        return cpu_s(self.process.pid)


def start_router(binary: str, prefill: Server, decode: Server) -> Server:
    """Start vLLM's router over two servers; it takes no server for both."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    urls = [f"http://127.0.0.1:{engine.port}" for engine in (prefill, decode)]
    command = [binary, "--host", "127.0.0.1", "--port", str(ports[0]), "--prometheus-port", str(ports[1])]
    command += [
        "--vllm-pd-disaggregation",
        "--prefill",
        urls[0],
        "--decode",
        urls[1],
        "--kv-connector",
        "nixl",
    ]
    command += ["--policy", "round_robin", "--log-level", "error"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    return Server(process, ports[0])


async def measure(router: str | None) -> None:
    paced, fast, prefill = (
        Server(*start("-m", "tidegate_testing.fake_engine", *options))
        for options in (("--step-ms", str(STEP_MS)), (), ())
    )
    fronts: dict[str, list[Server]] = {
        "gateway": [Server(*start(__file__, "gateway", f"http://127.0.0.1:{e.port}")) for e in (paced, fast)]
    }
    try:
        if router is not None:
            fronts["vllm-router"] = [start_router(router, prefill, engine) for engine in (paced, fast)]
            for server in fronts["vllm-router"]:
                await listening(server.port)
        await report_chunks(paced, {name: pair[0] for name, pair in fronts.items()})
        await report_requests(fast, {name: pair[1] for name, pair in fronts.items()})
    finally:
        for server in (paced, fast, prefill, *(each for pair in fronts.values() for each in pair)):
            server.process.kill()


async def listening(port: int) -> None:
    """Return once something listens there; raise TimeoutError after 30 s."""
    async with asyncio.timeout(30):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.1)
                continue
            writer.close()
            return


def line(what: str, unit: str, by_name: Mapping[str, float], digits: int = 2) -> None:
    """Print a figure of each front beside the bare engine's, and the gateway's share of the router's."""
    figures = "   ".join(f"{name} {value:.{digits}f}" for name, value in by_name.items())
    ratios = [f"x{by_name['gateway'] / by_name['bare']:.2f} of bare"]
    if "vllm-router" in by_name:
        ratios.append(f"x{by_name['gateway'] / by_name['vllm-router']:.2f} of vllm-router")
    print(f"{what:36} {unit:5} {figures}   ({', '.join(ratios)})")


def medians(by_name: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median of each front's turns."""
    return {name: statistics.median(values) for name, values in by_name.items()}


async def report_chunks(engine: Server, fronts: Mapping[str, Server]) -> None:
    """CPU per chunk: what long streams cost beyond short ones, for each front and for the engine itself."""
    chunks = STREAMS * 2 * (LONG - SHORT)
    chunk_us: dict[str, list[float]] = {name: [] for name in ("bare", *fronts)}
    loads = {name: Load(front.port) for name, front in fronts.items()}
    for load in loads.values():
        await load.many(200, 32, SHORT)
    for _ in range(ROUNDS):
        for name, front in fronts.items():
            spent = {}
            for tokens in (SHORT, LONG):
                before = [server.cpu_s() for server in (front, engine)]
                await loads[name].many(STREAMS * 2, STREAMS, tokens)
                spent[tokens] = [
                    server.cpu_s() - began for server, began in zip((front, engine), before, strict=True)
                ]
            for each, short_s, long_s in zip((name, "bare"), spent[SHORT], spent[LONG], strict=True):
                chunk_us[each].append((long_s - short_s) / chunks * 1e6)
    line("CPU of a relayed chunk", "us", medians(chunk_us))


async def report_requests(engine: Server, fronts: Mapping[str, Server]) -> None:
    """CPU per request, TTFT with one at a time, requests/s with 64 open. The bare engine runs one leg."""
    loads = {name: (server, Load(server.port)) for name, server in {"bare": engine, **fronts}.items()}
    ttft_ms: dict[str, dict[str, list[float]]] = {q: {name: [] for name in loads} for q in QUANTILES}
    rps: dict[str, list[float]] = {name: [] for name in loads}
    cpu_ms: dict[str, list[float]] = {name: [] for name in loads}
    for _, load in loads.values():
        await load.many(1000, 64, SHORT)
    for _ in range(ROUNDS):
        for name, (_, load) in loads.items():
            low_s = sorted([await load.one(SHORT, i) for i in range(LOW_LOAD_REQUESTS)])
            for label, q in QUANTILES.items():
                ttft_ms[label][name].append(quantile(low_s, q) * 1e3)
        for name, (server, load) in loads.items():
            before = server.cpu_s()
            rps[name].append(SATURATION_REQUESTS / await load.many(SATURATION_REQUESTS, 64, SHORT))
            cpu_ms[name].append((server.cpu_s() - before) / SATURATION_REQUESTS * 1e3)
    line("CPU of a two-leg request", "ms", medians(cpu_ms), 3)
    for label, found in ttft_ms.items():
        line(f"TTFT {label}, one request at a time", "ms", medians(found), 3)
    line("requests/s, 64 open, two tokens each", "1/s", medians(rps), 0)


async def serve_gateway(url: str) -> None:
    """The gateway under test: static 1P:1D over the same fake engine twice."""
    from tidegate.gateway.run import run_gateway
    from tidegate.gateway.settings import GatewaySettings
    from tidegate.systems import make_system
    from tidegate_testing.members import GivenFleet

    def ready(base: str) -> None:
        print(json.dumps({"event": "ready", "port": int(base.rsplit(":", 1)[1])}), flush=True)

    await run_gateway(
        GatewaySettings(port=0), GivenFleet({"i0": url, "i1": url}), make_system("static"), on_ready=ready
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["gateway"]:
        uvloop.run(serve_gateway(sys.argv[2]))
    else:
        parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
        parser.add_argument("--router", default=shutil.which("vllm-router"), help="vLLM's router (a program)")
        uvloop.run(measure(parser.parse_args().router))

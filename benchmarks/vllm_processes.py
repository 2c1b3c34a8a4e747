"""vLLM servers for benchmarks: those that run at given URLs, or some of one's own on this machine's CPU."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from tidegate.core.errors import EngineError
from tidegate.engines.vllm.client import VllmClient
from tidegate.engines.vllm.metrics import VllmMetrics
from tidegate.fleet.vllm import free_ports, nixl_config
from tidegate_testing import profile

ROOT = Path(__file__).parents[1]
SERVE = ROOT / "scripts" / "vllm_cpu" / "serve.sh"
MODEL = ROOT / ".cache" / "models" / "tiny-llama"
START_S = 240.0
"""Long: several start at once on a few cores."""
LEASE_S = 30
"""For how long a server keeps KV that nobody came for."""
STREAM_PIN_S = 1
"""For how long it keeps that of a stream's end, which the gateway never reads."""
COSTS = profile(prefill=(5e-3, 5e-5, 0.0), step=(4e-3, 0.0, 1e-7), transfer=(5e-3, 1e9), name="tiny/cpu")
"""Of the size of what the tiny model takes on a CPU."""


def add_server_arguments(parser: argparse.ArgumentParser, count: int) -> None:
    """Let the caller give running servers, or say what to start."""
    parser.add_argument(
        "--url", action="append", default=[], help=f"a running server, {count} times; default: start some"
    )
    parser.add_argument("--servers", type=int, default=count, help="how many to start")
    parser.add_argument("--model", type=Path, default=MODEL, help="what those serve")
    parser.add_argument("--logs", type=Path, default=Path("runs/vllm-logs"), help="what those write")


class Started:
    """A server of one's own, which keeps its ports over restarts."""

    def __init__(self, name: str, model: Path, logs: Path, taken: Sequence[int]) -> None:
        self.name = name
        self.port = free_ports(taken)
        self.url = f"http://127.0.0.1:{self.port}"
        self._model = model
        self._log = logs / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process and return at once."""
        kv = nixl_config(lease_s=LEASE_S)
        kv["kv_connector_extra_config"]["decoder_kv_blocks_ttl"] = STREAM_PIN_S
        env = {**os.environ, "KV_CONFIG": json.dumps(kv), "NIXL_PORT": str(self.port + 2)}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(SERVE), str(self._model), "--port", str(self.port)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """End all its processes with SIGKILL. Idempotent."""
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()

    async def ready(self, session: aiohttp.ClientSession) -> None:
        """Return once it is healthy; SystemExit with its log's name when it never is."""
        try:
            async with asyncio.timeout(START_S):
                while not await healthy(session, self.url):
                    assert self._process is not None
                    if self._process.poll() is not None:
                        raise SystemExit(f"{self.name} ended while it started; see {self._log}")
                    await asyncio.sleep(0.5)
        except TimeoutError:
            raise SystemExit(f"{self.name} is not healthy after {START_S:g} s; see {self._log}") from None


async def healthy(session: aiohttp.ClientSession, url: str) -> bool:
    """Ask /health once."""
    try:
        return await VllmClient(session, url, deadline_s=2.0).healthy()
    except EngineError:
        return False


@asynccontextmanager
async def running(
    args: argparse.Namespace, session: aiohttp.ClientSession
) -> AsyncIterator[tuple[list[str], list[Started]]]:
    """Yield the URLs of healthy servers, and those that were started here, which end with the block."""
    if args.url:
        urls = [url.rstrip("/") for url in args.url]
        down = [url for url in urls if not await healthy(session, url)]
        if down:
            raise SystemExit(f"no healthy server at {', '.join(down)}")
        yield urls, []
        return
    args.logs.mkdir(parents=True, exist_ok=True)
    servers: list[Started] = []
    try:
        for index in range(args.servers):
            taken = [server.port for server in servers]
            servers.append(Started(f"server{index}", args.model, args.logs, taken))
            servers[-1].start()
        for server in servers:
            await server.ready(session)
        yield [server.url for server in servers], servers
    finally:
        for server in servers:
            server.kill()


async def read_metrics(session: aiohttp.ClientSession, url: str) -> VllmMetrics:
    """Read a server's /metrics; all None when it does not answer."""
    try:
        return await VllmClient(session, url, deadline_s=10.0).metrics()
    except EngineError:
        return VllmMetrics()

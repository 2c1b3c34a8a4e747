"""A running fake endpoint and a way to offer it load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestServer
from fake_openai import FakeOpenAI, Offer

from tidegate.bench import BenchRun, BenchSettings, run_bench
from tidegate.workloads import TraceRecord


@asynccontextmanager
async def serving(fake: FakeOpenAI) -> AsyncIterator[str]:
    server = TestServer(fake.app())
    await server.start_server(shutdown_timeout=0.0)
    try:
        yield str(server.make_url("")).rstrip("/")
    finally:
        await server.close()


@pytest.fixture
def offer() -> Offer:
    """Run a bench against a fake; ``stop_at`` interrupts it after that many requests came in."""

    async def run(
        fake: FakeOpenAI,
        records: Sequence[TraceRecord],
        *,
        stop_at: int | None = None,
        out: Path | None = None,
        **settings: Any,
    ) -> BenchRun:
        stop = asyncio.Event()

        async def stopper() -> None:
            if stop_at is not None:
                await fake.received(stop_at)
                stop.set()

        async with serving(fake) as url:
            watch = asyncio.create_task(stopper())
            done = await run_bench(BenchSettings(url, **settings), records, stop=stop, out=out)
            watch.cancel()
            return done

    return run

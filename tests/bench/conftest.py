"""A running fake endpoint and a way to offer it load."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.fake_openai import DEFAULTS, FakeOpenAI, Offer, serving
from tidegate.bench import BenchRun, BenchSettings, run_bench
from tidegate.workloads.trace import TraceRecord


@pytest.fixture
def offer() -> Offer:
    """Run a bench against a fake; ``stop_at`` interrupts it after that many requests came in."""

    async def run(
        fake: FakeOpenAI,
        records: Sequence[TraceRecord],
        *,
        stop_at: int | None = None,
        out: Path | None = None,
        settings: BenchSettings = DEFAULTS,
    ) -> BenchRun:
        stop = asyncio.Event()

        async def stopper() -> None:
            if stop_at is not None:
                await fake.received(stop_at)
                stop.set()

        # The bound only turns a hang into a failure.
        async with asyncio.timeout(60), serving(fake) as url:
            watch = asyncio.create_task(stopper())
            done = await run_bench(replace(settings, url=url), records, stop=stop, out=out)
            watch.cancel()
            return done

    return run

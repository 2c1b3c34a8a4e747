"""A gateway over fake engines, in one event loop, over real HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from tests.gateway.gateway_cluster import ABLE, DEFAULTS, Cluster, Start
from tidegate.core.instance import Role
from tidegate.fleet.member import Capabilities
from tidegate.gateway.run import Gateway
from tidegate.gateway.settings import GatewaySettings
from tidegate.systems import System, make_system
from tidegate_testing import profile
from tidegate_testing.chaos import NOT_FORCED, Forced, chaos
from tidegate_testing.fake_engine import FakeEngine
from tidegate_testing.members import GivenFleet


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start clusters; all are stopped at the end of the test."""
    running: list[Cluster] = []
    stack = AsyncExitStack()

    async def _start(
        system: str | System = "static",
        instances: int = 2,
        step_s: float = 0.0,
        context: int = 1 << 20,
        capabilities: Capabilities = ABLE,
        fixed: dict[str, Role] | None = None,
        settings: GatewaySettings = DEFAULTS,
        forced: Forced = NOT_FORCED,
    ) -> Cluster:
        engines = {f"i{n}": FakeEngine(f"i{n}", step_s) for n in range(instances)}
        for engine in engines.values():
            engine.keep_bodies = True
        fleet = GivenFleet(
            {n: await e.start() for n, e in engines.items()}, profile=profile(), context=context
        )
        fleet.capabilities = capabilities
        fleet.fixed = fixed or {}
        settings = replace(settings, port=0, journal=tmp_path / "journal.jsonl")
        composed = make_system(system) if isinstance(system, str) else system
        gateway = Gateway(settings, fleet, composed)
        url = await gateway.start()
        await stack.enter_async_context(chaos(gateway.dispatcher, forced))
        client = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        running.append(Cluster(gateway, fleet, engines, url, client))
        return running[-1]

    async with stack:
        yield _start
    for cluster in running:
        await cluster.client.close()
        await cluster.gateway.stop()
        for engine in cluster.engines.values():
            await engine.stop()

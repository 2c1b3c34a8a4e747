"""A gateway over fake engines, in one event loop, over real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
import orjson

from tidegate.core.instance import Role
from tidegate.fleet.member import Capabilities
from tidegate.gateway.run import Gateway
from tidegate.gateway.settings import GatewaySettings
from tidegate.systems import System
from tidegate_testing.chaos import NOT_FORCED, Forced
from tidegate_testing.fake_engine import FakeEngine
from tidegate_testing.members import GivenFleet

Json = dict[str, Any]
DEFAULTS = GatewaySettings()
ABLE = Capabilities()


@dataclass
class Cluster:
    """What a test holds on to."""

    gateway: Gateway
    fleet: GivenFleet
    engines: dict[str, FakeEngine]
    url: str
    client: aiohttp.ClientSession

    async def post(self, path: str, body: Json | bytes, **headers: str) -> tuple[int, Any, Any]:
        """POST and return (status, decoded body, headers)."""
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        async with self.client.post(self.url + path, data=data, headers=headers) as response:
            return response.status, orjson.loads(await response.read()), response.headers

    async def stream(self, body: Json, path: str = "/v1/completions") -> list[Json]:
        """POST a streamed request and return its events; the last must be [DONE] unless one is an error."""
        events: list[Json] = []
        async with self.client.post(self.url + path, data=orjson.dumps(body | {"stream": True})) as response:
            assert response.status == 200, await response.text()
            raw = await response.read()
        payloads = [line[6:] for line in raw.split(b"\n") if line.startswith(b"data: ")]
        events = [orjson.loads(p) for p in payloads if p != b"[DONE]"]
        assert (payloads[-1] == b"[DONE]") != any("error" in e for e in events)
        return events

    def streams(self) -> int:
        """How many streams the engines are serving now."""
        return sum(len(e.streams) for e in self.engines.values())

    def live(self) -> int:
        """How many requests the ledger holds."""
        return len(self.gateway.dispatcher.plane.snapshot(0.0).requests.ids)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop run until ``condition`` holds; fails after 10 s."""
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0)


class Start(Protocol):
    """Starts a cluster, which ends with the test."""

    async def __call__(
        self,
        system: str | System = "static",
        instances: int = 2,
        step_s: float = 0.0,
        context: int = 1 << 20,
        capabilities: Capabilities = ABLE,
        fixed: dict[str, Role] | None = None,
        settings: GatewaySettings = DEFAULTS,
        forced: Forced = NOT_FORCED,
    ) -> Cluster:
        """Run ``instances`` fake engines and a gateway, on a free port and with the test's journal."""
        ...

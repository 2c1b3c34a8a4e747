"""Real engines: processes, tensors, KV moving between them, real HTTP in front."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from tidegate.fleet.processes import EngineLaunch, LocalFleet
from tidegate.gateway.run import Gateway
from tidegate.gateway.settings import GatewaySettings
from tidegate.systems import System, make_system
from tidegate_testing.chaos import NOT_FORCED, Forced, chaos

Json = dict[str, Any]
DEFAULTS = GatewaySettings(admission=0.0)


@dataclass
class Live:
    """A running cluster."""

    gateway: Gateway
    url: str
    client: aiohttp.ClientSession
    tokens_seen: int = 0
    watchers: list[Callable[[], None]] = field(default_factory=list)

    async def stream(self, body: Json, headers: dict[str, str] | None = None) -> tuple[list[int], str]:
        """Stream a completion, or a chat if there are messages; return token ids and text of a clean end."""
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        ids: list[int] = []
        text: list[str] = []
        ended = False
        body = body | {"stream": True, "return_token_ids": True}
        async with self.client.post(self.url + path, data=orjson.dumps(body), headers=headers) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    ended = True
                    continue
                event = orjson.loads(line[6:])
                assert "error" not in event, event
                choice = event["choices"][0]
                new = choice.get("token_ids", [])
                ids += new
                text.append(choice["delta"].get("content", "") if "delta" in choice else choice["text"])
                self.tokens_seen += len(new)
                for watch in self.watchers:
                    watch()
        assert ended
        return ids, "".join(text)

    def kill_one(self, rng: random.Random) -> str:
        """SIGKILL a random instance that is up; returns its name."""
        name = rng.choice(sorted(self.gateway.dispatcher.upstreams))
        pid = self.gateway.dispatcher.upstreams[name].member.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        return name

    async def engine_stats(self) -> dict[str, Json]:
        """Return every instance's own statistics."""
        stats = {}
        for name, upstream in self.gateway.dispatcher.upstreams.items():
            headers = {"x-tidegate-secret": upstream.member.secret}
            async with self.client.get(upstream.member.url + "/tidegate/stats", headers=headers) as response:
                assert response.status == 200
                stats[name] = await response.json()
        return stats

    async def until(self, condition: Callable[[], bool], within_s: float = 60.0) -> None:
        """Wait until ``condition`` holds."""
        async with asyncio.timeout(within_s):
            while not condition():
                await asyncio.sleep(0.02)

    async def until_drained(self) -> None:
        """Wait until every instance has all its blocks back; its integrity check has passed then."""
        async with asyncio.timeout(45):
            while True:
                stats = await self.engine_stats()
                if all(s["free_blocks"] == s["total_blocks"] for s in stats.values()):
                    return
                await asyncio.sleep(0.1)


@asynccontextmanager
async def cluster(
    model: Path,
    system: str | System,
    *,
    instances: int = 3,
    most: int | None = None,
    dtype: str = "auto",
    settings: GatewaySettings = DEFAULTS,
    forced: Forced = NOT_FORCED,
    kv_memory_mb: int = 64,
) -> AsyncIterator[Live]:
    """Run a gateway over ``instances`` embedded engines."""
    launch = EngineLaunch(model=model, instances=instances, most=most, dtype=dtype, kv_memory_mb=kv_memory_mb)
    made = make_system(system) if isinstance(system, str) else system
    gateway = Gateway(replace(settings, port=0), LocalFleet(launch), made)
    try:
        url = await gateway.start()
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
            chaos(gateway.dispatcher, forced),
        ):
            yield Live(gateway, url, client)
    finally:
        await gateway.stop()

"""Two tenants, each with a key of its own, and classes, over HTTP in front of one emulated instance."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from tests.emulated.emulated_gateway import gateway
from tidegate.fleet.emulated import EmulatedLaunch
from tidegate.gateway.run import Gateway
from tidegate.gateway.settings import GatewaySettings
from tidegate.policies.shares import parse_shares

ONE = EmulatedLaunch(("h100_sxm/llama-3.1-8b:1",), max_batch_tokens=4096)
TOKENS = 4000
"""Of a prompt that takes a tenth of a second, and most of a step's budget."""
FIRST_TOKENS = 60_000
"""Of a prompt that runs for seconds while all others come."""
KEYS = {"k-heavy": "heavy", "k-light": "light"}


async def first_in(running: Gateway, count: int) -> None:
    plane, clock = running.dispatcher.plane, running.dispatcher.clock
    async with asyncio.timeout(30):
        while plane.snapshot(clock.now()).prefill_requests.sum() < count:
            await asyncio.sleep(0.005)


class Senders:
    """Sends prompts of which no two share a beginning, and notes in which order the answers came."""

    def __init__(self, url: str, client: aiohttp.ClientSession) -> None:
        self._url = url
        self._client = client
        self._sent = 0
        self.answered: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    def send(self, name: str, key: str, tokens: int = TOKENS, **more: Any) -> None:
        self._sent += 1
        body = {"prompt": [self._sent] * tokens, "max_tokens": 1} | more
        self.tasks.append(asyncio.create_task(self._post(name, body, key)))

    async def _post(self, name: str, body: dict[str, Any], key: str) -> None:
        headers = {"Authorization": f"Bearer {key}", "x-slo-ttft-ms": "100000"}
        async with self._client.post(self._url + "/v1/completions", json=body, headers=headers) as response:
            assert response.status == 200, await response.text()
        self.answered.append(name)

    async def ten(self, running: Gateway, name: str, key: str) -> None:
        """Send one that runs for seconds, and nine that wait behind it."""
        self.send(name, key, FIRST_TOKENS)
        await first_in(running, 1)
        for _ in range(9):
            self.send(name, key)
        await first_in(running, 10)


async def served(shares: list[str], light: dict[str, Any]) -> list[str]:
    """Return whose answers came, in that order: ten prompts of one tenant wait when three of another come."""
    settings = GatewaySettings(admission=0.0, tenants=KEYS, shares=parse_shares(shares))
    async with gateway("tidegate", launch=ONE, settings=settings) as (running, url, client):
        senders = Senders(url, client)
        await senders.ten(running, "heavy", "k-heavy")
        for _ in range(3):
            senders.send("light", "k-light", **light)
        await asyncio.gather(*senders.tasks)
        return senders.answered


async def test_a_tenant_with_few_requests_does_not_wait_behind_one_with_many() -> None:
    assert (await served(["*=1"], {}))[-2:] == ["heavy"] * 2, "by turns"
    assert (await served([], {}))[-3:] == ["light"] * 3, "without shares it does"


async def test_a_tenant_may_go_behind_the_others_and_not_before_them() -> None:
    assert (await served([], {"priority": 1}))[-3:] == ["light"] * 3
    assert (await served([], {"priority": -1}))[-1] == "light"


async def test_the_operators_priorities_are_taken_as_they_are() -> None:
    settings = GatewaySettings(admission=0.0, api_key="op")
    async with gateway("tidegate", launch=ONE, settings=settings) as (running, url, client):
        senders = Senders(url, client)
        await senders.ten(running, "plain", "op")
        senders.send("urgent", "op", priority=-5)
        await asyncio.gather(*senders.tasks)
    assert senders.answered[-2:] == ["plain"] * 2

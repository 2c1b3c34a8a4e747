"""Two tenants, each with a key of its own, and classes, over HTTP in front of one emulated instance."""

from __future__ import annotations

import asyncio
from math import ceil
from typing import Any

import aiohttp

from tests.emulated.emulated_gateway import gateway
from tidegate.costs.named_profile import load_profile
from tidegate.fleet.emulated import EmulatedLaunch
from tidegate.gateway.run import Gateway
from tidegate.gateway.settings import GatewaySettings
from tidegate.policies.shares import parse_shares

ONE = EmulatedLaunch(("h100_sxm/llama-3.1-8b:1",))
TOKENS = 8000
"""Of a prompt that takes a few tenths of a second, and most of a step's budget."""
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

    def send(self, name: str, key: str, **more: Any) -> None:
        self._sent += 1
        body = {"prompt": [self._sent] * TOKENS, "max_tokens": 1} | more
        self.tasks.append(asyncio.create_task(self._post(name, body, {"Authorization": f"Bearer {key}"})))

    async def _post(self, name: str, body: dict[str, Any], headers: dict[str, str]) -> None:
        async with self._client.post(self._url + "/v1/completions", json=body, headers=headers) as response:
            assert response.status == 200, await response.text()
        self.answered.append(name)


async def served(shares: list[str], light: dict[str, Any]) -> list[str]:
    """Return whose answers came, in that order: ten prompts of one tenant wait when three of another come."""
    settings = GatewaySettings(admission=0.0, tenants=KEYS, shares=parse_shares(shares))
    async with gateway("tidegate", launch=ONE, settings=settings) as (running, url, client):
        senders = Senders(url, client)
        for _ in range(10):
            senders.send("heavy", "k-heavy")
        await first_in(running, 10)
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
        for _ in range(10):
            senders.send("plain", "op")
        await first_in(running, 10)
        senders.send("urgent", "op", priority=-5)
        await asyncio.gather(*senders.tasks)
    assert senders.answered[-2:] == ["plain"] * 2


async def test_a_refused_request_that_comes_back_when_told_is_taken() -> None:
    """One prompt runs, one behind it is just in time, and the refused one would go before that."""
    settings = GatewaySettings(admission=3.0)
    async with gateway("tidegate", launch=ONE, settings=settings) as (running, url, client):
        cost = load_profile("h100_sxm/llama-3.1-8b").profile
        first_s, second_s, third_s = (cost.prefill_s(tokens, 0) for tokens in (20_000, 24_000, 22_000))

        async def post(tokens: int, ttft_s: float) -> tuple[int, int]:
            body = {"prompt": [tokens] * tokens, "max_tokens": 1}
            headers = {"x-slo-ttft-ms": str(1000 * ttft_s)}
            async with client.post(url + "/v1/completions", json=body, headers=headers) as response:
                await response.read()
                return response.status, int(response.headers.get("Retry-After", 0))

        waiting = [asyncio.create_task(post(20_000, 2 * first_s))]
        await first_in(running, 1)
        waiting.append(asyncio.create_task(post(24_000, first_s + second_s + third_s / 2)))
        await first_in(running, 2)
        status, again_s = await post(22_000, 100.0)
        assert status == 429 and 1 <= again_s <= ceil(first_s + second_s)
        await asyncio.sleep(again_s)
        assert (await post(22_000, 100.0))[0] == 200
        assert [status for status, _ in await asyncio.gather(*waiting)] == [200, 200]

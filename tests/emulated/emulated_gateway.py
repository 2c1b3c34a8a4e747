"""A gateway over a process of emulated instances, and streams through it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import aiohttp
import orjson

from tidegate.fleet.emulated import EmulatedFleet, EmulatedLaunch
from tidegate.gateway.run import Gateway
from tidegate.gateway.settings import GatewaySettings
from tidegate.systems import make_system
from tidegate_testing.chaos import NOT_FORCED, Forced, chaos

GROUP = "h100_sxm/llama-3.1-8b:3"
LAUNCH = EmulatedLaunch((GROUP,))


@asynccontextmanager
async def gateway(
    system: str,
    forced: Forced = NOT_FORCED,
    launch: EmulatedLaunch = LAUNCH,
    settings: GatewaySettings | None = None,
) -> AsyncIterator[tuple[Gateway, str, aiohttp.ClientSession]]:
    """Run a gateway over emulated instances, three unless ``launch`` says otherwise."""
    fleet = EmulatedFleet(launch)
    running = Gateway(replace(settings or GatewaySettings(), port=0), fleet, make_system(system))
    try:
        url = await running.start()
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
            chaos(running.dispatcher, forced),
        ):
            yield running, url, client
    finally:
        await running.stop()


async def stream(client: aiohttp.ClientSession, url: str, prompt: list[int], count: int) -> list[int]:
    """Return the tokens of a stream that ends well."""
    body = {"prompt": prompt, "max_tokens": count, "stream": True, "return_token_ids": True, "temperature": 0}
    ids: list[int] = []
    async with client.post(url + "/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        lines = [line.strip() async for line in response.content if line.startswith(b"data: ")]
    assert lines[-1] == b"data: [DONE]"
    for line in lines[:-1]:
        event = orjson.loads(line[6:])
        assert "error" not in event, event
        ids += event["choices"][0].get("token_ids", [])
    return ids

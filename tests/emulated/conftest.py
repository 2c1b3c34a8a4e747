"""Emulated instances in this process, on real ports."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from tidegate.dataplane.roster import parse_groups, replicas_in
from tidegate.engines.emulated.instances import EmulatedInstances
from tidegate.engines.serving.secret import LaunchSecret

PROFILE = "h100_sxm/llama-3.1-8b"
Json = dict[str, Any]


class Two:
    """Two emulated instances over HTTP."""

    def __init__(self, client: aiohttp.ClientSession, instances: EmulatedInstances) -> None:
        self.client = client
        self.instances = instances
        self.urls = [f"http://127.0.0.1:{ready['port']}" for ready in instances.announcement()["instances"]]

    async def complete(self, at: int, prompt: list[int] | str, max_tokens: int, **more: Any) -> Json:
        body = {"prompt": prompt, "max_tokens": max_tokens, "return_token_ids": True, **more}
        async with self.client.post(self.urls[at] + "/v1/completions", json=body) as answer:
            value: Json = await answer.json()
            assert answer.status == 200, value
            return value

    async def stats(self, at: int) -> Json:
        async with self.client.get(self.urls[at] + "/tidegate/stats") as answer:
            value: Json = await answer.json()
            return value


@pytest.fixture
def two() -> Callable[[], Any]:
    @asynccontextmanager
    async def serve() -> AsyncIterator[Two]:
        groups = parse_groups([f"{PROFILE}:2"])
        instances = EmulatedInstances(replicas_in(groups), groups[0].packaged.model, LaunchSecret())
        await instances.start([socket.create_server(("127.0.0.1", 0)) for _ in range(2)])
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
            yield Two(client, instances)
        await instances.stop(0.0)

    return serve

"""Emulated instances in this process, on real ports."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp

from tidegate.engines.emulated.instances import EmulatedInstances

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


OfTwo = Callable[[], AbstractAsyncContextManager[Two]]

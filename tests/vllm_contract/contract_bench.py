"""A gateway in front of servers that do to a careless router what vLLM does, and a client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from tests.vllm_contract.strict_vllm import MODEL, Network, StrictVllm, generate, prompt_of
from tidegate.fleet.health import HealthPace
from tidegate.fleet.static import StaticFleet, StaticPace
from tidegate.fleet.vllm import KvSetup
from tidegate.gateway.run import Gateway
from tidegate.gateway.settings import GatewaySettings
from tidegate.protocol.parameters import GUARDABLE
from tidegate.systems import make_system
from tidegate_testing import profile
from tidegate_testing.chaos import NOT_FORCED, Forced, chaos

Json = dict[str, Any]
Answer = tuple[list[int], str, str | None]


@dataclass
class Bench:
    """A gateway, its servers, and a client."""

    gateway: Gateway
    servers: list[StrictVllm]
    url: str
    client: aiohttp.ClientSession

    async def ask(
        self,
        body: Json,
        each: Callable[[str, int], None] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Return ids, text and finish reason; ``each`` is told the request and how many tokens came."""
        ids: list[int] = []
        text, reason = "", None
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        sent = {"model": MODEL, "temperature": 0, "return_token_ids": True, **body}
        async with self.client.post(self.url + path, data=orjson.dumps(sent), headers=headers) as response:
            raw = [line async for line in response.content] if sent.get("stream") else []
            events = [orjson.loads(line[6:]) for line in raw if line.startswith(b"data: {")]
            for event in events or [orjson.loads(await response.read())]:
                assert "error" not in event, event
                for choice in event["choices"]:
                    part = choice.get("delta") or choice.get("message") or choice
                    text += part.get("content" if part is not choice else "text") or ""
                    ids += choice.get("token_ids") or []
                    reason = choice["finish_reason"] or reason
        return ids, text, reason

    async def refused(self, body: Json) -> tuple[int, Json, int]:
        """Return the status and the error of an answer that has one, and how many events came before it."""
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        async with self.client.post(self.url + path, data=orjson.dumps({"model": MODEL} | body)) as response:
            raw = await response.read()
        lines = [line.removeprefix(b"data: ") for line in raw.splitlines() if line.strip()]
        assert b"[DONE]" not in lines, raw
        error: Json = orjson.loads(lines[-1])["error"]
        return response.status, error, len(lines) - 1

    def metric(self, name: str, **labels: str) -> float:
        value = self.gateway.dispatcher.metrics.registry.get_sample_value(name, labels)
        return value or 0.0

    def breaches(self) -> list[str]:
        return [breach for server in self.servers for breach in server.breaches]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def bench(
    system: str = "static",
    *,
    lease_s: float = 30.0,
    bidirectional: bool = True,
    forced: Forced = NOT_FORCED,
) -> AsyncIterator[Bench]:
    network = Network()
    servers = [StrictVllm(network, lease_s=lease_s, bidirectional=bidirectional) for _ in range(3)]
    for server in servers:
        await server.start()
    fleet = StaticFleet(
        [server.url for server in servers],
        profiles=[profile()],
        kv=KvSetup("nixl", lease_s=lease_s, bidirectional=bidirectional),
        pace=StaticPace(HealthPace(every_s=0.2), retry_s=0.05),
    )
    gateway = Gateway(
        GatewaySettings(port=0, connect_s=10.0, head_after_s=60.0, allow_fields=tuple(GUARDABLE)),
        fleet,
        make_system(system),
    )
    url = await gateway.start()
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
            chaos(gateway.dispatcher, forced),
        ):
            yield Bench(gateway, servers, url, client)
    finally:
        await gateway.stop()
        for server in servers:
            await server.stop()


def alone(body: Json) -> Answer:
    """Return what one server says."""
    pieces = list(generate(prompt_of(body), body["max_tokens"], body))
    ids = [token for piece in pieces for token in piece.ids]
    text, stop = "".join(piece.text for piece in pieces), pieces[-1].stop
    if stop is not None and not body.get("include_stop_str_in_output"):
        text = text.removesuffix(stop)
    return ids, text, pieces[-1].reason

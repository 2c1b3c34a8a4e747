"""The gateway in front of servers that do to a careless router what vLLM does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
import pytest

from tests.vllm_contract.strict_vllm import BLOCK, MODEL, Network, StrictVllm, generate, prompt_of
from tidegate.core.decision import Migrate
from tidegate.engines.vllm.connector import MARGIN_S
from tidegate.fleet.health import HealthPace
from tidegate.fleet.static import StaticFleet, StaticPace
from tidegate.fleet.vllm import KvSetup
from tidegate.gateway.run import Gateway
from tidegate.gateway.settings import GatewaySettings
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
    gateway = Gateway(GatewaySettings(port=0, connect_s=10.0), fleet, make_system(system))
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


def mixed(chance: random.Random) -> Json:
    length = chance.randint(1, 150)
    body: Json = {"max_tokens": chance.choice((1, chance.randint(2, 70))), "stream": chance.random() < 0.6}
    if chance.random() < 0.4:
        body["messages"] = [{"role": "user", "content": "".join(chance.choices("tide 漢é", k=length))}]
    else:
        body["prompt"] = [chance.randrange(18) for _ in range(length)]
    if chance.random() < 0.5:
        body |= {"stop": chance.sample(["tide", "de", " a", "漢字t", "b,", "é"], 2)}
        body |= {"include_stop_str_in_output": chance.random() < 0.5}
        body |= {"min_tokens": chance.randint(0, min(20, body["max_tokens"]))}
    return body


async def test_whatever_moves_the_answers_are_those_of_one_server_and_nothing_stays_pinned() -> None:
    chance = random.Random(7)
    bodies = [mixed(chance) for _ in range(80)]
    async with bench("arrow-lending", forced=Forced(migrate_every_s=0.003, flip_every_s=0.05)) as it:
        answers = await asyncio.gather(*(it.ask(body) for body in bodies))
        for body, said in zip(bodies, answers, strict=True):
            assert said == alone(body), body
        assert it.breaches() == []
        assert it.metric("tidegate_migrations_total", event="done") > 20
        assert sum(server.pulled_tokens for server in it.servers) > 1000
        await it.until(lambda: not any(server.pins for server in it.servers))


@pytest.mark.parametrize("tokens", [31, 32, 33, 63, 64, 65])
async def test_decodes_move_at_every_position(tokens: int) -> None:
    body: Json = {"prompt": [n % 12 for n in range(tokens)], "max_tokens": 40, "stream": True}
    async with bench() as it:
        dispatcher = it.gateway.dispatcher
        plane = dispatcher.plane
        task = asyncio.create_task(it.ask(body))
        while not task.done():
            for request, live in list(plane.requests.items()):
                src = live.decode_on or live.prefill_on
                dst = next(name for name in plane.ledger.ids if name != src)
                if src is not None:
                    dispatcher.act([Migrate(request, src, dst, "told so")])
            await asyncio.sleep(0)
        assert await task == alone(body)
        assert it.breaches() == []
        held = {
            kv["remote_num_tokens"] % BLOCK
            for server in it.servers
            for body in server.bodies
            if "remote_num_tokens" in (kv := body.get("kv_transfer_params") or {})
        }
        assert {BLOCK - 1, 0, 1} & held and len(held) > 3


async def test_a_handle_is_not_used_near_the_end_of_its_lease() -> None:
    body: Json = {"prompt": [1] * 100, "max_tokens": 20}
    async with bench(lease_s=MARGIN_S) as it:
        assert await it.ask(body) == alone(body)
        assert it.metric("tidegate_kv_handles_refused_total", reason="expired") == 1
        assert it.breaches() == [] and not any(server.pulled_tokens for server in it.servers)


async def test_a_pull_from_a_dead_engine_is_tried_again_without_it_and_the_engine_comes_back() -> None:
    body: Json = {"prompt": [2] * 100, "max_tokens": 20, "stream": True}
    async with bench() as it:
        prefills = next(
            n for n, role in it.gateway.dispatcher.plane.membership.labels.items() if role.label == "prefill"
        )
        victim = it.servers[int(prefills[1:])]
        ended: list[asyncio.Task[None]] = []
        victim.on_pin = lambda: ended.append(asyncio.ensure_future(victim.stop()))
        assert await it.ask(body) == alone(body)
        victim.on_pin = None
        await it.until(lambda: prefills not in it.gateway.dispatcher.upstreams)
        dead = victim.engine_id
        await asyncio.gather(*ended)
        for server in it.servers:
            del server.bodies[:]
        await victim.start()
        await it.until(lambda: prefills in it.gateway.dispatcher.upstreams)
        assert await asyncio.gather(*(it.ask(body) for _ in range(6))) == [alone(body)] * 6
        bodies = [orjson.dumps(sent).decode() for server in it.servers for sent in server.bodies]
        assert any(victim.engine_id in sent for sent in bodies), "its new handles are used"
        assert not any(dead in sent for sent in bodies)
        assert it.breaches() == []


@pytest.mark.parametrize("bidirectional", [True, False])
async def test_a_later_round_reads_kv_back_only_from_servers_that_can(bidirectional: bool) -> None:
    chance = random.Random(1)
    history = [chance.randrange(12) for _ in range(200)]
    async with bench(bidirectional=bidirectional) as it:
        for _ in range(3):
            body: Json = {"prompt": history, "max_tokens": 70}
            said = await it.ask(body, headers={"x-session-id": "s"})
            assert said == alone(body)
            history = [*history, *said[0], *(chance.randrange(12) for _ in range(40))]
        read = [
            sent
            for server in it.servers
            for sent in server.bodies
            if (kv := sent.get("kv_transfer_params") or {}).get("do_remote_decode")
            and "remote_num_tokens" in kv
        ]
        assert bool(read) is bidirectional
        assert it.breaches() == []


async def test_nothing_of_what_a_client_says_of_kv_reaches_a_server() -> None:
    stolen = {"do_remote_prefill": True, "remote_engine_id": "theirs", "remote_request_id": "theirs"}
    fields: Json = {"vllm_xargs": {"kv_transfer_params": "theirs"}, "ec_transfer_params": {"a": "theirs"}}
    fields |= {"request_id": "theirs", "priority": -9, "session_id": "theirs", "kv_transfer_params": stolen}
    prompts: list[Json] = [{"prompt": [3] * 40}, {"messages": [{"role": "user", "content": "tide"}]}]
    async with bench() as it:
        for prompt in prompts:
            body = prompt | {"max_tokens": 8}
            assert await it.ask(body | fields) == alone(body)
        assert not any("theirs" in orjson.dumps(sent).decode() for s in it.servers for sent in s.bodies)

"""The gateway's own two-leg flights over SGLang servers: what a client reads does not tell them apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from sglang_contract import answer_to, spelled
from sglang_split import Split

from tidegate.core.instance import Instance
from tidegate.fleet.member import Capabilities, FleetListener, Member
from tidegate.gateway import scheduler
from tidegate.gateway.run import Gateway
from tidegate.gateway.settings import GatewaySettings
from tidegate.gateway.upstream import Upstream
from tidegate.systems import make_system


class Named:
    """A fleet of the servers of a split, as i0, i1, ... in their order; each has the role of its label."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self.listener: FleetListener | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._split.servers)

    async def start(self, listener: FleetListener) -> None:
        self.listener = listener
        for name, engine in self._split.engines.items():
            facts = engine.server.facts
            instance = Instance(name, facts.kv_capacity_tokens, facts.max_model_len, facts.block_tokens)
            able = Capabilities(kv_transfer=True, continues=False, orders=False)
            listener.member_up(
                Member(instance, "", facts.model, engine.engine_id, kind="sglang", capabilities=able)
            )

    def suspect(self, instance_id: str) -> None: ...

    async def stop(self) -> None: ...


@pytest.fixture
def fleet(pairs: Split) -> Named:
    """The servers as a fleet."""
    return Named(pairs)


@pytest.fixture
async def url(monkeypatch: pytest.MonkeyPatch, pairs: Split, fleet: Named) -> AsyncIterator[str]:
    """A gateway in front of the fleet."""

    def connect(member: Member, settings: GatewaySettings) -> Upstream:
        return Upstream(member, pairs.engines[member.instance.id])

    monkeypatch.setattr(scheduler, "connect", connect)
    gateway = Gateway(GatewaySettings(port=0), fleet, make_system("static"))
    yield await gateway.start()
    await gateway.stop()


@pytest.fixture
async def pairs(request: pytest.FixtureRequest) -> AsyncIterator[Split]:
    """Servers, as many as the test's parameter says, each in the role of its label."""
    split = Split()
    for n, role in enumerate(make_system("static").roles(request.param)):
        await split.add(f"i{n}", role.label)
    yield split
    await split.quiet()
    for server in split.servers.values():
        await server.down()
    assert split.fabric.violations == []


async def complete(client: aiohttp.ClientSession, url: str, **body: Any) -> Any:
    asked = {"temperature": 0, "return_token_ids": True} | body
    async with client.post(f"{url}/v1/completions", json=asked) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return answer["choices"][0]


@pytest.mark.parametrize("pairs", [2, 4], indirect=True)
async def test_answers_are_those_of_one_server(url: str, pairs: Split) -> None:
    async with aiohttp.ClientSession() as client:
        prompts = [[5 + n, 6, 8, 9 + 2 * n] for n in range(24)]
        answers = await asyncio.gather(
            *(complete(client, url, prompt=p, max_tokens=1 + n % 12) for n, p in enumerate(prompts))
        )
        for n, (prompt, choice) in enumerate(zip(prompts, answers, strict=True)):
            assert choice["token_ids"] == answer_to(prompt, 1 + n % 12)
            assert choice["text"] == spelled(choice["token_ids"]) and choice["finish_reason"] == "length"
        again = sum(
            body["rid"].endswith("-2.") for server in pairs.servers.values() for body in server.bodies
        )
        text = await complete(client, url, prompt="tide", max_tokens=5)
        assert text["token_ids"] == answer_to(list(b"tide"), 5)
        stop = spelled(answer_to([5, 6], 4)[3:])
        stopped = await complete(client, url, prompt=[5, 6], max_tokens=20, stop=[stop])
        assert stopped["text"] == spelled(answer_to([5, 6], 3)) and stopped["finish_reason"] == "stop"
    assert again == 0 or len(pairs.servers) > 2, "the room's decode server is not always the one placed"


@pytest.mark.parametrize("pairs", [4], indirect=True)
async def test_a_request_outlives_both_servers_of_its_pair(url: str, pairs: Split, fleet: Named) -> None:
    for server in pairs.servers.values():
        server.step.clear()
    async with aiohttp.ClientSession() as client:
        asking = asyncio.create_task(complete(client, url, prompt=[5, 6], max_tokens=9))
        async with asyncio.timeout(30.0):
            while not (busy := [name for name, server in pairs.servers.items() if server.running])[1:]:
                await asyncio.sleep(0.01)
        for name in busy:
            await pairs.servers[name].down()
            assert fleet.listener is not None
            fleet.listener.member_down(name, "killed")
        for server in pairs.servers.values():
            server.step.set()
        assert (await asking)["token_ids"] == answer_to([5, 6], 9)

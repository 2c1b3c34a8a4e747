"""What is refused, or told, before and after a measurement."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from tidegate.core.errors import ConfigError
from tidegate.engines.vllm.client import VllmClient
from tidegate.profiling import run
from tidegate.profiling.run import ProbeSettings, _interference, hardware_name, measure


class Server:
    """A server as far as it is asked before the first probe."""

    def __init__(self) -> None:
        self.model = "m"
        self.running = 0
        self.prompt_tokens = 0
        self.url = ""

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": self.model, "max_model_len": 1024}]})

    async def metrics(self, _: web.Request) -> web.Response:
        lines = [
            f'vllm:num_requests_running{{engine="0"}} {self.running}.0',
            'vllm:num_requests_waiting{engine="0"} 0.0',
            f'vllm:prompt_tokens_total{{engine="0"}} {self.prompt_tokens}.0',
        ]
        return web.Response(text="\n".join(lines) + "\n")


@pytest.fixture
async def servers(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Server]]:
    monkeypatch.setattr(run, "BUSY_PAUSE_S", 0.0)
    servers, runners = [Server(), Server()], []
    for server in servers:
        app = web.Application()
        app.add_routes([web.get("/v1/models", server.models), web.get("/metrics", server.metrics)])
        runner = web.AppRunner(app)
        runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield servers
    for runner in runners:
        await runner.cleanup()


async def refusal(urls: list[str], *, busy: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        await measure(ProbeSettings(urls, busy=busy), lambda share, what, fresh: None)
    return caught.value.message


async def test_a_busy_instance_is_refused_unless_it_is_wanted(servers: list[Server]) -> None:
    one, other = servers
    other.running = 2
    told = await refusal([one.url, f"{other.url}/v1"])
    assert told.startswith(f"not idle: {other.url};") and "--busy" in told
    assert "not idle" not in await refusal([one.url, other.url], busy=True)


async def test_instances_of_two_models_and_one_given_twice_are_refused(servers: list[Server]) -> None:
    one, other = servers
    other.model = "n"
    assert "one model; these serve m, n" in await refusal([one.url, other.url])
    assert "more than once" in await refusal([one.url, f"{one.url}/"])


async def test_prompts_of_others_are_told(servers: list[Server]) -> None:
    servers[0].prompt_tokens = 1500
    async with aiohttp.ClientSession() as session:
        client = VllmClient(session, servers[0].url)
        assert await _interference(client, 500, 1000) == []
        (note,) = await _interference(client, 0, 1000)
        assert "500 prompt tokens of others" in note
        assert await _interference(client, None, 1000) == []


def test_hardware_is_known_only_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_gpu", lambda: "NVIDIA H100")
    assert hardware_name("http://localhost:1") == hardware_name("http://127.0.0.1:1") == "NVIDIA H100"
    assert hardware_name("http://gpu1:8000") == ""
    monkeypatch.setattr(run, "_gpu", str)
    assert hardware_name("http://[::1]:1") == run._cpu()

"""Promises of VllmClient: every call ends, and what goes wrong is an error that names the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from tidegate.core.errors import EngineFault, EngineTimeout, EngineUnreachable, SetupError
from tidegate.engines.vllm.client import ServerFacts, VllmClient
from tidegate.protocol.chunks import error_text

MODELS = {"data": [{"id": "m", "max_model_len": 1024}, {"id": "adapter"}]}


class Script:
    """Answers by path, as ``status, text``; hangs on other paths. ``seen`` has the last request's headers."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, str]] = {}
        self.seen: dict[str, str] = {}
        self.body: object = None

    async def handle(self, request: web.Request) -> web.Response:
        self.seen = dict(request.headers)
        if request.can_read_body:
            self.body = await request.json()
        if request.path not in self.answers:
            await asyncio.Event().wait()
        status, text = self.answers[request.path]
        return web.Response(status=status, text=text)


@pytest.fixture
async def script() -> Script:
    return Script()


@pytest.fixture
async def client(script: Script) -> AsyncIterator[VllmClient]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", script.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession() as session:
        yield VllmClient(session, url, instance="i3", api_key="sk", deadline_s=5.0)
    await runner.cleanup()


async def test_a_server_that_hangs_or_is_away_is_named(client: VllmClient) -> None:
    client.deadline_s = 0.05
    with pytest.raises(EngineTimeout, match="/health has no answer after") as late:
        await client.healthy()
    client.url = "http://127.0.0.1:9"
    with pytest.raises(EngineUnreachable, match="no connection") as away:
        await client.healthy()
    assert away.value.refused and late.value.instance == away.value.instance == "i3"


async def test_an_error_is_told_in_the_servers_words(client: VllmClient, script: Script) -> None:
    script.answers["/v1/completions"] = (400, '{"error": {"message": "too\\nlong", "code": 400}}')
    reply = await client.complete([1, 2], 3, salt="s")
    assert reply.error == "HTTP 400: too long" and reply.kv_params is None
    with pytest.raises(EngineFault, match="HTTP 400: too long"):
        reply.new_tokens()
    assert await client.decline({"remote_block_ids": [[1]]})
    script.answers["/v1/completions"] = (200, '{"choices": [{"text": "x"}]}')
    with pytest.raises(EngineFault, match="return_token_ids"):
        (await client.complete([1], 1)).new_tokens()
    assert not await client.decline({}), "a request that is served frees nobody's KV"
    assert script.seen["Authorization"] == "Bearer sk"


async def test_what_is_asked_for_is_greedy_and_has_its_length(client: VllmClient, script: Script) -> None:
    client.model = "m"
    script.answers["/v1/completions"] = (200, '{"choices": [{"token_ids": [7, 8]}]}')
    assert (await client.complete([1, 2], 2, kv={"a": 1})).new_tokens() == [7, 8]
    assert script.body == {
        "model": "m",
        "prompt": [1, 2],
        "max_tokens": 2,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "kv_transfer_params": {"a": 1},
    }


async def test_a_server_without_readable_metrics_has_what_vllm_guarantees(
    client: VllmClient, script: Script
) -> None:
    script.answers["/v1/models"] = (200, str(MODELS).replace("'", '"'))
    for page in ((404, ""), (200, 'vllm:num_requests_running{engine="0"')):
        script.answers["/metrics"] = page
        facts = await client.facts()
        assert facts == ServerFacts(("m", "adapter"), 1024)
        assert (facts.model, facts.block_tokens, facts.kv_capacity_tokens) == ("m", 16, 1024)
        with pytest.raises(EngineFault, match="/metrics"):
            await client.metrics()


@pytest.mark.parametrize(
    ("status", "error"), [(401, SetupError), (404, SetupError), (500, EngineFault), (503, EngineFault)]
)
async def test_only_what_may_pass_is_worth_asking_again(
    client: VllmClient, script: Script, status: int, error: type[Exception]
) -> None:
    script.answers["/v1/models"] = (status, "")
    with pytest.raises(error):
        await client.facts()


def test_errors_are_read_in_any_form_that_servers_use() -> None:
    assert error_text({"error": {"message": "a"}}) == error_text({"error": "a"}) == "a"
    assert error_text({"message": "b"}) == "b"
    assert error_text({}, "HTTP 500") == error_text({"error": {"code": 1}}, "HTTP 500") == "HTTP 500"

"""Bad input gets an OpenAI-style 4xx that names the field; nothing of it reaches an engine."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import pytest

from tests.gateway.gateway_cluster import Start
from tidegate.gateway.settings import GatewaySettings

GOOD = {"prompt": [1, 2, 3], "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}

WRONG: list[tuple[str, Any, int, str | None]] = [
    ("/v1/completions", b'{"prompt": [1,', 400, None),
    ("/v1/completions", b"\xff\xfe\x00", 400, None),
    ("/v1/completions", b'{"prompt": "\xff"}', 400, None),
    ("/v1/completions", b"[1, 2]", 400, None),
    ("/v1/completions", b'{"prompt": "a", "x": ' + b"[" * 300 + b"]" * 300 + b"}", 400, None),
    ("/v1/completions", b'{"prompt": "a", "x": ' + b'{"a":' * 300 + b"1" + b"}" * 301, 400, None),
    ("/v1/completions", b"", 400, None),
    ("/v1/completions", {}, 400, "prompt"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": [1, -2]}, 400, "prompt"),
    ("/v1/completions", {"prompt": {"text": "x"}}, 400, "prompt"),
    ("/v1/completions", GOOD | {"max_tokens": -1}, 400, "max_tokens"),
    ("/v1/completions", GOOD | {"max_tokens": 0}, 400, "max_tokens"),
    ("/v1/completions", GOOD | {"max_tokens": "many"}, 400, "max_tokens"),
    ("/v1/completions", GOOD | {"max_tokens": 1.5}, 400, "max_tokens"),
    ("/v1/completions", GOOD | {"max_tokens": 1e300}, 400, "max_tokens"),
    ("/v1/completions", GOOD | {"max_tokens": "3"}, 400, "max_tokens"),
    ("/v1/completions", GOOD | {"max_tokens": True}, 400, "max_tokens"),
    ("/v1/completions", GOOD | {"temperature": "hot"}, 400, "temperature"),
    ("/v1/completions", GOOD | {"temperature": -1}, 400, "temperature"),
    ("/v1/completions", GOOD | {"top_p": 0}, 400, "top_p"),
    ("/v1/completions", GOOD | {"n": 0}, 400, "n"),
    ("/v1/completions", GOOD | {"prompt": [[1], [2]], "n": 1000}, 400, "n"),
    ("/v1/completions", GOOD | {"n": 2, "best_of": 3}, 400, "best_of"),
    ("/v1/completions", GOOD | {"prompt": ["a", [1]]}, 400, "prompt"),
    ("/v1/completions", GOOD | {"prompt": [[1], []]}, 400, "prompt"),
    ("/v1/completions", GOOD | {"prompt": [[[1]]]}, 400, "prompt"),
    ("/v1/completions", GOOD | {"echo": True, "max_tokens": 0}, 400, "echo"),
    ("/v1/completions", GOOD | {"min_tokens": 9}, 400, "min_tokens"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 20_000}, 400, "messages"),
    ("/v1/completions", GOOD | {"stop": [1]}, 400, "stop"),
    ("/v1/completions", GOOD | {"stream": "yes"}, 400, "stream"),
    ("/v1/completions", GOOD | {"seed": "x"}, 400, "seed"),
    ("/v1/completions", GOOD | {"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ("/v1/completions", GOOD | {"stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x"),
    ("/v1/completions", GOOD | {"temprature": 1.0}, 400, "temprature"),
    ("/v1/completions", GOOD | {"truncate_prompt_tokens": 2}, 400, "truncate_prompt_tokens"),
    ("/v1/completions", GOOD | {"prompt_embeds": "AAAA"}, 400, "prompt_embeds"),
    ("/v1/completions", GOOD | {"use_beam_search": True}, 400, "use_beam_search"),
    ("/v1/completions", GOOD | {"vllm_xargs": "x"}, 400, "vllm_xargs"),
    ("/v1/completions", GOOD | {"model": "gpt-17"}, 404, "model"),
    ("/v1/completions", GOOD | {"model": 3}, 400, "model"),
    ("/v1/completions", {"prompt": [1] * 90, "max_tokens": 20}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": [1] * 200, "max_tokens": 2}, 400, "prompt"),
    ("/v1/chat/completions", {}, 400, "messages"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": "hi"}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"content": "hi"}]}, 400, "messages.0.role"),
    ("/v1/chat/completions", CHAT | {"top_logprobs": 3}, 400, "top_logprobs"),
    ("/v1/embeddings", GOOD, 404, None),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda c: f"{c[0].rsplit('/', 1)[1]}-{str(c[1])[:40]}")
async def test_wrong_bodies(start: Start, case: tuple[str, Any, int, str | None]) -> None:
    path, body, status, param = case
    cluster = await start("static", context=100)
    got, answer, _ = await cluster.post(path, body)
    assert got == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["param"] == param
    assert "Traceback" not in answer["error"]["message"]
    assert all(not e.bodies for e in cluster.engines.values())
    assert cluster.live() == 0


async def test_a_text_prompt_that_turns_out_too_long_is_refused_and_its_kv_released(start: Start) -> None:
    cluster = await start("static", context=100)
    status, answer, _ = await cluster.post("/v1/completions", {"prompt": "x" * 95, "max_tokens": 20})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    await cluster.until(lambda: not cluster.engines["i0"].pinned)
    assert cluster.engines["i0"].released


async def test_bodies_that_json_libraries_write(start: Start) -> None:
    cluster = await start("static")
    text = '{"prompt": "caf\u00e9", "max_tokens": 3.0, "top_k": 5.0, "temperature": 0}'
    for body in (text.encode(name) for name in ("utf-8", "utf-8-sig", "utf-16")):
        status, answer, _ = await cluster.post("/v1/completions", body)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 3), answer
    for lists, param in ((127, "x"), (128, None), (1000, None)):
        deep = '{"prompt": "a", "max_tokens": 3, "x": ' + "[" * lists + "]" * lists + "}"
        status, answer, _ = await cluster.post("/v1/completions", deep.encode())
        assert (status, answer["error"]["param"]) == (400, param), "128 levels are read, then refused by name"


async def test_headers_that_are_not_numbers(start: Start) -> None:
    cluster = await start("static")
    for value in ("fast", "-3", "nan"):
        status, answer, _ = await cluster.post("/v1/completions", GOOD, **{"x-slo-ttft-ms": value})
        assert (status, answer["error"]["param"]) == (400, "x-slo-ttft-ms")


async def test_a_body_of_50_mb_is_refused_before_it_is_read(start: Start) -> None:
    cluster = await start("static")
    async with cluster.client.post(
        cluster.url + "/v1/completions", data=io.BytesIO(b" " * (50 * 2**20))
    ) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "body_too_large"


async def test_a_truncated_upload_leaves_nothing_behind(start: Start) -> None:
    cluster = await start("static")
    reader, writer = await asyncio.open_connection(*cluster.url.removeprefix("http://").split(":"))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 500\r\n\r\n" + b'{"prompt": [1'
    )
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert not cluster.gateway.dispatcher.plane.requests
    assert all(not e.bodies for e in cluster.engines.values())


async def test_api_key(start: Start) -> None:
    cluster = await start("static", settings=GatewaySettings(api_key="right"))
    assert (await cluster.post("/v1/completions", GOOD))[0] == 401
    assert (await cluster.post("/v1/completions", GOOD, Authorization="Bearer wrong"))[0] == 401
    assert (await cluster.post("/v1/completions", GOOD, Authorization="Bearer righ\xe9"))[0] == 401
    assert (await cluster.post("/v1/completions", GOOD, Authorization="Bearer right"))[0] == 200
    assert "right" not in repr(cluster.gateway.dispatcher.settings)
    async with cluster.client.get(cluster.url + "/health") as response:
        assert response.status == 200

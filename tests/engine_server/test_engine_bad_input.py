"""Whatever a client sends, the answer is an error in OpenAI's schema that names the field, and fast."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from typing import Any

import orjson
import pytest

from tests.engine_server.engine_fakes import Served
from tidegate.protocol import http_front

HANDLE: dict[str, Any] = {
    "do_remote_prefill": True,
    "remote_engine_id": "b",
    "remote_request_id": "r",
    "remote_host": "127.0.0.1",
    "remote_port": 5602,
    "remote_block_ids": [[3]],
    "remote_num_tokens": 16,
}
SAY = [{"role": "user", "content": "hi"}]
KV = "kv_transfer_params"

COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "required"),
    ({"prompt": ""}, "prompt", "no tokens"),
    ({"prompt": []}, "prompt", "a string or a non-empty list"),
    ({"prompt": [1, -1]}, "prompt", "non-negative token ids"),
    ({"prompt": [1, 512]}, "prompt", "not in the vocabulary"),
    ({"prompt": ["a", "b"]}, "prompt", "this engine takes one"),
    ({"prompt": 7}, "prompt", "a string or a non-empty list"),
    ({"prompt": "a", "max_tokens": -5}, "max_tokens", "greater than or equal to 1"),
    ({"prompt": "a", "max_tokens": "many"}, "max_tokens", "integer"),
    ({"prompt": "a", "max_tokens": 64}, "max_tokens", "exceeds the model's context of 64 tokens"),
    ({"prompt": "a" * 64}, "prompt", "leave no room"),
    ({"prompt": "a", "temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"prompt": "a", "temperature": "hot"}, "temperature", "number"),
    ({"prompt": "a", "top_p": 0}, "top_p", "greater than 0"),
    ({"prompt": "a", "n": 2}, "n", "this engine takes 1"),
    ({"prompt": "a", "stop": [1]}, "stop", "a string or a list"),
    ({"prompt": "a", "stream": "yes"}, "stream", "boolean"),
    ({"prompt": "a", "logprobs": 99}, "logprobs", "less than or equal to 20"),
    ({"prompt": "a", "echo": True, "max_tokens": 0}, "echo", "not supported"),
    ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "not supported"),
    ({"prompt": "a", "frequency_penalty": -0.5}, "frequency_penalty", "not supported"),
    ({"prompt": "a", "repetition_penalty": 1.1}, "repetition_penalty", "not supported"),
    ({"prompt": "a", "logit_bias": {"3": 1}}, "logit_bias", "not supported"),
    ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"prompt": "a", "thinking_token_budget": 5}, "thinking_token_budget", "not supported"),
    ({"prompt": "a", "temprature": 1.0}, "temprature", "unknown parameter"),
    ({"prompt": "a", "min_tokens": 20}, "min_tokens", "more than max_tokens"),
    ({"prompt": "a", "request_id": "x" * 300}, "request_id", "at most 256"),
    ({"prompt": "a", "request_id": "a\nb"}, "request_id", "printable"),
    ({"prompt": "a", "stop": "x" * 2000}, "stop", "longer than 1024"),
    ({"prompt": "a", "model": "gpt-9"}, "model", "does not exist"),
    ({"prompt": "a", KV: {"do_remote_prefill": True}}, f"{KV}.remote_engine_id", "missing"),
    ({"prompt": "a", KV: {**HANDLE, "remote_host": None}}, f"{KV}.remote_host", "missing"),
    ({"prompt": "a", KV: {**HANDLE, "remote_port": 0}}, f"{KV}.remote_port", "greater than 0"),
    ({"prompt": "a", KV: {**HANDLE, "remote_num_tokens": 40}}, f"{KV}.remote_block_ids", "do not hold"),
    ({"prompt": "a", KV: {**HANDLE, "remote_block_ids": [[1], [2]]}}, f"{KV}.remote_block_ids", "one group"),
    ({"prompt": "a", KV: {**HANDLE, "remote_block_ids": [[-1]]}}, f"{KV}.remote_block_ids", "one group"),
    ({"prompt": "a", KV: {**HANDLE, "tp_size": 2}}, f"{KV}.tp_size", "tp_size 1"),
    ({"prompt": "a", KV: {"tidegate_generated": 2}}, f"{KV}.tidegate_generated", "larger than the prompt"),
    ({"prompt": "a", KV: 3}, KV, "KvTransferParams"),
]
CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "messages", "required"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"content": "x"}]}, "messages.0.role", "required"),
    ({"messages": [{"role": "odd", "content": "x"}]}, "messages", "template"),
    ({"messages": SAY, "tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"messages": SAY, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"messages": SAY, "max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
    ({"messages": SAY, "max_completion_tokens": 61}, "max_tokens", "exceeds"),
    ({"messages": [{"role": "user", "content": "x" * 70}]}, "messages", "leave no room"),
    ({"messages": SAY, KV: {"prompt_token_ids": ["a"]}}, f"{KV}.prompt_token_ids.0", "integer"),
]


async def test_wrong_fields_are_named() -> None:
    async with Served() as served:
        for path, table in (("/v1/completions", COMPLETIONS), ("/v1/chat/completions", CHATS)):
            for body, param, words in table:
                status, answer = await served.post(path, body)
                expected = 404 if param == "model" else 400
                assert status == expected, (body, answer)
                error = answer["error"]
                assert error["param"] == param, (body, error)
                assert words in error["message"], (body, error)
                assert error["type"] == "invalid_request_error"
        assert served.engine.requests == []


async def test_bodies_that_are_not_objects() -> None:
    async with Served() as served:
        for raw, words in (
            (b"", "not valid JSON"),
            (b"{", "not valid JSON"),
            (b'{"prompt": "\xff\xfe"}', "not valid JSON"),
            (b"[1, 2]", "must be a JSON object"),
            (b'"text"', "must be a JSON object"),
        ):
            status, answer = await served.post("/v1/completions", raw)
            assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
            assert words in answer["error"]["message"]


async def test_bodies_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.engines.serving.server.MOST_BODY_BYTES", 1000)
    async with Served() as served:
        status, answer = await served.post("/v1/completions", b"x" * 2000)
        assert (status, answer["error"]["code"]) == (413, "body_too_large")


async def test_compressed_bodies_are_inflated_after_the_key_and_within_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tidegate.engines.serving.server.MOST_BODY_BYTES", 2**20)
    monkeypatch.setattr(zlib, "decompressobj", None)
    packed = {"Content-Encoding": "gzip"}
    async with Served(api_key="k") as served:
        assert (await served.post("/v1/completions", gzip.compress(b"{}"), packed))[0] == 401
        monkeypatch.undo()
        keyed = packed | {"Authorization": "Bearer k"}
        status, answer = await served.post("/v1/completions", gzip.compress(bytes(2**26)), keyed)
        assert (status, answer["error"]["code"]) == (413, "body_too_large")
        good = orjson.dumps({"prompt": "a", "max_tokens": 1})
        assert (await served.post("/v1/completions", gzip.compress(good), keyed))[0] == 200


async def test_a_million_wrong_items_are_one_short_error() -> None:
    async with Served() as served:
        status, answer = await served.post("/v1/completions", {"prompt": ["x"] * 1_000_000})
        assert (status, answer["error"]["param"]) == (400, "prompt")
        assert len(answer["error"]["message"]) < 200
        status, answer = await served.post("/v1/completions", {"prompt": [7] * 1_000_000})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


async def test_headers_that_are_not_text() -> None:
    head = b"Content-Length: 33\r\nx-tidegate-secret: \xff\xfe\r\nx-request-id: a\xff\r\n"
    async with Served(secret="s3cret") as served:
        answer = await _raw(served, head, b'{"prompt": "a", "max_tokens": 1 }')
        assert answer["error"]["param"] == "request_id"
        kv = b'{"prompt": "a", "kv_transfer_params": {"do_remote_decode": true}}'
        head = b"Content-Length: %d\r\nx-tidegate-secret: \xff\xfe\r\n" % len(kv)
        answer = await _raw(served, head, kv)
        assert answer["error"]["code"] == "forbidden"
    async with Served(api_key="key") as served:
        answer = await _raw(served, b"Content-Length: 2\r\nAuthorization: Bearer \xff\r\n", b"{}")
        assert answer["error"]["code"] == "invalid_api_key"


async def test_malformed_http(caplog: pytest.LogCaptureFixture) -> None:
    async with Served() as served:
        for head, body in (
            (b"Content-Length: many\r\n", b""),
            (b"Transfer-Encoding: chunked\r\n", b"zz\r\nabc\r\n"),
            (b"Content-Encoding: gzip\r\nContent-Length: 3\r\n", b"abc"),
        ):
            answer = await _raw(served, head, body)
            assert answer["error"]["type"] == "invalid_request_error"
    assert [r for r in caplog.records if r.exc_info] == []


async def test_null_means_not_sent() -> None:
    async with Served() as served:
        nulls = dict.fromkeys(("stream", "ignore_eos", "return_token_ids", "stream_options", KV))
        status, _ = await served.post("/v1/completions", {"prompt": "a", "max_tokens": 1} | nulls)
        assert status == 200
        status, _ = await served.post("/tokenize", {"prompt": "a", "add_special_tokens": None})
        assert status == 200


async def test_unknown_paths_and_methods() -> None:
    async with Served() as served:
        status, answer = await served.post("/v1/embeddings", {})
        assert (status, answer["error"]["code"]) == (404, "unknown_url")
        async with served.client.get("/v1/completions") as response:
            assert (response.status, response.headers["Allow"]) == (405, "POST")
            assert (await response.json())["error"]["code"] == "method_not_allowed"


async def test_tokenize_errors() -> None:
    async with Served() as served:
        for path, body, param in (
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": "a", "messages": SAY}, "prompt"),
            ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
            ("/detokenize", {"tokens": [600]}, "tokens"),
            ("/detokenize", {"tokens": "x"}, "tokens"),
            ("/tidegate/release", {}, "request_id"),
            ("/tidegate/abort", {"request_ids": "x"}, "request_ids"),
        ):
            status, answer = await served.post(path, body)
            assert status in (400, 404)
            assert answer["error"]["param"] == param


async def _raw(served: Served, head: bytes, body: bytes) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection(*served.address)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n" + body)
    raw = await reader.readuntil(b"\r\n\r\n")
    length = int(raw.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    payload = await reader.readexactly(length)
    writer.close()
    answer: dict[str, Any] = orjson.loads(payload)
    return answer


async def test_uploads_that_stop_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_front, "UPLOAD_S", 0.1)
    async with Served() as served:
        answer = await _raw(served, b"Content-Length: 100\r\n", b'{"prompt"')
        assert "did not arrive" in answer["error"]["message"]
        _, writer = await asyncio.open_connection(*served.address)
        writer.write(b'POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"pro')
        writer.close()
        status, _ = await served.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
        assert status == 200


async def test_internal_use_needs_the_secret() -> None:
    kv_ask = {"prompt": "a", "max_tokens": 1, KV: {"do_remote_decode": True}}
    async with Served(secret="s3cret") as served:
        for headers in ({}, {"x-tidegate-secret": "wrong"}):
            for path, body in (
                ("/v1/completions", kv_ask),
                ("/v1/completions", {"prompt": "a", KV: {"tidegate_generated": 0}}),
                ("/v1/chat/completions", {"messages": SAY, KV: HANDLE}),
                ("/tidegate/release", {"request_id": "x"}),
                ("/tidegate/unknown", {}),
            ):
                status, answer = await served.post(path, body, headers)
                assert (status, answer["error"]["code"]) == (403, "forbidden"), path
            async with served.client.get("/tidegate/stats", headers=headers) as response:
                assert response.status == 403
        assert served.engine.requests == []
        assert served.released == []
        member = {"x-tidegate-secret": "s3cret"}
        assert (await served.post("/v1/completions", kv_ask, member))[0] == 200
        assert (await served.post("/tidegate/release", {"request_id": "x"}, member))[0] == 200
        assert (await served.post("/v1/completions", {"prompt": "a", KV: {}}))[0] == 200


async def test_the_api_key_guards_all_that_asks_the_engine() -> None:
    async with Served(api_key="key") as served:
        asked = {"/metrics": None, "/tokenize": {"prompt": "a"}, "/detokenize": {"tokens": [97]}}
        for key, status in ((None, 401), ("nope", 401), ("key", 200)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            for path, body in asked.items():
                method = "GET" if body is None else "POST"
                async with served.client.request(method, path, json=body, headers=headers) as response:
                    assert response.status == status, path
        for headers in ({}, {"Authorization": "Bearer nope"}, {"Authorization": "Basic key"}):
            status, answer = await served.post("/v1/completions", {"prompt": "a"}, headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        status, _ = await served.post("/v1/completions", {"prompt": "a"}, {"Authorization": "Bearer key"})
        assert status == 200
        async with served.client.get("/health") as response:
            assert response.status == 200


async def test_a_fault_of_ours_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Served() as served:

        def broken(request: object) -> None:
            raise RuntimeError("a secret detail")

        monkeypatch.setattr(served.engine, "submit", broken)
        status, answer = await served.post("/v1/completions", {"prompt": "a"})
        assert (status, answer["error"]["message"]) == (500, "internal error")

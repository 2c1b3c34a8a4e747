"""What the HTTP front promises besides answers: true statuses, every refusal counted, no second head."""

from __future__ import annotations

import asyncio
import gzip
import logging
import os
import resource
import zlib
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.gateway.gateway_cluster import Cluster, Start
from tidegate.gateway.answering import StreamedAnswer
from tidegate.gateway.settings import GatewaySettings
from tidegate.protocol import client_stream, http_front
from tidegate.protocol.chunks import SseParser

GOOD = {"prompt": [1, 2, 3], "max_tokens": 2, "temperature": 0}
LONG = {"prompt": [1, 2, 3], "max_tokens": 100_000, "temperature": 0}


async def raw(cluster: Cluster, *pieces: bytes) -> tuple[int, dict[str, Any]]:
    """Send bytes as they are and return the status and the decoded body of the answer."""
    reader, writer = await asyncio.open_connection(*cluster.url.removeprefix("http://").split(":"))
    for piece in pieces:
        writer.write(piece)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    body = orjson.loads(await reader.readexactly(length))
    writer.close()
    return int(head.split()[1]), body


def post(body: bytes, *headers: bytes) -> bytes:
    lines = (
        b"POST /v1/completions HTTP/1.1",
        b"Host: [::1]",
        *headers,
        b"Content-Length: %d" % len(body),
    )
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def counted(cluster: Cluster) -> dict[str, float]:
    """Requests by outcome."""
    (family,) = cluster.gateway.dispatcher.metrics.requests.collect()
    return {s.labels["outcome"]: s.value for s in family.samples if s.name.endswith("_total")}


def outcomes(path: Path) -> list[dict[str, Any]]:
    rows = [orjson.loads(line) for line in (path / "journal.jsonl").read_bytes().splitlines()]
    return [r for r in rows if r["type"] == "outcome"]


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Any:
    """Fail a test in which anything logs an error."""
    yield
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []


@pytest.mark.parametrize(
    "header", [b"x-tenant-id", b"x-session-id", b"x-slo-ttft-ms", b"x-slo-tpot-ms"], ids=bytes.decode
)
async def test_a_header_that_is_not_text_is_named(start: Start, quiet: None, header: bytes) -> None:
    cluster = await start("static")
    status, answer = await raw(cluster, post(orjson.dumps(GOOD), header + b": 1\xff\xfe"))
    assert (status, answer["error"]["param"]) == (400, header.decode())
    assert counted(cluster) == {"bad_request": 1.0}


async def test_a_key_that_is_not_text_is_a_wrong_key(start: Start, quiet: None) -> None:
    cluster = await start("static", settings=GatewaySettings(api_key="right"))
    for value in (b"Bearer \xff", b"\xff\xfe", b"Bearer", b"Basic right"):
        status, answer = await raw(cluster, post(orjson.dumps(GOOD), b"Authorization: " + value))
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    assert counted(cluster) == {"unauthorized": 4.0}


async def test_a_wrong_method_is_told_the_right_one(start: Start) -> None:
    cluster = await start("static")
    async with cluster.client.put(cluster.url + "/v1/completions") as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")
        assert (await response.json())["error"]["code"] == "method_not_allowed"


async def test_every_refusal_is_counted_once(start: Start) -> None:
    cluster = await start("static", context=100, settings=GatewaySettings(max_body_bytes=1000))
    for body in (b"{", {"prompt": 7}, GOOD | {"model": "other"}, b" " * 2000, {"prompt": [1] * 200}, GOOD):
        await cluster.post("/v1/completions", body)
    assert counted(cluster) == {
        "bad_request": 2.0,
        "unknown_model": 1.0,
        "body_too_large": 1.0,
        "prompt_too_long": 1.0,
        "ok": 1.0,
    }


async def test_with_nothing_up_a_request_is_refused_and_recorded(start: Start, tmp_path: Path) -> None:
    cluster = await start("static")
    for name in cluster.engines:
        cluster.fleet.down(name)
    for model in ({}, {"model": "whatever"}):
        status, answer, headers = await cluster.post("/v1/completions", GOOD | model)
        assert (status, answer["error"]["code"]) == (503, "no_instance")
        assert int(headers["Retry-After"]) >= 1
    assert counted(cluster) == {"no_instance": 2.0}
    await cluster.gateway.stop()
    assert [(r["outcome"], r["status"]) for r in outcomes(tmp_path)] == [("no_instance", 503)] * 2


@pytest.mark.parametrize(
    "pieces",
    [
        (b"NONSENSE\r\n\r\n",),
        (b"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nContent-Length: many\r\n\r\n",),
        (b"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",),
        (b"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nx-long: " + b"a" * 20_000 + b"\r\n\r\n",),
        (post(b"not gzip", b"Content-Encoding: gzip"),),
        (post(gzip.compress(orjson.dumps(GOOD))[:-9], b"Content-Encoding: gzip"),),
        (post(gzip.compress(orjson.dumps(GOOD)) + b"rest", b"Content-Encoding: gzip"),),
    ],
    ids=["request-line", "length", "chunk-size", "header-size", "gzip", "truncated", "trailing"],
)
async def test_malformed_http_is_a_bad_request(start: Start, quiet: None, pieces: tuple[bytes, ...]) -> None:
    cluster = await start("static")
    status, answer = await raw(cluster, *pieces)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert "\n" not in answer["error"]["message"]


async def test_a_compressed_body_is_read_and_its_true_size_limited(start: Start) -> None:
    cluster = await start("static", settings=GatewaySettings(max_body_bytes=1000))
    small, large = (gzip.compress(orjson.dumps(GOOD | {"user": "x" * n})) for n in (10, 100_000))
    assert (await raw(cluster, post(small, b"Content-Encoding: gzip")))[0] == 200
    assert (await raw(cluster, post(large, b"Content-Encoding: gzip")))[0] == 413


def bomb(size: int) -> bytes:
    """Return ``size`` zero bytes, compressed to about a thousandth."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([*(packer.compress(bytes(2**20)) for _ in range(size // 2**20)), packer.flush()])


@pytest.mark.parametrize("path", ["/v1/completions", "/health", "/nowhere", "/tidegate/state"])
async def test_nothing_is_inflated_before_the_key(
    start: Start, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inflated: list[int] = []
    real = zlib.decompressobj

    def watched(*args: Any, **more: Any) -> Any:
        inflated.append(1)
        return real(*args, **more)

    monkeypatch.setattr(zlib, "decompressobj", watched)
    cluster = await start("static", settings=GatewaySettings(api_key="right"))
    request = post(bomb(256 * 2**20), b"Content-Encoding: gzip").replace(b"/v1/completions", path.encode())
    status, _ = await raw(cluster, request)
    assert status in (401, 404, 405)
    assert not inflated


async def test_a_bomb_is_inflated_no_further_than_the_limit(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    real = asyncio.to_thread

    async def counted_step(*args: Any) -> Any:
        steps.append(1)
        return await real(*args)

    monkeypatch.setattr(asyncio, "to_thread", counted_step)
    cluster = await start("static", settings=GatewaySettings(max_body_bytes=8 * 2**20))
    for encoding in (b"gzip", b"x-gzip"):
        status, answer = await raw(cluster, post(bomb(256 * 2**20), b"Content-Encoding: " + encoding))
        assert (status, answer["error"]["code"]) == (413, "body_too_large")
    assert len(steps) == 16, "the first step of nine is taken at once, each other off the loop"


@pytest.mark.parametrize("window", [15, -15], ids=["zlib", "bare"])
async def test_both_kinds_of_deflate_are_read(start: Start, window: int) -> None:
    cluster = await start("static")
    packer = zlib.compressobj(wbits=window)
    body = packer.compress(orjson.dumps(GOOD)) + packer.flush()
    assert (await raw(cluster, post(body, b"Content-Encoding: deflate")))[0] == 200


async def test_an_encoding_that_is_not_taken_is_named(start: Start) -> None:
    cluster = await start("static")
    for encoding in (b"br", b"zstd", b"gzip, gzip"):
        status, answer = await raw(cluster, post(b"x", b"Content-Encoding: " + encoding))
        assert (status, answer["error"]["code"]) == (415, "unsupported_encoding")
    assert counted(cluster) == {"unsupported_encoding": 3.0}


async def test_a_length_that_is_too_large_is_refused_at_once(start: Start) -> None:
    cluster = await start("static")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 1000000000000\r\n\r\n"
    status, answer = await raw(cluster, head)
    assert (status, answer["error"]["code"]) == (413, "body_too_large")


async def test_large_bodies_are_bounded_in_total(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_front, "MOST_HELD_BYTES", 3 * 2**19)
    cluster = await start("static", step_s=0.001)
    pad = {"user": "x" * 2**19}
    held = [asyncio.create_task(cluster.stream(LONG | pad)) for _ in range(2)]
    await cluster.until(lambda: cluster.streams() == 2)
    status, answer, headers = await cluster.post("/v1/completions", GOOD | pad)
    assert (status, answer["error"]["code"], headers["Retry-After"]) == (429, "overloaded", "1")
    assert (await cluster.post("/v1/completions", GOOD))[0] == 200, "small ones pass"
    for task in held:
        task.cancel()
    await asyncio.gather(*held, return_exceptions=True)
    await cluster.until(lambda: cluster.live() == 0)
    assert (await cluster.post("/v1/completions", GOOD | pad))[0] == 200


@pytest.mark.parametrize(
    "many",
    [
        b"[" + b"{}," * 1_100_000 + b"1]",
        b'[{"a":1,"b":[2]}' + b',{"a":1,"b":[2]}' * 450_000 + b"]",
        b"{" + b",".join(b'"%d":1' % n for n in range(1_400_000)) + b"}",
    ],
    ids=["objects", "nested", "keys"],
)
async def test_a_body_that_would_take_much_memory_is_refused_undecoded(start: Start, many: bytes) -> None:
    cluster = await start("static")
    status, answer = await raw(cluster, post(b'{"prompt":[1],"vllm_xargs":{"x":' + many + b"}}"))
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    assert "too many values" in answer["error"]["message"]


async def test_an_upload_that_stalls_has_a_deadline(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_front, "UPLOAD_S", 0.05)
    cluster = await start("static")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 500\r\n\r\n"
    status, answer = await raw(cluster, head, b'{"prompt"')
    assert status == 400
    assert "did not arrive" in answer["error"]["message"]


async def test_null_means_not_sent(start: Start) -> None:
    cluster = await start("static")
    names = ("stream", "ignore_eos", "return_token_ids", "max_tokens", "echo", "stop", "seed", "logprobs")
    nulls = dict.fromkeys((*names, "n", "stream_options", "user", "best_of", "kv_transfer_params"))
    status, answer, _ = await cluster.post("/v1/completions", nulls | {"prompt": [1, 2, 3]})
    assert status == 200, answer
    status, answer, _ = await cluster.post("/v1/completions", {"prompt": None})
    assert (status, answer["error"]["param"]) == (400, "prompt")
    events = await cluster.stream(GOOD | {"stream_options": {"include_usage": None}})
    assert all("usage" not in event for event in events)


async def test_a_fault_of_ours_ends_a_stream_with_an_error_event(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def broken(self: StreamedAnswer, text: str, token_ids: list[int]) -> None:
        raise RuntimeError("a detail nobody should see")

    monkeypatch.setattr(StreamedAnswer, "plain", broken)
    cluster = await start("static", step_s=0.001)
    reader, writer = await asyncio.open_connection(*cluster.url.removeprefix("http://").split(":"))
    writer.write(post(orjson.dumps(GOOD | {"max_tokens": 20, "stream": True}), b"Connection: close"))
    sent = await reader.read()
    writer.close()
    assert sent.count(b"HTTP/1.1") == 1
    assert sent.endswith(b"\r\n0\r\n\r\n"), "the chunked body is ended properly"
    last = sent.split(b"data: ")[-1].split(b"\n")[0]
    assert orjson.loads(last)["error"]["message"] == "internal error"
    assert sum(r.exc_info is not None for r in caplog.records) == 1
    assert counted(cluster) == {"internal": 1.0}
    await cluster.gateway.stop()
    assert [r["outcome"] for r in outcomes(tmp_path)] == ["internal"]


async def test_a_stop_tells_those_it_cuts_off(start: Start, tmp_path: Path, quiet: None) -> None:
    cluster = await start("static", step_s=0.001)
    stream = asyncio.create_task(cluster.stream(LONG))
    whole = asyncio.create_task(cluster.post("/v1/completions", LONG))
    await cluster.until(lambda: sum(s.position > 3 for s in cluster.engines["i1"].streams.values()) == 2)
    await cluster.gateway.stop()
    events = await stream
    assert events[-1]["error"]["code"] == "shutting_down"
    status, answer, headers = await whole
    assert (status, answer["error"]["code"]) == (503, "shutting_down")
    assert "Retry-After" in headers
    assert [(r["outcome"], r["status"]) for r in outcomes(tmp_path)] == [("shutting_down", 503)] * 2
    assert counted(cluster) == {"shutting_down": 2.0}


async def test_a_draining_gateway_takes_nothing_new(start: Start) -> None:
    cluster = await start("static")
    assert (await cluster.post("/v1/completions", GOOD))[0] == 200
    never: asyncio.Task[int] = asyncio.create_task(asyncio.sleep(3600.0, 0))
    await cluster.gateway.drain(never)
    never.cancel()
    # It comes over the connection that is open since before.
    status, answer, headers = await cluster.post("/v1/completions", GOOD)
    assert (status, answer["error"]["code"]) == (503, "shutting_down")
    assert int(headers["Retry-After"]) >= 1
    assert counted(cluster) == {"ok": 1.0, "shutting_down": 1.0}


async def test_idle_connections_shut_nobody_out(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_front, "most_connections", lambda onward: 8)
    cluster = await start("static", step_s=0.001)
    stream = asyncio.create_task(cluster.stream(LONG | {"max_tokens": 200}))
    await cluster.until(lambda: cluster.streams() == 1)
    host, port = cluster.url.removeprefix("http://").split(":")
    idle = [await asyncio.open_connection(host, port) for _ in range(80)]
    for _ in range(20):
        status, _ = await raw(cluster, post(orjson.dumps(GOOD)))
        assert status == 200
    events = await stream
    assert events[-1]["choices"][0]["finish_reason"] == "length", "the open stream goes on"
    for _, writer in idle:
        writer.close()


async def test_a_client_beyond_the_most_is_told_and_a_busy_one_is_left_alone(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_front, "most_connections", lambda onward: 3)
    cluster = await start("static", step_s=0.001)
    streams = [asyncio.create_task(cluster.stream(LONG | {"max_tokens": 200})) for _ in range(3)]
    await cluster.until(lambda: cluster.streams() == 3)
    for _ in range(5):
        status, answer = await raw(cluster, post(orjson.dumps(GOOD)))
        assert (status, answer["error"]["code"]) == (503, "no_descriptors")
    for stream in streams:
        assert (await stream)[-1]["choices"][0]["finish_reason"] == "length"
    assert (await raw(cluster, post(orjson.dumps(GOOD))))[0] == 200


async def test_a_head_that_does_not_come_has_a_deadline(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_front, "HEAD_S", 0.05)
    cluster = await start("static")
    reader, writer = await asyncio.open_connection(*cluster.url.removeprefix("http://").split(":"))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: ")
    async with asyncio.timeout(10):
        assert await reader.read() == b""
    writer.close()


async def test_a_lack_of_descriptors_is_no_fault_of_an_engine(start: Start) -> None:
    cluster = await start("static")
    assert (await cluster.post("/health", b""))[0] == 405  # the client's connection is open from here on
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(2)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        status, answer, _ = await cluster.post("/v1/completions", GOOD)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (status, answer["error"]["code"]) == (503, "no_descriptors")
    assert cluster.fleet.suspected == []
    assert (await cluster.post("/v1/completions", GOOD))[0] == 200


@pytest.mark.parametrize("replays", [0, 1])
async def test_a_stream_that_waits_has_its_head_and_signs_of_life(
    start: Start, monkeypatch: pytest.MonkeyPatch, replays: int
) -> None:
    monkeypatch.setattr(client_stream, "COMMENT_S", 0.001)
    cluster = await start("static", settings=GatewaySettings(head_after_s=0.001, replays=replays))
    for engine in cluster.engines.values():
        engine.hold_prefill = True
    asked = cluster.client.post(cluster.url + "/v1/completions", json=GOOD | {"stream": True})
    async with asyncio.timeout(10), asked as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
        for _ in range(3):
            assert (await response.content.readuntil(b"\n\n")).startswith(b":")
        for engine in cluster.engines.values():
            engine.hold_prefill = False
            for transport in engine.held:
                transport.abort()
        *events, last = SseParser().feed(await response.read())
    if replays:
        assert last == b"[DONE]" and orjson.loads(events[0])["choices"][0]["text"]
    else:
        assert orjson.loads(last)["error"]["code"] == "engine_unreachable"

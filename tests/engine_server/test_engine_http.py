"""The instance's HTTP dialect, over real HTTP against an engine without a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.engine_server.engine_fakes import FACTS, Served, until

HANDLE = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "engine-b",
    "remote_request_id": "cmpl-x",
    "remote_host": "127.0.0.1",
    "remote_port": 5602,
    "remote_block_ids": [[3, 9]],
    "remote_num_tokens": 20,
    "tp_size": 1,
    "transfer_mode": "pull",
}
PROMPT = list(range(20))


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with Served() as running:
        yield running


def ids_of(events: list[dict[str, Any]]) -> list[int]:
    return [i for e in events if e.get("choices") for i in e["choices"][0].get("token_ids", [])]


async def test_a_completion_in_one_piece(served: Served) -> None:
    status, body = await served.post(
        "/v1/completions",
        {"model": "tiny", "prompt": PROMPT, "max_tokens": 3, "return_token_ids": True, "request_id": "mine"},
    )
    assert status == 200
    assert (body["id"], body["object"], body["model"]) == ("cmpl-mine", "text_completion", "tiny")
    choice = body["choices"][0]
    assert choice == {
        "index": 0,
        "text": "w0 w1 w2 ",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": [100, 101, 102],
        "prompt_token_ids": PROMPT,
    }
    assert body["usage"] == {
        "prompt_tokens": 20,
        "completion_tokens": 3,
        "total_tokens": 23,
        "prompt_tokens_details": {"cached_tokens": 12},
    }
    assert body["kv_transfer_params"] is None
    assert body["metrics"]["queue_time_ms"] == pytest.approx(1.0)
    assert body["metrics"]["kv_load_time_ms"] == pytest.approx(2.0)
    assert body["metrics"]["prefill_time_ms"] == pytest.approx(3.0)
    assert body["metrics"]["decode_time_ms"] == pytest.approx(4.0)
    assert (body["metrics"]["kv_loaded_tokens"], body["metrics"]["cached_tokens"]) == (4, 8)


async def test_a_streamed_completion_has_one_event_per_step(served: Served) -> None:
    events = await served.events(
        "/v1/completions",
        {
            "prompt": "abc",
            "max_tokens": 3,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        },
    )
    assert [e["choices"][0]["text"] for e in events[:-1]] == ["w0 ", "w1 ", "w2 "]
    assert ids_of(events) == [100, 101, 102]
    assert events[0]["choices"][0]["prompt_token_ids"] == [97, 98, 99]
    assert "prompt_token_ids" not in events[1]["choices"][0]
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None, None, "length"]
    assert "metrics" not in events[0]
    assert events[2]["metrics"]["cached_tokens"] == 8
    assert events[3]["choices"] == []
    assert events[3]["usage"]["completion_tokens"] == 3


async def test_a_streamed_chat_opens_with_the_role(served: Served) -> None:
    events = await served.events(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "return_token_ids": True},
    )
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[0]["prompt_token_ids"] == [1, 104, 105, 2]
    assert [e["choices"][0]["delta"]["content"] for e in events[1:]] == ["w0 ", "w1 "]
    assert events[0]["object"] == "chat.completion.chunk"
    assert ids_of(events) == [100, 101]


async def test_a_chat_in_one_piece_fills_the_context_by_default(served: Served) -> None:
    status, body = await served.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "return_token_ids": True}
    )
    assert status == 200
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert body["usage"]["total_tokens"] == FACTS.max_model_len
    assert body["prompt_token_ids"] == [1, 104, 105, 2]
    assert len(body["choices"][0]["token_ids"]) == 60


async def test_default_max_tokens_of_a_completion(served: Served) -> None:
    _, body = await served.post("/v1/completions", {"prompt": "abc"})
    assert body["usage"]["completion_tokens"] == 16
    _, body = await served.post("/v1/completions", {"prompt": [5] * 60})
    assert body["usage"]["completion_tokens"] == 4


async def test_logprobs_in_both_forms(served: Served) -> None:
    _, text = await served.post("/v1/completions", {"prompt": "a", "max_tokens": 2, "logprobs": 1})
    assert text["choices"][0]["logprobs"] == {
        "text_offset": [0, 3],
        "token_logprobs": [-0.5, -0.5],
        "tokens": ["w0 ", "w1 "],
        "top_logprobs": [{"w0 ": -0.5, "alt": -2.5}, {"w1 ": -0.5, "alt": -2.5}],
    }
    ask = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    _, chat = await served.post("/v1/chat/completions", {**ask, "logprobs": True, "top_logprobs": 1})
    entry = chat["choices"][0]["logprobs"]["content"][0]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("w0 ", -0.5, [119, 48, 32])
    assert [top["token"] for top in entry["top_logprobs"]] == ["alt"]
    events = await served.events("/v1/completions", {"prompt": "a", "max_tokens": 2, "logprobs": 0})
    assert [e["choices"][0]["logprobs"]["text_offset"] for e in events] == [[0], [3]]


async def test_sampling_fields_reach_the_engine(served: Served) -> None:
    await served.post(
        "/v1/completions",
        {
            "prompt": "abc",
            "max_tokens": 4,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": -1,
            "seed": 7,
            "stop": ["x", ""],
            "stop_token_ids": [3],
            "min_tokens": 2,
            "ignore_eos": True,
            "cache_salt": "tenant",
            "presence_penalty": 0.0,
        },
    )
    request = served.engine.requests[0]
    params = request.sampling
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.9, 0, 7)
    assert (params.stop, params.stop_token_ids, params.min_tokens) == (("x",), (3,), 2)
    assert params.ignore_eos
    assert request.salt == "tenant"
    assert request.source is None
    assert not request.pin_kv


async def test_a_pinning_request_answers_with_a_handle(served: Served) -> None:
    ask = {"prompt": PROMPT, "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
    _, body = await served.post("/v1/completions", ask)
    request = served.engine.requests[0]
    assert request.pin_kv
    assert body["kv_transfer_params"] == {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": "engine-a",
        "remote_request_id": request.id,
        "remote_host": "127.0.0.1",
        "remote_port": 5601,
        "remote_block_ids": [[5, 6]],
        "remote_num_tokens": 20,
        "tp_size": 1,
        "transfer_mode": "pull",
    }
    events = await served.events("/v1/completions", {**ask, "max_tokens": 2})
    assert "kv_transfer_params" not in events[0]
    assert events[-1]["kv_transfer_params"]["remote_num_tokens"] == 21


@pytest.mark.parametrize(
    ("flags", "pins"),
    [
        ({"do_remote_prefill": True, "do_remote_decode": False}, False),
        ({"do_remote_prefill": False, "do_remote_decode": True}, True),
        ({"do_remote_prefill": True, "do_remote_decode": True}, True),
    ],
)
async def test_a_handle_becomes_a_source(served: Served, flags: dict[str, bool], pins: bool) -> None:
    kv = {**HANDLE, **flags, "tidegate_generated": 3}
    status, _ = await served.post(
        "/v1/completions", {"prompt": PROMPT, "max_tokens": 2, "kv_transfer_params": kv}
    )
    assert status == 200
    request = served.engine.requests[0]
    assert request.source is not None
    assert (request.source.engine_id, request.source.request_id) == ("engine-b", "cmpl-x")
    assert (request.source.host, request.source.port) == ("127.0.0.1", 5602)
    assert (request.source.block_ids, request.source.num_tokens) == ((3, 9), 20)
    assert (request.pin_kv, request.generated) == (pins, 3)
    assert served.released == []


async def test_a_chat_continues_from_token_ids(served: Served) -> None:
    kv = {"do_remote_decode": True, "prompt_token_ids": [4, 5, 6]}
    ask = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "kv_transfer_params": kv}
    await served.post("/v1/chat/completions", ask)
    assert served.engine.requests[0].prompt_token_ids == (4, 5, 6)


async def test_a_refused_request_releases_its_source(served: Served) -> None:
    ask = {"prompt": PROMPT, "max_tokens": 1000, "kv_transfer_params": HANDLE}
    status, _ = await served.post("/v1/completions", ask)
    assert status == 400
    assert [source.request_id for source in served.released] == ["cmpl-x"]
    assert served.engine.requests == []


async def test_engine_failures_are_true_errors(served: Served) -> None:
    served.engine.fail = "out of luck"
    for stream in (False, True):
        status, body = await served.post("/v1/completions", {"prompt": "a", "stream": stream})
        assert (status, body["error"]["message"]) == (500, "out of luck")
    served.engine.fail_after = 1
    events = await served.events("/v1/completions", {"prompt": "a", "max_tokens": 3})
    assert events[0]["choices"][0]["text"] == "w0 "
    assert events[1]["error"]["message"] == "out of luck"
    served.engine.fail = None
    status, _ = await served.post("/v1/completions", {"prompt": "a"})
    assert status == 200


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_client_that_leaves_aborts_its_request(served: Served, stream: bool) -> None:
    served.engine.hold_after = 2
    reader, writer = await asyncio.open_connection(*served.address)
    body = b'{"prompt": "abc", "max_tokens": 9, "stream": %s}' % (b"true" if stream else b"false")
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    await until(lambda: served.engine.live == 1, "submission")
    if stream:
        await reader.readuntil(b"w1 ")
    writer.transport.abort()
    await until(lambda: bool(served.engine.aborted), "abort")
    await until(lambda: served.engine.live == 0 and len(served.parts.router) == 0, "clean-up")


async def test_clients_that_leave_cost_no_log_lines(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    body = b'{"prompt": "abc", "max_tokens": 3, "stream": true}'
    for until_seen in (b"w0 ", b"w2 ", b"[DONE]"):
        reader, writer = await asyncio.open_connection(*served.address)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await reader.readuntil(until_seen)
        writer.transport.abort()
        await until(lambda: len(served.parts.router) == 0, "clean-up")
    await served.post("/v1/completions", {"prompt": "a"})
    assert [record for record in caplog.records if record.levelname != "DEBUG"] == []


async def test_a_client_that_never_reads_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.protocol.client_stream.UNREAD_BYTES", -1)
    ask = {"prompt": "abc", "max_tokens": 9, "stream": True}
    served.engine.hold_after = 2
    async with served.client.post("/v1/completions", json=ask) as answer:
        await answer.content.readuntil(b"w1 ")
        served.engine.resume()
        with pytest.raises(aiohttp.ClientError):
            await answer.read()
    await until(lambda: served.engine.live == 0, "abort")


async def test_abort_ends_a_request_with_what_it_has(served: Served) -> None:
    served.engine.hold_after = 2
    asked = asyncio.create_task(
        served.post(
            "/v1/completions",
            {"prompt": "abc", "max_tokens": 9, "request_id": "job", "return_token_ids": True},
        )
    )
    await until(lambda: served.engine.live == 1, "submission")
    await until(lambda: not served.engine._ready(), "two tokens")
    status, answer = await served.post("/tidegate/abort", {"request_ids": ["job", "nobody"]})
    assert (status, len(answer["aborted"])) == (200, 1)
    status, body = await asked
    assert (status, body["choices"][0]["finish_reason"]) == (200, "abort")
    assert body["choices"][0]["token_ids"] == [100, 101]


async def test_five_hundred_streams_at_once(served: Served) -> None:
    served.engine.hold = True
    tasks = [
        asyncio.create_task(served.events("/v1/completions", {"prompt": "a", "max_tokens": 8}))
        for _ in range(500)
    ]
    await until(lambda: served.engine.live == 500, "submissions")
    served.engine.resume()
    for task in tasks:
        assert "".join(e["choices"][0]["text"] for e in await task) == "w0 w1 w2 w3 w4 w5 w6 w7 "
    assert len(served.parts.router) == 0


async def test_http_1_0_streams_until_the_connection_closes(served: Served) -> None:
    reader, writer = await asyncio.open_connection(*served.address)
    body = b'{"prompt": "abc", "max_tokens": 2, "stream": true}'
    writer.write(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    raw = await reader.read()
    writer.close()
    head, _, payload = raw.partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert payload.startswith(b"data: {")
    assert payload.endswith(b"data: [DONE]\n\n")


async def test_models_health_tokenize_and_profile(served: Served) -> None:
    async with served.client.get("/v1/models") as answer:
        card = (await answer.json())["data"][0]
    assert (card["id"], card["max_model_len"]) == ("tiny", 64)
    async with served.client.get("/health") as answer:
        assert answer.status == 200
    _, body = await served.post("/tokenize", {"prompt": "abc"})
    assert body == {"count": 3, "max_model_len": 64, "tokens": [97, 98, 99]}
    _, body = await served.post("/tokenize", {"messages": [{"role": "user", "content": "a"}]})
    assert body["tokens"] == [1, 97, 2]
    _, body = await served.post("/detokenize", {"tokens": [97, 98]})
    assert body == {"prompt": "ab"}


async def test_stats_and_release(served: Served) -> None:
    ask = {"prompt": PROMPT, "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
    _, body = await served.post("/v1/completions", ask)
    name = body["kv_transfer_params"]["remote_request_id"]
    async with served.client.get("/tidegate/stats") as answer:
        stats = await answer.json()
    assert (stats["pinned"], stats["idle"], stats["consistent"]) == (1, False, True)
    _, body = await served.post("/tidegate/release", {"request_id": name})
    assert body == {"released": True}
    _, body = await served.post("/tidegate/release", {"request_id": name})
    assert body == {"released": False}


async def test_a_pin_can_be_released_under_the_name_its_request_was_given(served: Served) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1, "request_id": "leg-1"}
    status, _ = await served.post(
        "/v1/completions", body | {"kv_transfer_params": {"do_remote_decode": True}}
    )
    assert status == 200
    assert (await served.post("/tidegate/release", {"request_id": "leg-1"}))[1] == {"released": True}


async def test_a_release_that_overtakes_its_request_leaves_no_pin(served: Served) -> None:
    body = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 1,
        "kv_transfer_params": {"do_remote_decode": True},
    }
    before, engine = len(served.engine.requests), served.engine
    assert (await served.post("/tidegate/release", {"request_id": "leg-2"}))[1] == {"released": False}
    status, _ = await served.post("/v1/completions", body | {"request_id": "leg-2"})
    assert status == 499 and len(engine.requests) == before
    # One that runs is ended: nobody waits for its answer.
    engine.hold = True
    asked = asyncio.create_task(served.post("/v1/completions", body | {"request_id": "leg-3"}))
    while len(engine.requests) == before:
        await asyncio.sleep(0)
    assert (await served.post("/tidegate/release", {"request_id": "leg-3"}))[1] == {"released": False}
    _, answer = await asked
    assert answer["choices"][0]["finish_reason"] == "abort"
    assert len(engine.pins) == 0
    engine.resume()


async def test_metrics_have_vllm_names(served: Served) -> None:
    await served.post("/v1/completions", {"prompt": "abc", "max_tokens": 3})
    async with served.client.get("/metrics") as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = await answer.text()
    labels = 'engine="0",model_name="tiny"'
    for line in (
        f"vllm:num_requests_running{{{labels}}} 0.0",
        f"vllm:num_requests_waiting{{{labels}}} 0.0",
        f"vllm:kv_cache_usage_perc{{{labels}}} 0.25",
        f"vllm:num_preemptions_total{{{labels}}} 1.0",
        f"vllm:prompt_tokens_total{{{labels}}} 10.0",
        f"vllm:generation_tokens_total{{{labels}}} 20.0",
        f"vllm:prefix_cache_queries_total{{{labels}}} 30.0",
        f"vllm:prefix_cache_hits_total{{{labels}}} 15.0",
        f'vllm:prompt_tokens_by_source_total{{{labels},source="local_compute"}} 6.0',
        f'vllm:prompt_tokens_by_source_total{{{labels},source="local_cache_hit"}} 3.0',
        f'vllm:prompt_tokens_by_source_total{{{labels},source="external_kv_transfer"}} 1.0',
        f"tidegate:kv_transfer_bytes_total{{{labels}}} 4096.0",
        f"vllm:time_to_first_token_seconds_count{{{labels}}} 1.0",
        f"vllm:inter_token_latency_seconds_count{{{labels}}} 2.0",
        f"vllm:e2e_request_latency_seconds_count{{{labels}}} 1.0",
        'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="64"} 1.0',
    ):
        assert line in text.splitlines(), line


async def test_a_draining_server_finishes_and_refuses() -> None:
    async with Served() as served:
        served.engine.hold = True
        asked = asyncio.create_task(served.post("/v1/completions", {"prompt": "abc", "max_tokens": 2}))
        await until(lambda: served.engine.live == 1, "submission")
        stopping = asyncio.create_task(served.server.stop(5.0))
        await until(lambda: served.server._generation.draining, "draining")
        served.engine.resume()
        status, _ = await asked
        assert status == 200
        await stopping
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*served.address)

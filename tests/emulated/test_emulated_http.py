"""Emulated instances over real HTTP, in vLLM's dialect."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from tests.emulated.emulated_pair import OfTwo
from tidegate.core.errors import BadRequest
from tidegate.engines.emulated.vocabulary import VOCAB_SIZE, Codec, answer
from tidegate.engines.serving.requests import flat_messages
from tidegate.protocol.bodies import ChatMessage
from tidegate.protocol.chunks import SseParser

PIN = {"do_remote_decode": True, "do_remote_prefill": False}


async def test_instances_give_one_answer_whole_streamed_and_in_legs(two: OfTwo) -> None:
    prompt = list(range(40, 900))
    async with two() as pair:
        whole = await pair.complete(0, prompt, 30)
        choice = whole["choices"][0]
        assert choice["token_ids"] == answer(prompt, 0, 30)
        assert choice["finish_reason"] == "length"
        assert whole["usage"]["completion_tokens"] == 30
        assert choice["text"] == Codec().decode(choice["token_ids"])

        first = await pair.complete(0, prompt, 1, kv_transfer_params=PIN)
        handle = {**first["kv_transfer_params"], "tidegate_generated": 1}
        said = first["choices"][0]["token_ids"]
        body = {"prompt": prompt + said, "max_tokens": 29, "stream": True, "return_token_ids": True}
        body["stream_options"] = {"include_usage": True}
        body["kv_transfer_params"] = handle
        async with pair.client.post(pair.urls[1] + "/v1/completions", json=body) as streamed:
            assert streamed.status == 200
            payloads = SseParser().feed(await streamed.read())
        assert payloads[-1] == b"[DONE]"
        events = [orjson.loads(payload) for payload in payloads[:-1]]
        pieces = [event["choices"][0] for event in events if event["choices"]]
        assert said + [i for piece in pieces for i in piece["token_ids"]] == choice["token_ids"]
        text = first["choices"][0]["text"] + "".join(piece["text"] for piece in pieces)
        assert text == choice["text"]
        assert events[-2]["metrics"]["kv_loaded_tokens"] == len(prompt)
        for at in range(2):
            stats = await pair.stats(at)
            assert stats["idle"] and stats["consistent"], stats


async def test_a_client_that_leaves_frees_its_kv(two: OfTwo) -> None:
    async with two() as pair:
        body = {"prompt": list(range(300)), "max_tokens": 100_000, "stream": True}
        async with pair.client.post(pair.urls[0] + "/v1/completions", json=body) as streamed:
            await streamed.content.readline()
            assert not (await pair.stats(0))["idle"]
        async with asyncio.timeout(10):
            while not (stats := await pair.stats(0))["idle"]:
                await asyncio.sleep(0.01)
        assert stats["consistent"], stats


async def test_the_rest_of_the_dialect(two: OfTwo) -> None:
    async with two() as pair:
        url = pair.urls[1]
        async with pair.client.get(url + "/v1/models") as got:
            model = (await got.json())["data"][0]
        assert model["max_model_len"] == 131_072
        async with pair.client.get(url + "/health") as got:
            assert got.status == 200
        async with pair.client.get(url + "/metrics") as got:
            shown = await got.text()
        assert "vllm:num_requests_running{" in shown
        assert "tidegate:emulation_lag_seconds{" in shown
        chat = {"messages": [{"role": "user", "content": "good day"}], "max_tokens": 4, "logprobs": True}
        async with pair.client.post(url + "/v1/chat/completions", json=chat) as got:
            choice = (await got.json())["choices"][0]
        assert len(choice["logprobs"]["content"]) == 4
        assert choice["message"]["content"] == "".join(t["token"] for t in choice["logprobs"]["content"])
        stop = choice["message"]["content"].split()[2]
        async with pair.client.post(url + "/v1/chat/completions", json={**chat, "stop": stop}) as got:
            stopped = (await got.json())["choices"][0]
        assert stopped["finish_reason"] == "stop"
        assert choice["message"]["content"].startswith(stopped["message"]["content"] + stop)
        async with pair.client.post(url + "/v1/completions", json={"prompt": [VOCAB_SIZE]}) as got:
            assert (got.status, (await got.json())["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize(
    "text", ["", "The tide  turns.\n\tÄ 潮 🌊 able also", " able able", "x able", " ablest", "\udcff"]
)
def test_text_survives_its_token_ids(text: str) -> None:
    codec = Codec()
    ids = codec.encode(text)
    assert codec.decode(ids).encode("utf-8", "replace") == text.encode("utf-8", "replace") or "\udcff" in text
    assert all(0 <= i < VOCAB_SIZE for i in ids)


def test_pictures_are_refused() -> None:
    with pytest.raises(BadRequest, match="text"):
        flat_messages([ChatMessage(role="user", content=[{"type": "image_url", "image_url": {}}])])

"""What a client gets from a healthy cluster."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import orjson
import pytest

from tests.gateway.gateway_cluster import Start
from tidegate.gateway.legs import Legs
from tidegate.gateway.served_request import ServedRequest
from tidegate.gateway.settings import GatewaySettings
from tidegate_testing.chaos import Forced
from tidegate_testing.fake_engine import text_of, token_at

PROMPT = [5, 9, 200, 41]


def expected(count: int, prompt: list[int] = PROMPT) -> list[int]:
    return [token_at(prompt, p) for p in range(count)]


@pytest.mark.parametrize(
    "system", ["static", "colocated", "arrow-lending", "arrow-v1", "round-robin", "minimal-load"]
)
async def test_every_system_returns_the_same_tokens_streamed_and_whole(start: Start, system: str) -> None:
    cluster = await start(system, instances=3)
    body = {"prompt": PROMPT, "max_tokens": 7, "temperature": 0, "return_token_ids": True}
    status, whole, _ = await cluster.post("/v1/completions", body)
    assert status == 200
    choice = whole["choices"][0]
    assert choice["token_ids"] == expected(7)
    assert choice["text"] == "".join(map(text_of, expected(7)))
    assert choice["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 7
    assert whole["usage"]["prompt_tokens"] == len(PROMPT)
    events = await cluster.stream(body | {"stream_options": {"include_usage": True}})
    assert events[-1]["usage"] == whole["usage"]
    pieces = [e["choices"][0] for e in events[:-1]]
    assert [t for p in pieces for t in p["token_ids"]] == expected(7)
    assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert len({e["id"] for e in events}) == 1
    cluster.gateway.dispatcher.plane.ledger.check_integrity()
    assert cluster.live() == 0


async def test_a_request_that_ended_holds_nothing_that_only_a_collection_would_free(start: Start) -> None:
    cluster = await start("static")
    body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0}
    await cluster.stream(body)  # what is made once

    def kept() -> int:
        return sum(type(each) in (ServedRequest, Legs) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = kept()
        for _ in range(10):
            await cluster.stream(body)
        await cluster.until(lambda: kept() <= before)
    finally:
        gc.enable()


async def test_both_legs_carry_the_same_ids_and_the_same_seed(start: Start) -> None:
    cluster = await start("static")
    await cluster.stream({"prompt": "a text prompt", "max_tokens": 4, "temperature": 0.7, "top_p": 0.9})
    first, second = cluster.engines["i0"].bodies[0], cluster.engines["i1"].bodies[0]
    ids = list(b"a text prompt")
    assert first["prompt"] == "a text prompt"
    assert second["prompt"] == [*ids, token_at(ids, 0)]
    assert first["seed"] == second["seed"]
    assert second["top_p"] == first["top_p"] == 0.9
    assert (first["max_tokens"], second["max_tokens"]) == (1, 3)
    assert second["kv_transfer_params"]["remote_engine_id"] == "i0"
    assert second["kv_transfer_params"]["tidegate_generated"] == 1


async def test_a_clients_kv_handle_salt_and_ids_go_no_further(start: Start) -> None:
    cluster = await start("static")
    stolen = {"do_remote_prefill": True, "remote_engine_id": "i1", "remote_request_id": "someone-elses"}
    await cluster.post(
        "/v1/completions",
        {
            "prompt": PROMPT,
            "max_tokens": 3,
            "kv_transfer_params": stolen,
            "request_id": "mine",
            "priority": -9,
        },
    )
    for engine in cluster.engines.values():
        for body in engine.bodies:
            assert "someone-elses" not in orjson.dumps(body).decode()
            assert body["request_id"] != "mine"
            assert "priority" not in body


async def test_a_one_token_request_has_one_leg_and_pins_nothing(start: Start) -> None:
    cluster = await start("static")
    events = await cluster.stream({"prompt": PROMPT, "max_tokens": 1, "temperature": 0})
    assert len(events) == 1
    assert cluster.engines["i1"].bodies == []
    assert "do_remote_decode" not in cluster.engines["i0"].bodies[0].get("kv_transfer_params", {})


async def test_tenants_get_their_own_salt(start: Start) -> None:
    cluster = await start("static", settings=GatewaySettings(trusted_proxies=("127.0.0.0/8",)))
    for tenant in ("red", "blue"):
        await cluster.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2}, **{"x-tenant-id": tenant})
    salts = [b["cache_salt"] for b in cluster.engines["i0"].bodies]
    assert len(set(salts)) == 2
    assert all(salt.isalnum() and len(salt) <= 128 for salt in salts), "what vLLM takes"


async def test_forced_flips_every_few_milliseconds_change_no_token(start: Start) -> None:
    cluster = await start("arrow-lending", instances=4, step_s=0.001, forced=Forced(flip_every_s=0.002))

    async def one(seed: int) -> None:
        prompt = [seed, seed * 3 % 500, 7]
        events = await cluster.stream(
            {"prompt": prompt, "max_tokens": 20, "temperature": 0, "return_token_ids": True}
        )
        assert [t for e in events for t in e["choices"][0]["token_ids"]] == expected(20, prompt)

    await asyncio.gather(*(one(seed) for seed in range(60)))
    assert cluster.gateway.dispatcher.flips > 3
    assert cluster.live() == 0


async def test_the_journal_tells_the_whole_story(start: Start, tmp_path: Path) -> None:
    cluster = await start("arrow-lending", instances=3)
    await cluster.stream({"prompt": PROMPT, "max_tokens": 5, "temperature": 0})
    await cluster.gateway.stop()
    rows = [orjson.loads(line) for line in (tmp_path / "journal.jsonl").read_bytes().splitlines()]
    assert rows[0]["type"] == "header"
    kinds = [r["kind"] for r in rows if r["type"] == "decision"]
    assert kinds == ["place_prefill", "place_decode"]
    decision = next(r for r in rows if r["type"] == "decision")
    assert decision["alternatives"][0]["instance"] == decision["chosen"]["prefill_on"]
    assert decision["predicted"]["prefill_s"] > 0
    (outcome,) = [r for r in rows if r["type"] == "outcome"]
    assert outcome["outcome"] == "ok"
    assert (outcome["input_length"], outcome["output_length"]) == (len(PROMPT), 5)
    assert outcome["ttft_s"] <= outcome["e2e_s"]
    assert set(outcome["stages"]) >= {"queue", "prefill", "transfer", "decode_queue", "first_step", "decode"}


async def test_state_models_metrics_and_health(start: Start) -> None:
    cluster = await start("arrow-lending", instances=3)
    await cluster.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 3})
    async with cluster.client.get(cluster.url + "/tidegate/state") as response:
        state = await response.json()
    assert {i["role"] for i in state["instances"]} == {"prefill", "decode"}
    async with cluster.client.get(cluster.url + "/v1/models") as response:
        assert (await response.json())["data"][0]["id"] == "fake"
    async with cluster.client.get(cluster.url + "/metrics") as response:
        text = await response.text()
    assert 'tidegate_requests_total{outcome="ok"} 1.0' in text
    assert "tidegate_ttft_seconds_count 1.0" in text
    async with cluster.client.get(cluster.url + "/ready") as response:
        assert response.status == 200

"""A gateway with more to do than it can in time refuses, truthfully."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import orjson

from tests.gateway.gateway_cluster import Start
from tidegate.gateway.settings import GatewaySettings


def body(tokens: int) -> dict[str, object]:
    """Return a prompt that takes a millisecond per token, and shares nothing with one of another length."""
    return {"prompt": [tokens] * tokens, "max_tokens": 2}


async def test_what_would_wait_too_long_gets_429_and_the_time_to_come_back(
    start: Start, tmp_path: Path
) -> None:
    cluster = await start("static")
    engine = cluster.engines["i0"]
    engine.hold_prefill = True
    # A prefill of 5 s behind one of 1 ms; the one that runs may be over at any moment, those behind it not.
    waiting = [asyncio.create_task(cluster.post("/v1/completions", body(1)))]
    await cluster.until(lambda: len(engine.bodies) == 1)
    waiting.append(asyncio.create_task(cluster.post("/v1/completions", body(5000))))
    await cluster.until(lambda: len(engine.bodies) == 2)
    status, answer, headers = await cluster.post("/v1/completions", body(900))
    assert (status, answer["error"]["type"], headers["Retry-After"]) == (429, "rate_limit_error", "3")
    assert "a first token would take 5.9 s, more than 3 times the target of 1 s" in answer["error"]["message"]
    assert cluster.live() == 2
    patient = cluster.post("/v1/completions", body(901), **{"x-slo-ttft-ms": "2000"})
    waiting.append(asyncio.create_task(patient))
    await cluster.until(lambda: len(engine.bodies) == 3)
    async with cluster.client.get(cluster.url + "/metrics") as response:
        assert 'tidegate_requests_total{outcome="overloaded"} 1.0' in await response.text()
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await cluster.gateway.stop()
    rows = [orjson.loads(line) for line in (tmp_path / "journal.jsonl").read_bytes().splitlines()]
    (refused,) = [row for row in rows if row.get("chosen", {}).get("reject")]
    assert refused["alternatives"] and "prefill_on" not in refused["chosen"]


async def test_a_gateway_may_take_every_request(start: Start) -> None:
    cluster = await start("static", settings=GatewaySettings(admission=0.0))
    engine = cluster.engines["i0"]
    engine.hold_prefill = True
    waiting = [asyncio.create_task(cluster.post("/v1/completions", body(2000))) for _ in range(20)]
    await cluster.until(lambda: len(engine.bodies) == 20)
    for task in waiting:
        task.cancel()
    ended = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError | aiohttp.ClientError) for end in ended)


async def test_one_that_would_make_another_miss_gets_429_until_that_one_has_ended(start: Start) -> None:
    """The refused prompt would go before a longer one that is just in time; of 11 s the test takes less."""
    cluster = await start("tidegate", instances=1, step_s=3600.0)
    (engine,) = cluster.engines.values()
    waiting = []
    for tokens, ttft_s in ((20_000, 40), (24_000, 20 + 24 + 11)):
        post = cluster.post("/v1/completions", body(tokens), **{"x-slo-ttft-ms": str(1000 * ttft_s)})
        waiting.append(asyncio.create_task(post))
        await cluster.until(lambda: len(engine.bodies) == len(waiting))
    third = {"x-slo-ttft-ms": "100000"}
    status, answer, headers = await cluster.post("/v1/completions", body(22_000), **third)
    assert status == 429 and "another one would miss" in answer["error"]["message"]
    assert 20 + 24 - 11 < int(headers["Retry-After"]) <= 20 + 24
    engine.step_s = 0.0
    engine.step_now()
    assert [status for status, _, _ in await asyncio.gather(*waiting)] == [200, 200]
    assert (await cluster.post("/v1/completions", body(22_000), **third))[0] == 200

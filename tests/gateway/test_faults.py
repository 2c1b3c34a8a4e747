"""Engines that die, hang, refuse or return; clients that leave. The promised outcome of each."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.gateway.gateway_cluster import Start
from tidegate.core.stages import TTFT_STAGES
from tidegate.gateway.settings import GatewaySettings
from tidegate_testing.fake_engine import token_at

PROMPT = [3, 1, 4, 1, 5]
BODY = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "return_token_ids": True}


def ids(events: list[dict[str, Any]]) -> list[int]:
    return [t for e in events if e.get("choices") for t in e["choices"][0]["token_ids"]]


def outcomes(path: Path) -> list[dict[str, Any]]:
    rows = [orjson.loads(line) for line in (path / "journal.jsonl").read_bytes().splitlines()]
    return [r for r in rows if r["type"] == "outcome"]


@pytest.mark.parametrize("system", ["static", "arrow-lending", "colocated"])
async def test_a_stream_survives_the_death_of_its_instance(start: Start, system: str, tmp_path: Path) -> None:
    cluster = await start(system, instances=4, step_s=0.001)
    tasks = [asyncio.create_task(cluster.stream(BODY)) for _ in range(8)]
    await cluster.until(
        lambda: any(s.position > 5 for e in cluster.engines.values() for s in e.streams.values())
    )
    name, engine = max(cluster.engines.items(), key=lambda item: len(item[1].streams))
    assert engine.streams
    await engine.stop()
    cluster.fleet.down(name)
    for events in await asyncio.gather(*tasks):
        assert ids(events) == [token_at(PROMPT, p) for p in range(40)]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
    await cluster.gateway.stop()
    assert sum(r["replays"] for r in outcomes(tmp_path)) >= 1
    for row in outcomes(tmp_path):
        parts_s = [row["stages"][stage] for stage in TTFT_STAGES]
        assert row["outcome"] == "ok" and min(parts_s) >= 0.0
        assert sum(parts_s) == pytest.approx(row["ttft_s"], abs=3e-6), "stages add up, replayed or not"


async def test_a_death_nobody_reported_is_reported_to_the_fleet(start: Start) -> None:
    cluster = await start("static", instances=4, step_s=0.001)
    task = asyncio.create_task(cluster.stream(BODY))
    await cluster.until(lambda: cluster.streams() == 1)
    name, engine = next((n, e) for n, e in cluster.engines.items() if e.streams)
    await engine.stop()
    await cluster.until(lambda: name in cluster.fleet.suspected)
    cluster.fleet.down(name)
    assert ids(await task) == [token_at(PROMPT, p) for p in range(40)]


async def test_with_every_instance_gone_requests_get_503_and_recovery_needs_no_restart(start: Start) -> None:
    cluster = await start("arrow-lending")
    for name, engine in cluster.engines.items():
        await engine.stop()
        cluster.fleet.down(name)
    status, answer, headers = await cluster.post("/v1/completions", BODY)
    assert (status, answer["error"]["code"]) == (503, "no_instance")
    assert int(headers["Retry-After"]) >= 1
    async with cluster.client.get(cluster.url + "/ready") as response:
        assert response.status == 503
    for name, engine in cluster.engines.items():
        cluster.fleet.up(name, await engine.start())
    assert (await cluster.post("/v1/completions", BODY))[0] == 200


async def test_a_stream_cut_off_for_good_ends_with_a_true_error(start: Start) -> None:
    cluster = await start("static", step_s=0.001, settings=GatewaySettings(request_deadline_s=0.5))
    task = asyncio.create_task(cluster.stream(BODY | {"max_tokens": 100_000}))
    await cluster.until(
        lambda: any(s.position > 3 for e in cluster.engines.values() for s in e.streams.values())
    )
    for name, engine in cluster.engines.items():
        await engine.stop()
        cluster.fleet.down(name)
    events = await task
    assert events[-1]["error"]["code"] == "no_instance"
    got = ids(events[:-1])
    assert got == [token_at(PROMPT, p) for p in range(len(got))]
    assert cluster.live() == 0


async def test_streams_outlive_the_whole_fleet_again_and_again(start: Start, tmp_path: Path) -> None:
    cluster = await start("static", instances=8, step_s=0.001)
    length = 60
    tasks = [asyncio.create_task(cluster.stream(BODY | {"max_tokens": length})) for _ in range(8)]
    for _ in range(3):
        await cluster.until(
            lambda: any(s.position % 20 > 5 for e in cluster.engines.values() for s in e.streams.values())
        )
        for engine in cluster.engines.values():
            await engine.stop()
        # All are dead before the fleet says so of the first, and it says so of one after the other.
        for name in cluster.engines:
            await cluster.until(lambda: bool(cluster.fleet.suspected))
            await asyncio.sleep(0)
            cluster.fleet.down(name)
        cluster.fleet.suspected.clear()
        for name, engine in cluster.engines.items():
            cluster.fleet.up(name, await engine.start())
    for events in await asyncio.gather(*tasks):
        assert ids(events) == [token_at(PROMPT, p) for p in range(length)]
    await cluster.gateway.stop()
    assert {r["outcome"] for r in outcomes(tmp_path)} == {"ok"}


async def test_a_silent_engine_is_left_for_another(start: Start) -> None:
    cluster = await start("static", instances=4, step_s=0.001, settings=GatewaySettings(stall_s=0.3))
    stuck = cluster.engines["i2"]
    stuck.step_s = 3600.0
    results = await asyncio.gather(*(cluster.stream(BODY) for _ in range(4)))
    for events in results:
        assert ids(events) == [token_at(PROMPT, p) for p in range(40)]


async def test_a_client_that_leaves_frees_the_engine_and_the_ledger(start: Start, tmp_path: Path) -> None:
    cluster = await start("static", step_s=0.001)
    for stream in (True, False):
        request = cluster.client.post(
            cluster.url + "/v1/completions",
            data=orjson.dumps(BODY | {"max_tokens": 100000, "stream": stream}),
        )
        task = asyncio.create_task(request.__aenter__())
        await cluster.until(lambda: cluster.streams() == 1)
        if stream:
            (await task).close()
        else:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await cluster.until(lambda: cluster.streams() == 0)
        await cluster.until(lambda: cluster.live() == 0)
    await cluster.gateway.stop()
    assert [r["outcome"] for r in outcomes(tmp_path)] == ["client_gone", "client_gone"]


async def test_a_client_that_leaves_during_prefill_releases_the_pin(start: Start) -> None:
    cluster = await start("static")
    cluster.engines["i0"].hold_prefill = True
    task = asyncio.create_task(cluster.post("/v1/completions", BODY))
    await cluster.until(lambda: bool(cluster.engines["i0"].bodies))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await cluster.until(lambda: bool(cluster.engines["i0"].released))
    assert cluster.engines["i0"].released == [cluster.engines["i0"].bodies[0]["request_id"]]


async def test_an_engine_fault_is_tried_elsewhere_and_a_refusal_is_not(start: Start) -> None:
    cluster = await start("static", instances=4)
    cluster.engines["i0"].fail_with = (500, "boom")
    status, answer, _ = await cluster.post("/v1/completions", BODY)
    assert status == 200
    assert answer["choices"][0]["token_ids"] == [token_at(PROMPT, p) for p in range(40)]
    for engine in cluster.engines.values():
        engine.fail_with = (400, "bad temperature")
        engine.bodies.clear()
    status, answer, _ = await cluster.post("/v1/completions", BODY)
    assert (status, answer["error"]["message"]) == (400, "bad temperature")
    assert sum(len(e.bodies) for e in cluster.engines.values()) == 1


async def test_a_deadline_bounds_the_whole_request(start: Start) -> None:
    cluster = await start("static", step_s=3600.0, settings=GatewaySettings(request_deadline_s=0.2))
    status, answer, _ = await cluster.post("/v1/completions", BODY)
    assert (status, answer["error"]["code"]) == (504, "engine_timeout")
    assert cluster.live() == 0

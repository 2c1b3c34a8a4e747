"""What engines say of their load, over real HTTP: foreign load reaches placements and leaves them again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.gateway.gateway_cluster import Cluster, Start
from tidegate.fleet.member import Capabilities
from tidegate.gateway.loads import Tally
from tidegate.gateway.settings import GatewaySettings

TELLING = Capabilities(tells_load=True)
BODY = {"prompt": [3, 1, 4, 1, 5], "max_tokens": 4, "temperature": 0}


def page(
    running: int, waiting: int = 0, kv_usage: float = 0.0, computed: int = 0, cached: int = 0, pulled: int = 0
) -> str:
    """Return what vLLM's /metrics would say, with a histogram between."""
    label = 'engine="0",model_name="m"'
    sources = {"local_compute": computed, "local_cache_hit": cached, "external_kv_transfer": pulled}
    lines = [
        "# TYPE vllm:num_requests_running gauge",
        f"vllm:num_requests_running{{{label}}} {float(running)}",
        f'vllm:e2e_request_latency_seconds_bucket{{{label},le="+Inf"}} 9.0',
        f"vllm:num_requests_waiting{{{label}}} {float(waiting)}",
        f"vllm:kv_cache_usage_perc{{{label}}} {kv_usage}",
        *(f'vllm:prompt_tokens_by_source_total{{{label},source="{s}"}} {n}.0' for s, n in sources.items()),
    ]
    return "\n".join(lines) + "\n"


def saying(text: str) -> Callable[[], str]:
    return lambda: text


async def state(cluster: Cluster) -> dict[str, Any]:
    """Return the instances' state by id."""
    async with cluster.client.get(cluster.url + "/tidegate/state") as response:
        answer = await response.json()
    return {row["id"]: row for row in answer["instances"]}


async def until(cluster: Cluster, condition: Any) -> dict[str, Any]:
    """Ask for the state until ``condition`` of it holds, and return it; fails after 10 s."""
    async with asyncio.timeout(10):
        while not condition(found := await state(cluster)):
            await asyncio.sleep(0.005)
    return found


def drifts(path: Path, instance: str) -> list[tuple[str, str]]:
    rows = [orjson.loads(line) for line in (path / "journal.jsonl").read_bytes().splitlines()]
    return [(r["kind"], r["event"]) for r in rows if r["type"] == "load_drift" and r["instance"] == instance]


async def test_foreign_load_turns_placements_away_until_it_has_gone(start: Start, tmp_path: Path) -> None:
    cluster = await start(
        "colocated", instances=2, capabilities=TELLING, settings=GatewaySettings(load_every_s=0.01)
    )
    used, free = cluster.engines["i0"], cluster.engines["i1"]
    free.metrics = saying(page(0))
    used.metrics = saying(page(running=5, waiting=2, kv_usage=0.25))
    seen = await until(cluster, lambda s: s["i0"].get("foreign_requests") == 7)
    assert seen["i0"]["load"]["running"] == 5 and seen["i0"]["load"]["kv_share"] == 0.25
    assert seen["i0"]["foreign_tokens"] == seen["i0"]["decode_tokens"] == (1 << 30) // 4
    assert seen["i1"]["foreign_requests"] == 0 and seen["i1"]["drifts"] == {}
    for _ in range(4):
        assert (await cluster.post("/v1/completions", BODY))[0] == 200
    assert len(free.bodies) == 4 and not used.bodies, "the engine that others use was placed on"
    async with cluster.client.get(cluster.url + "/metrics") as response:
        shown = await response.text()
    assert 'tidegate_load_drift_total{kind="requests",member="i0"} 1.0' in shown
    assert 'tidegate_foreign_requests{member="i0"} 7.0' in shown

    used.metrics = saying(page(0))
    seen = await until(cluster, lambda s: s["i0"]["foreign_requests"] == 0)
    assert seen["i0"]["decode_requests"] == seen["i0"]["decode_tokens"] == 0
    assert seen["i0"]["drifts"] == {"requests": 1, "kv": 1}
    await cluster.gateway.stop()
    begun, ended = drifts(tmp_path, "i0")[:2], drifts(tmp_path, "i0")[2:]
    assert begun == [("requests", "begun"), ("kv", "begun")]
    assert ended == [("requests", "ended"), ("kv", "ended")]
    assert drifts(tmp_path, "i1") == []


async def test_the_gateways_own_requests_are_no_drift(start: Start, tmp_path: Path) -> None:
    cluster = await start(
        "colocated",
        instances=1,
        capabilities=TELLING,
        step_s=0.002,
        settings=GatewaySettings(load_every_s=0.005),
    )
    engine = cluster.engines["i0"]
    engine.metrics = lambda: page(len(engine.streams))
    watched = cluster.gateway.dispatcher.loads.watched["i0"]
    seen = []
    own = [asyncio.create_task(cluster.stream(BODY | {"max_tokens": 60 + 20 * n})) for n in range(3)]
    while not all(task.done() for task in own):
        await asyncio.sleep(0.005)
        seen.append(watched.load and watched.load.running)
    assert 3 in seen, "no reading fell into the streams"
    await cluster.gateway.stop()
    assert drifts(tmp_path, "i0") == []


async def test_a_correction_ends_with_the_instance_and_is_not_renewed_by_a_page_that_says_nothing(
    start: Start,
) -> None:
    cluster = await start(
        "static", instances=2, capabilities=TELLING, settings=GatewaySettings(load_every_s=0.01)
    )
    for engine in cluster.engines.values():
        engine.metrics = saying(page(running=3))
    await until(cluster, lambda s: all(row.get("foreign_requests") == 3 for row in s.values()))
    cluster.fleet.down("i0")
    cluster.engines["i0"].metrics = saying("")
    cluster.fleet.up("i0")
    seen = await until(cluster, lambda s: s.get("i0", {}).get("load") is not None)
    assert seen["i0"]["load"]["running"] is None, "what a page does not say is unknown, not nothing"
    assert seen["i0"]["foreign_requests"] == seen["i0"]["decode_requests"] == 0
    assert seen["i1"]["decode_requests"] == 3


async def test_an_engine_whose_load_cannot_be_read_serves_on_and_loses_its_correction(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.gateway.loads.STALE_S", 0.05)
    cluster = await start(
        "static", instances=1, capabilities=TELLING, settings=GatewaySettings(load_every_s=0.01)
    )
    engine = cluster.engines["i0"]
    engine.metrics = saying(page(running=3))
    await until(cluster, lambda s: s["i0"].get("foreign_requests") == 3)
    engine.metrics = saying(page(running=3).replace("3.0", "three"))
    seen = await until(cluster, lambda s: s["i0"]["foreign_requests"] == 0)
    assert seen["i0"]["load"] is None and seen["i0"]["decode_requests"] == 0
    assert (await cluster.post("/v1/completions", BODY))[0] == 200


async def test_where_the_kv_of_prompts_came_from_is_counted_over_restarts(start: Start) -> None:
    cluster = await start(
        "static", instances=2, capabilities=TELLING, settings=GatewaySettings(load_every_s=0.01)
    )
    one, other = cluster.engines.values()
    one.metrics = other.metrics = saying(page(0, computed=1000, pulled=500))
    await until(cluster, lambda s: all(row.get("prompt_tokens") for row in s.values()))
    one.metrics = saying(page(0, computed=1100, cached=30, pulled=900))
    seen = await until(cluster, lambda s: s["i0"]["prompt_tokens"]["pulled"] == 400)
    assert seen["i0"]["prompt_tokens"] == {"computed": 100, "cached": 30, "pulled": 400}
    one.metrics = saying(page(0, computed=7))
    seen = await until(cluster, lambda s: s["i0"]["prompt_tokens"]["computed"] == 107)
    async with cluster.client.get(cluster.url + "/tidegate/state") as response:
        whole = await response.json()
    assert whole["prompt_tokens"] == {"computed": 107, "cached": 30, "pulled": 400}


def test_a_tally_counts_from_its_first_reading() -> None:
    tally = Tally()
    for value in (50, 50, 70, 5, 6):
        tally.read("pulled", value)
    assert tally.totals == {"pulled": 20 + 5 + 1}


async def test_members_that_tell_nothing_are_not_asked(start: Start) -> None:
    cluster = await start("static", instances=1, settings=GatewaySettings(load_every_s=0.01))
    assert "load" not in (await state(cluster))["i0"]
    assert cluster.gateway.dispatcher.loads.watched == {}

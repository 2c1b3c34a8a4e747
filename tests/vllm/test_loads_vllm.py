"""What real servers say of their load: others' requests and pinned KV reach placements, and leave them."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.vllm.through_gateway import COMPLETIONS, Running, ask, client, serving
from tests.vllm.vllm_servers import SERVED_NAME, VllmCluster

OTHERS = 4
GREEDY = {"temperature": 0, "ignore_eos": True}
EXPORT = {"do_remote_decode": True, "do_remote_prefill": False}
UNPINNED_S = 60.0
"""Longer than any lease that the servers know."""

pytestmark = pytest.mark.parametrize("servers_of_arch", ["llama"], indirect=True)


def request(seed: int, max_tokens: int, **more: Any) -> dict[str, Any]:
    prompt = [random.Random(seed).randrange(5, 512) for _ in range(500)]
    return {"model": SERVED_NAME, "prompt": prompt, "max_tokens": max_tokens, **GREEDY, **more}


def drifts(running: Running, instance: str) -> dict[str, int]:
    """Return how often the instance and the ledger came to differ, by kind."""
    counts = running.gateway.dispatcher.loads.drifts.get(instance)
    return {kind.value: count for kind, count in counts.items()} if counts else {}


async def until_unpinned(cluster: VllmCluster) -> None:
    """Wait until what earlier tests left pinned is free."""
    async with asyncio.timeout(UNPINNED_S):
        for server in cluster:
            while (await asyncio.to_thread(server.counters)).kv_cache_usage:
                await asyncio.sleep(0.5)


async def test_load_past_the_gateway_is_seen_avoided_and_forgotten(
    cluster: VllmCluster, tmp_path: Path
) -> None:
    async with client() as session, serving(cluster.urls[:2], tmp_path, system="colocated") as running:
        i0 = running.gateway.dispatcher.loads.watched["i0"].reconciler
        async with AsyncExitStack() as others:
            for seed in range(OTHERS):
                body = orjson.dumps(request(seed, 3000, stream=True))
                await others.enter_async_context(session.post(f"{cluster[0].url}{COMPLETIONS}", data=body))
            await running.until(lambda: i0.foreign_requests == OTHERS and i0.foreign_tokens > 0)
            seen = running.snapshot()
            assert seen.decode_requests[seen.index["i0"]] == OTHERS == seen.decode_requests.sum()
            for seed in range(3):
                said = await ask(session, running.url, COMPLETIONS, request(9 + seed, 8))
                assert said.status == 200, said.error
            assert {row["decode_on"] for row in running.outcomes().values()} == {"i1"}
        await running.until(lambda: i0.foreign_requests == i0.foreign_tokens == 0, UNPINNED_S)
        assert not running.snapshot().decode_requests.any()
        assert drifts(running, "i0")["requests"] == 1
        assert "requests" not in drifts(running, "i1"), "the gateway's own requests are explained"
        rows = [orjson.loads(line) for line in running.journal.read_bytes().splitlines()]
        begun = next(row for row in rows if row["type"] == "load_drift" and row["kind"] == "requests")
        assert (begun["instance"], begun["ledger"], begun["engine"]) == ("i0", 0, OTHERS)


async def test_pinned_kv_takes_room_until_somebody_pulls_it(cluster: VllmCluster, tmp_path: Path) -> None:
    await until_unpinned(cluster)
    prompts = [request(100 + n, 1)["prompt"] for n in range(3)]
    async with serving(cluster.urls[:2], tmp_path, system="colocated") as running:
        i0 = running.gateway.dispatcher.loads.watched["i0"].reconciler
        pinned = [
            await asyncio.to_thread(cluster[0].complete, prompt, 1, kv_transfer_params=EXPORT)
            for prompt in prompts
        ]
        await running.until(lambda: i0.foreign_tokens >= 3 * 500)
        seen = running.snapshot()
        column = seen.index["i0"]
        assert seen.handoff_tokens[column] == i0.foreign_tokens
        assert seen.free_tokens[column] == seen.kv_capacity_tokens[column] - i0.foreign_tokens
        assert seen.decode_requests[column] == 0, "KV that nobody decodes costs no steps"
        for prompt, answer in zip(prompts, pinned, strict=True):
            handle = answer["kv_transfer_params"]
            await asyncio.to_thread(cluster[1].complete, prompt, 2, kv_transfer_params=handle)
        await running.until(lambda: i0.foreign_tokens == 0)
        assert drifts(running, "i0") == {"kv": 1}


async def test_the_gateways_own_handovers_are_no_drift_and_counted_as_pulled(
    cluster: VllmCluster, tmp_path: Path
) -> None:
    await until_unpinned(cluster)
    asked = 8
    async with client() as session, serving(cluster.urls[:2], tmp_path, system="static") as running:
        loads = running.gateway.dispatcher.loads
        await running.until(lambda: all(tally.totals for tally in loads.tallies.values()))
        fresh = time.monotonic_ns()  # prompts that no prefix cache holds
        answers = [ask(session, running.url, COMPLETIONS, request(fresh + n, 400)) for n in range(asked)]
        assert [said.status for said in await asyncio.gather(*answers)] == [200] * asked
        totals = loads.tallies["i1"].totals
        await running.until(lambda: totals["pulled"] == asked * 500)
        assert totals["computed"] == totals["cached"] == 0
        assert drifts(running, "i0") == drifts(running, "i1") == {}

"""A fleet of real engines grows and shrinks under load, and no token is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.live.live_cluster import cluster

OPEN = 8


def bodies(count: int) -> list[dict[str, Any]]:
    """Prompts whose answers are long enough to be under way when the fleet changes."""
    return [
        {
            "prompt": [5 + (n * 37 + k * 11) % 480 for k in range(20 + n)],
            "max_tokens": 60,
            "temperature": 0,
            "ignore_eos": True,
        }
        for n in range(count)
    ]


@pytest.mark.slow
async def test_an_instance_joins_and_one_is_drained_and_stopped_under_load(model_dir: Path) -> None:
    async with cluster(model_dir, "static", instances=2, dtype="float64") as live:
        asked = bodies(OPEN)
        reference = await asyncio.gather(*(live.stream(body) for body in asked))
        upstreams, ledger = live.gateway.dispatcher.upstreams, live.gateway.dispatcher.plane.ledger
        loaded = asyncio.Event()
        done = asyncio.Event()
        rounds = 0

        async def load(body: dict[str, Any]) -> list[Any]:
            """Ask the same again and again until the fleet has changed."""
            nonlocal rounds
            told = []
            while not done.is_set():
                told.append(await live.stream(body))
                rounds += 1
                if rounds >= OPEN:
                    loaded.set()
            return told

        loads = [asyncio.create_task(load(body)) for body in asked]
        await asyncio.wait_for(loaded.wait(), 60)
        async with live.client.post(live.url + "/tidegate/instances", json={"role": "decode"}) as response:
            assert response.status == 200
        await live.until(lambda: "i2" in upstreams)
        assert upstreams["i2"].member.profile == upstreams["i1"].member.profile
        await live.until(lambda: bool(ledger.residents("i2").decodes))

        await live.until(lambda: bool(ledger.residents("i1").decodes))
        pid = upstreams["i1"].member.pid
        drain = live.url + "/tidegate/instances/i1/drain"
        async with live.client.post(drain, json={"remove": True}) as response:
            assert response.status == 200
        await live.until(lambda: "i1" not in upstreams)
        await live.until(lambda: not Path(f"/proc/{pid}").exists())
        done.set()
        for told, expected in zip(await asyncio.gather(*loads), reference, strict=True):
            assert told and all(one == expected for one in told)
        assert sorted(upstreams) == ["i0", "i2"]
        assert live.gateway.dispatcher.metrics.render().count(b"tidegate_replays_total{") == 0
        await live.until_drained()

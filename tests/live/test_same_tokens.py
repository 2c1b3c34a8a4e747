"""Whatever the scheduler does, the tokens are the same.

The engines run in float64: rounding differences between batch shapes are then 1e-15 of a logit, so
greedy decoding is well-defined under any batching (docs/decisions/0005).
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from tests.live.live_cluster import Live, cluster
from tidegate.gateway.settings import GatewaySettings
from tidegate_testing.chaos import Forced

GREEDY, SAMPLED, CHATS = 200, 40, 20
OPEN = 24


def bodies() -> list[dict[str, Any]]:
    """200 random greedy prompts, every fifth with stop strings; then seeded sampling, then chats."""
    rng = random.Random(11)
    made: list[dict[str, Any]] = []
    for index in range(GREEDY + SAMPLED):
        made.append(
            {
                "prompt": [rng.randrange(5, 500) for _ in range(rng.randrange(3, 120))],
                "max_tokens": rng.randrange(2, 48),
                "temperature": 0,
                "ignore_eos": True,
            }
        )
        if index >= GREEDY:
            made[-1] |= {"temperature": 0.9, "top_p": 0.95, "seed": index, "ignore_eos": False}
        elif index % 5 == 0:
            made[-1]["stop"] = ["a", " s", "er"]
    for index in range(CHATS):
        content = " ".join(rng.choice(("tide", "gate", "moon", "Flut")) for _ in range(1 + index))
        made.append({"messages": [{"role": "user", "content": content}], "max_tokens": 24, "temperature": 0})
    rng.shuffle(made)
    return made


async def run_all(live: Live) -> list[tuple[list[int], str]]:
    """Stream every prompt, OPEN at a time."""
    gate = asyncio.Semaphore(OPEN)

    async def one(body: dict[str, Any]) -> tuple[list[int], str]:
        async with gate:
            return await live.stream(body)

    return await asyncio.gather(*(one(body) for body in bodies()))


@pytest.mark.slow
async def test_200_prompts_get_identical_tokens_under_every_regime(model_dir: Path) -> None:
    async with cluster(model_dir, "colocated", dtype="float64") as live:
        reference = await run_all(live)
        await live.until_drained()

    async with cluster(model_dir, "static", dtype="float64") as live:
        assert await run_all(live) == reference
        stats = await live.engine_stats()
        assert sum(s["pulled_prompt_tokens"] for s in stats.values()) > 0, "KV moved between processes"
        await live.until_drained()

    forced = Forced(flip_every_s=0.2, migrate_every_s=0.05)
    async with cluster(model_dir, "arrow-lending", dtype="float64", forced=forced) as live:
        assert await run_all(live) == reference
        assert live.gateway.dispatcher.flips >= 3
        assert b'tidegate_migrations_total{event="done"}' in live.gateway.dispatcher.metrics.render()
        await live.until_drained()

    rng = random.Random(5)
    async with cluster(
        model_dir, "arrow-lending", dtype="float64", settings=GatewaySettings(replays=20, admission=0.0)
    ) as live:
        killed: list[str] = []
        total = sum(len(ids) for ids, _ in reference)
        due = [total // 10, total // 3, total + total // 10, total + total // 3]

        def kill_when_due() -> None:
            alive = len(live.gateway.dispatcher.upstreams)
            if len(killed) < len(due) and live.tokens_seen >= due[len(killed)] and alive > 1:
                killed.append(live.kill_one(rng))

        live.watchers.append(kill_when_due)
        for kills in (2, 4):
            assert await run_all(live) == reference
            assert len(killed) == kills
            await live.until(lambda: len(live.gateway.dispatcher.upstreams) == 3)
        await live.until_drained()
        assert not live.gateway.dispatcher.plane.requests

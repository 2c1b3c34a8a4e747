"""Whatever the scheduler does, the tokens are the same.

The engines run in float64: rounding differences between batch shapes are then 1e-15 of a logit, so
greedy decoding is well-defined under any batching (docs/decisions/0005).
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

from tests.live.conftest import Live, cluster

PROMPTS = 200
OPEN = 24


def bodies() -> list[dict[str, Any]]:
    """200 random prompts: three of four greedy, the rest sampled with a seed; some with stop strings."""
    rng = random.Random(11)
    made = []
    for index in range(PROMPTS):
        body: dict[str, Any] = {
            "prompt": [rng.randrange(5, 500) for _ in range(rng.randrange(3, 120))],
            "max_tokens": rng.randrange(2, 48),
            "temperature": 0,
        }
        if index % 4 == 3:
            body |= {"temperature": 0.9, "top_p": 0.95, "seed": index}
        else:
            body |= {"ignore_eos": True}
        made.append(body)
    return made


async def run_all(live: Live) -> list[tuple[list[int], str]]:
    """Stream every prompt, OPEN at a time."""
    gate = asyncio.Semaphore(OPEN)

    async def one(body: dict[str, Any]) -> tuple[list[int], str]:
        async with gate:
            return await live.stream(body)

    return await asyncio.gather(*(one(body) for body in bodies()))


async def test_200_prompts_get_identical_tokens_under_every_regime(model_dir: Path) -> None:
    async with cluster(model_dir, "colocated", dtype="float64") as live:
        reference = await run_all(live)
        await live.until_drained()

    async with cluster(model_dir, "static", dtype="float64") as live:
        assert await run_all(live) == reference
        stats = await live.engine_stats()
        assert sum(s["pulled_prompt_tokens"] for s in stats.values()) > 0, "KV moved between processes"
        await live.until_drained()

    async with cluster(model_dir, "arrow", dtype="float64", flip_every_s=0.2) as live:
        assert await run_all(live) == reference
        assert live.gateway.scheduler.flips >= 3
        await live.until_drained()

    rng = random.Random(5)
    async with cluster(model_dir, "arrow", dtype="float64", recovery_s=60.0) as live:
        killed: list[str] = []
        total = sum(len(ids) for ids, _ in reference)
        thresholds = [total // 10, total // 3, total // 2]

        def kill_when_due() -> None:
            if len(killed) < len(thresholds) and live.tokens_seen >= thresholds[len(killed)]:
                killed.append(live.kill_one(rng) if live.gateway.scheduler.upstreams else "")

        live.watchers.append(kill_when_due)
        assert await run_all(live) == reference
        assert len(killed) == len(thresholds)
        await live.until(lambda: len(live.gateway.scheduler.upstreams) == 3)
        await live.until_drained()
        assert live.gateway.scheduler.in_flight == 0

"""Running decodes move between real engines in stages, and no client can tell."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.live.live_cluster import Live, cluster
from tidegate.gateway.settings import GatewaySettings
from tidegate_testing.chaos import Forced

OPEN = 24


def bodies(count: int) -> list[dict[str, Any]]:
    """Greedy requests and seeded ones in turn, every tenth with stop strings."""
    rng = random.Random(3)
    made: list[dict[str, Any]] = []
    for index in range(count):
        sampling: dict[str, Any] = {"temperature": 0}
        if index % 2:
            sampling = {"temperature": 0.9, "top_p": 0.95, "seed": index}
        if index % 10 == 0:
            sampling["stop"] = ["tide", "er s", "q"]
        prompt = [rng.randrange(5, 500) for _ in range(rng.randrange(3, 200))]
        made.append(
            {"prompt": prompt, "max_tokens": rng.randrange(30, 90), "ignore_eos": bool(index % 3), **sampling}
        )
    return made


async def run_all(live: Live, asked: list[dict[str, Any]]) -> list[tuple[list[int], str]]:
    gate = asyncio.Semaphore(OPEN)

    async def one(body: dict[str, Any]) -> tuple[list[int], str]:
        async with gate:
            return await live.stream(body)

    return await asyncio.gather(*(one(body) for body in asked))


@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
async def test_random_migrations_change_no_token(model_dir: Path, tmp_path: Path, count: int) -> None:
    asked = bodies(count)
    async with cluster(model_dir, "colocated", instances=1, dtype="float64") as live:
        reference = await run_all(live, asked)
    journal = tmp_path / "journal.jsonl"
    settings = GatewaySettings(admission=0.0, journal=journal)
    forced = Forced(migrate_every_s=0.05)
    async with cluster(model_dir, "static", dtype="float64", settings=settings, forced=forced) as live:
        assert await run_all(live, asked) == reference
        await live.until_drained()
        ledger = live.gateway.dispatcher.plane.ledger
        ledger.check_integrity()
        pauses_s = dict(zip(ledger.ids, ledger.snapshot(0.0).move_pause_s.tolist(), strict=True))
    rows = [orjson.loads(line) for line in journal.read_bytes().splitlines()]
    moves = [row for row in rows if row["type"] == "migration"]
    done = [row for row in moves if row["event"] == "done"]
    assert len(done) > count / 10
    assert all(row["stages"] >= 1 and row["pause_s"] > 0 and row["moved_bytes"] > 0 for row in done)
    for name, pause_s in pauses_s.items():
        measured = [row["pause_s"] for row in done if row["to"] == name]
        assert min(measured, default=0.0) <= pause_s + 1e-3 and pause_s <= max(measured, default=0.0) + 1e-3
    assert not any(row["type"] == "failure" for row in rows)

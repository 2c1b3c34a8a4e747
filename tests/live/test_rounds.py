"""Conversations whose rounds are prefilled and decoded anywhere, moved and evicted: the same tokens."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.live.live_cluster import Live, cluster
from tests.slow import examples
from tidegate.gateway.settings import GatewaySettings
from tidegate_testing.chaos import Forced
from tidegate_testing.rounds import anywhere, converse

ROUNDS = 6


async def ask_all(live: Live, sessions: int) -> list[list[list[int]]]:
    async def ask(body: dict[str, Any], headers: Mapping[str, str]) -> list[int]:
        return (await live.stream(body, dict(headers)))[0]

    return await converse(ask, sessions, ROUNDS)


@pytest.mark.parametrize("sessions", [10, pytest.param(examples(100), marks=pytest.mark.slow)])
async def test_rounds_run_anywhere_say_the_same(model_dir: Path, tmp_path: Path, sessions: int) -> None:
    settings = GatewaySettings(admission=0.0, trusted_proxies=("127.0.0.1",))
    async with cluster(model_dir, "colocated", instances=1, dtype="float64", settings=settings) as live:
        reference = await ask_all(live, sessions)
    journal = tmp_path / "journal.jsonl"
    settings = replace(settings, journal=journal)
    forced = Forced(migrate_every_s=0.2)
    system = anywhere(random.Random(sessions).randrange(1000))
    async with cluster(
        model_dir, system, dtype="float64", settings=settings, forced=forced, kv_memory_mb=4
    ) as live:
        assert await ask_all(live, sessions) == reference
        await live.until_drained()
        plane = live.gateway.dispatcher.plane
        plane.ledger.check_integrity()
    rows = [orjson.loads(line) for line in journal.read_bytes().splitlines()]
    events = Counter(row["event"] for row in rows if row["type"] == "session")
    read = sum(row.get("read_back_tokens", 0) for row in rows if row["type"] == "outcome")
    assert read > 0 and events["bound"] > sessions
    assert sessions < 100 or plane.migrations["done"] > 0, "with few sessions a fast machine may move none"

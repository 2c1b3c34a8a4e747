"""Conversations whose rounds are prefilled and decoded anywhere, moved and evicted: the same tokens."""

from __future__ import annotations

import asyncio
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


async def chat_all(live: Live, chats: int) -> list[list[str]]:
    """Hold greedy chats that send no session id; return their answers."""

    async def one(number: int) -> list[str]:
        said: list[dict[str, str]] = []
        for turn in range(4):
            said.append(
                {"role": "user", "content": f"{number}, turn {turn}: " + "why? " * (10 * (number + 1))}
            )
            body = {"messages": said, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
            async with live.client.post(live.url + "/v1/chat/completions", json=body) as response:
                assert response.status == 200, await response.text()
                answer = (await response.json())["choices"][0]["message"]
            said.append({"role": "assistant", "content": answer["content"]})
        return [message["content"] for message in said[1::2]]

    return await asyncio.gather(*(one(number) for number in range(chats)))


async def test_chats_that_name_no_session_have_their_history_read(model_dir: Path, tmp_path: Path) -> None:
    settings = GatewaySettings(admission=0.0, journal=tmp_path / "journal.jsonl")
    async with cluster(model_dir, "colocated", instances=1, dtype="float64") as live:
        reference = await chat_all(live, 4)
    async with cluster(
        model_dir, anywhere(0, local=0.2, read=1.0), dtype="float64", settings=settings
    ) as live:
        assert await chat_all(live, 4) == reference
        assert live.gateway.dispatcher.plane.snapshot(0.0).sessions.turns.tolist() == [4] * 4
        await live.until_drained()
        prefixes = live.gateway.dispatcher.prefixes
    lines = (tmp_path / "journal.jsonl").read_bytes().splitlines()
    assert sum(orjson.loads(line).get("read_back_tokens", 0) for line in lines) > 0
    off = prefixes.predicted_tokens / prefixes.reported_tokens - 1
    assert abs(off) < 0.05, "answers of random weights are tokenised again as other tokens"


async def ask(live: Live, prompt: list[int], tenant: str = "a") -> tuple[list[int], int]:
    """Have a turn of the one session answered; return its ids, and how much of its prompt was cached."""
    body = {
        "prompt": prompt,
        "max_tokens": 10,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    headers = {"x-session-id": "s", "x-tenant-id": tenant}
    async with live.client.post(live.url + "/v1/completions", json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        answer = await response.json()
    return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


async def misuse(live: Live) -> list[list[int]]:
    """Use one session as no client should; return what was answered."""
    said = [5 + 7 * at % 400 for at in range(96)]
    first, _ = await ask(live, said)
    history = said + first
    at_once = await asyncio.gather(ask(live, [*history, 11, 12]), ask(live, [*history, 13]))
    foreign, cached = await ask(live, [*history, 11, 12], "b")
    assert cached == 0, "another tenant's KV"
    again, _ = await ask(live, [*history, 11, 12])
    assert foreign == again == at_once[0][0]
    contradicting, _ = await ask(live, said[:48] + [9] * 40)
    return [first, *(ids for ids, _ in at_once), again, contradicting]


async def test_a_session_that_contradicts_itself_overlaps_or_is_two_tenants_is_served_right(
    model_dir: Path, tmp_path: Path
) -> None:
    settings = GatewaySettings(
        admission=0.0, trusted_proxies=("127.0.0.1",), journal=tmp_path / "journal.jsonl"
    )
    async with cluster(model_dir, "colocated", instances=1, dtype="float64", settings=settings) as live:
        reference = await misuse(live)
    system = anywhere(0, local=0.0, read=1.0)
    settings = replace(settings, journal=tmp_path / "anywhere.jsonl")
    async with cluster(model_dir, system, dtype="float64", settings=settings) as live:
        assert await misuse(live) == reference
        await live.until_drained()
    rows = [orjson.loads(line) for line in (tmp_path / "anywhere.jsonl").read_bytes().splitlines()]
    said = [(row["event"], row.get("tenant", "")) for row in rows if row["type"] == "session"]
    assert ("shortened", "a") in said and ("overlaps", "a") in said
    read = [row.get("read_back_tokens", 0) for row in rows if row["type"] == "outcome"]
    assert read[-1] <= 48 < max(read[1:-1]), "what contradicts the history is not read"

"""Decodes that move at every position around a block's boundary, where vLLM's pulls are easily wrong."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.vllm.through_gateway import COMPLETIONS, Json, Said, ask, client, record_legs, serving
from tests.vllm.vllm_servers import BLOCK_TOKENS, SERVED_NAME, VllmCluster

PROMPTS = (31, 32, 33, 63, 64, 65)
OUTPUT = 40
NEAR = (-2, -1, 0, 1, 2)
IN_FLIGHT = 6


def positions(prompt_tokens: int) -> list[int]:
    """Return how many tokens of output there are near each boundary."""
    boundaries = range(BLOCK_TOKENS, prompt_tokens + OUTPUT, BLOCK_TOKENS)
    found = {boundary + near - prompt_tokens for boundary in boundaries for near in NEAR}
    return sorted(at for at in found if 1 <= at < OUTPUT - 1)


async def test_a_decode_moves_anywhere_near_a_boundary(
    cluster: VllmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only tokens that are whole characters: a decode moves only where its text is whole.
    letters = cluster[0].post(
        "/tokenize", {"model": SERVED_NAME, "prompt": "tidegate moves", "add_special_tokens": False}
    )["tokens"]
    chance = random.Random(3)
    bodies: list[tuple[Json, int]] = []
    for tokens in PROMPTS:
        for position in positions(tokens):
            body: Json = {"model": SERVED_NAME, "temperature": 0, "ignore_eos": True, "max_tokens": OUTPUT}
            body |= {"prompt": [chance.randrange(5, 512) for _ in range(tokens)], "return_token_ids": True}
            body |= {"allowed_token_ids": sorted(set(letters))}
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            bodies.append((body, position))
    runs = record_legs(monkeypatch)
    free = asyncio.Semaphore(IN_FLIGHT)
    async with client() as session, serving(cluster.urls, tmp_path, system="static") as running:

        async def moved_at(body: Json, position: int) -> Said:
            told = False

            def each(said: Said) -> None:
                nonlocal told
                if not told and len(said.ids) >= position - 1:
                    told = running.move(said.id)

            async with free:
                return await ask(session, running.url, COMPLETIONS, body, each)

        answers = await asyncio.gather(*(moved_at(body, position) for body, position in bodies))
        alone = [
            await ask(session, cluster[0].url, COMPLETIONS, body | {"cache_salt": "alone"})
            for body, _ in bodies
        ]
        for (body, position), said, expected in zip(bodies, answers, alone, strict=True):
            assert said.told() == expected.told(), (len(body["prompt"]), position)
        # Not all: a server that is busy sends several tokens in a piece, of which only the last one is known.
        assert running.metric("tidegate_migrations_total", event="done") > len(bodies) / 5
    held = {run.handle.tokens % BLOCK_TOKENS for run in runs if run.handle is not None and run.leg.generated}
    assert {BLOCK_TOKENS - 1, 0, 1} <= held, "decodes moved right at boundaries"

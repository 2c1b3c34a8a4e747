"""Requests whose next token depends on more than the tokens before it, and sampled ones where it does not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.vllm.through_gateway import CHAT, COMPLETIONS, Json, ask, client, serving
from tests.vllm.vllm_servers import SERVED_NAME, VllmCluster
from tidegate_testing.chaos import Forced

BASE: Json = {"model": SERVED_NAME, "ignore_eos": True, "max_tokens": 80, "return_token_ids": True}
ROUTES: list[tuple[str, Json]] = [
    (COMPLETIONS, BASE | {"prompt": list(range(10, 110))}),
    (CHAT, BASE | {"messages": [{"role": "user", "content": "Say something else, 漢字."}]}),
]
STATES: list[tuple[str, Json]] = [
    ("seed", {"temperature": 1.0, "seed": 7}),
    ("presence_penalty", {"temperature": 0, "presence_penalty": 1.5}),
    ("frequency_penalty", {"temperature": 0, "frequency_penalty": 1.5}),
    ("response_format", {"temperature": 0, "response_format": {"type": "json_object"}}),
    ("bad_words", {"temperature": 0, "bad_words": ["the", "at"]}),
]
llama_only = pytest.mark.parametrize("servers_of_arch", ["llama"], indirect=True)


@llama_only
@pytest.mark.parametrize(("state", "fields"), STATES, ids=[name for name, _ in STATES])
async def test_state_does_not_move_and_is_kept(
    cluster: VllmCluster, tmp_path: Path, state: str, fields: Json
) -> None:
    async with (
        client() as session,
        serving(cluster.urls, tmp_path, forced=Forced(migrate_every_s=0.01)) as running,
    ):
        for path, body in ROUTES:
            asked = body | fields
            expected = await ask(session, cluster[0].url, path, asked | {"cache_salt": "alone"})
            for stream in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
                said = await ask(session, running.url, path, asked | stream)
                assert said.told() == expected.told()
        outcomes = running.outcomes().values()
    assert [(row.get("unmovable"), row["migrations"]) for row in outcomes] == [(state, 0)] * 4


@llama_only
async def test_a_sampled_answer_without_a_seed_moves(cluster: VllmCluster, tmp_path: Path) -> None:
    sampled = {"temperature": 1.0, "stream": True}
    async with (
        client() as session,
        serving(cluster.urls, tmp_path, forced=Forced(migrate_every_s=0.01)) as running,
    ):
        answers = await asyncio.gather(
            *(ask(session, running.url, path, body | sampled) for path, body in ROUTES for _ in range(4))
        )
        outcomes = list(running.outcomes().values())
    assert all(len(said.ids) == 80 and said.finish_reason == "length" for said in answers)
    assert len({tuple(said.ids) for said in answers}) == len(answers), "no two draw the same numbers"
    assert sum(row["migrations"] for row in outcomes) > len(answers)
    assert not any(row.get("unmovable") for row in outcomes)

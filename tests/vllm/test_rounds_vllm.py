"""Later rounds of a conversation: what was decoded elsewhere is read back, and only the rest computed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.vllm.through_gateway import COMPLETIONS, Json, ask, client, serving
from tests.vllm.vllm_servers import BLOCK_TOKENS, SERVED_NAME, Counters, VllmCluster

FIRST, SAID, NEW = 300, 120, 50
OUTPUT = 30


async def test_a_round_computes_only_its_new_tokens(cluster: VllmCluster, tmp_path: Path) -> None:
    chance = random.Random(9)
    history = [chance.randrange(5, 512) for _ in range(FIRST)]
    new = [chance.randrange(5, 512) for _ in range(NEW)]
    async with client() as session, serving(cluster.urls, tmp_path, system="static", profiles=()) as running:
        labels = running.gateway.dispatcher.plane.membership.labels
        (prefills,) = (n for n, name in enumerate(labels) if labels[name].label == "prefill")

        async def round_of(prompt: list[int], tokens: int) -> tuple[list[int], list[Counters], Json]:
            body: Json = {"model": SERVED_NAME, "temperature": 0, "ignore_eos": True, "max_tokens": tokens}
            body |= {"prompt": prompt, "return_token_ids": True}
            alone = await ask(session, cluster[prefills].url, COMPLETIONS, body | {"cache_salt": "alone"})
            before = [server.counters() for server in cluster]
            said = await ask(session, running.url, COMPLETIONS, body, headers={"x-session-id": "talk"})
            assert said.told() == alone.told()
            spent = [server.counters() - then for server, then in zip(cluster, before, strict=True)]
            return said.ids, spent, running.outcomes()[said.id]

        answer, spent, _ = await round_of(history, SAID)
        assert (spent[prefills].computed_tokens, spent[prefills].pulled_tokens) == (FIRST, 0)

        history = [*history, *answer, *new]
        _, spent, row = await round_of(history, OUTPUT)
        prefill = spent[prefills]
        assert row["read_back_tokens"] == FIRST + SAID - 1, "the last token said has no KV"
        assert prefill.computed_tokens == NEW + 1, "of all that came before nothing is computed again"
        assert prefill.cached_tokens == FIRST // BLOCK_TOKENS * BLOCK_TOKENS
        assert prefill.pulled_tokens == FIRST + SAID - 1 - prefill.cached_tokens
        others = sum(server.computed_tokens for server in spent) - prefill.computed_tokens
        assert others <= BLOCK_TOKENS, "whoever decoded it computes the end of a block, to pin it"


@pytest.mark.parametrize("servers_of_arch", ["llama"], indirect=True)
async def test_without_a_session_the_prefill_computes_what_was_said(
    cluster: VllmCluster, tmp_path: Path
) -> None:
    chance = random.Random(10)
    history = [chance.randrange(5, 512) for _ in range(FIRST)]
    async with client() as session, serving(cluster.urls, tmp_path, system="static", profiles=()) as running:
        body: Json = {"model": SERVED_NAME, "temperature": 0, "ignore_eos": True, "max_tokens": SAID}
        body |= {"return_token_ids": True}
        answer = await ask(session, running.url, COMPLETIONS, body | {"prompt": history})
        before = [server.counters() for server in cluster]
        await ask(session, running.url, COMPLETIONS, body | {"prompt": [*history, *answer.ids, 7]})
        spent = [server.counters() - then for server, then in zip(cluster, before, strict=True)]
        assert sum(server.computed_tokens for server in spent) >= SAID

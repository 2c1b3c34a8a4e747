"""Whatever becomes of a request, its answer is the one that a single server gives, and its KV moves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.vllm.mixed_requests import Asked, mixed_requests
from tests.vllm.through_gateway import LegRun, Running, Said, ask, client, record_legs, serving
from tests.vllm.vllm_servers import BLOCK_TOKENS, MODELS, Counters, VllmCluster
from tidegate_testing.chaos import Forced

REQUESTS = 500
IN_FLIGHT = 12


async def test_flips_and_migrations_change_no_answer(
    cluster: VllmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = record_legs(monkeypatch)
    free = asyncio.Semaphore(IN_FLIGHT)
    async with client() as session:
        wanted = await mixed_requests(session, cluster[0], REQUESTS, seed=11)
        before = [server.counters() for server in cluster]
        async with serving(
            cluster.urls, tmp_path, forced=Forced(flip_every_s=0.2, migrate_every_s=0.02, seed=5)
        ) as running:

            async def through(asked: Asked) -> Said:
                async with free:
                    return await ask(session, running.url, asked.path, asked.body)

            answers = await asyncio.gather(*(through(asked) for asked in wanted))
            spent = [server.counters() - then for server, then in zip(cluster, before, strict=True)]
            moved = running.metric("tidegate_migrations_total", event="done")
            flips = running.gateway.dispatcher.flips
            replays = running.metric("tidegate_replays_total")
            recomputed = most_recomputed(runs, running, spent)

    pairs = list(zip(wanted, answers, strict=True))
    differing = [(asked, said.told()) for asked, said in pairs if said.told() != asked.expected.told()]
    assert not differing, (len(differing), *differing[:3])
    for asked, said in pairs:
        assert said.logprobs == pytest.approx(asked.expected.logprobs, abs=1e-3)
    assert moved > REQUESTS / 10 and flips > 20 and replays <= moved / 100
    pulled = sum(counters.pulled_tokens for counters in spent)
    assert pulled > 0.5 * sum(len(asked.expected.ids) for asked in wanted)
    assert pulled >= 0.95 * (pulled + recomputed), (pulled, recomputed)
    assert sum(counters.nixl_bytes for counters in spent) >= pulled * kv_bytes_per_token(cluster)


def most_recomputed(runs: Sequence[LegRun], running: Running, spent: Sequence[Counters]) -> float:
    """Return the most prompt tokens that servers can have computed although a handle covered them.

    What could be pulled is, of every leg with a handle, what the handle covers and the server has not in its
    own cache. There it was either pulled, which the servers count, or computed. What the servers computed
    in all is counted, too, so that leaves what legs without a handle had to compute: the whole prompt of a
    request's first leg; of one that is answered whole, what its answer does not call cached; and of a stream
    that stays where it was, what is behind the last full block. All else counts as KV that was not pulled.
    """
    prompts = {request: row["input_length"] for request, row in running.outcomes().items()}
    begun: set[str] = set()
    had_to = 0.0
    for run in runs:
        tokens = prompts[run.request] + run.leg.generated
        if run.handle is not None:
            assert not run.leg.pin and run.handle.tokens == tokens
        elif run.leg.pin:
            had_to += 0 if run.end is None else tokens - run.end.times.cached_tokens
        elif run.request not in begun:
            had_to += tokens
        else:
            had_to += tokens - (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        begun.add(run.request)
    return sum(counters.computed_tokens for counters in spent) - had_to


def kv_bytes_per_token(cluster: VllmCluster) -> int:
    """Keys and values of all layers, in float32."""
    config = json.loads((MODELS / f"tiny-{cluster[0].options.arch}" / "config.json").read_text())
    heads, size = config["num_key_value_heads"], config["head_dim"]
    return 2 * int(config["num_hidden_layers"]) * int(heads) * int(size) * 4

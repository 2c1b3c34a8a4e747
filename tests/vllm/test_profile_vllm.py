"""A profile measured on real servers, and a gateway that goes by it."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.vllm.vllm_servers import SERVED_NAME, Counters, VllmCluster, VllmServer
from tidegate.cli import launch
from tidegate.cli.sources import resolve
from tidegate.costs.saved_profile import read_profile, save_profile
from tidegate.fleet.member import LEASE_S
from tidegate.gateway.run import Gateway
from tidegate.gateway.settings import GatewaySettings
from tidegate.profiling.links import BY_BOTH, BY_ENGINE
from tidegate.profiling.run import ProbeSettings, measure

KV_BYTES_PER_TOKEN = 2 * 2 * 4 * 32 * 4
"""Of the tiny Llama: keys and values, layers, KV heads, head size, bytes of a float32."""


@pytest.mark.parametrize("servers_of_arch", ["llama"], indirect=True)
async def test_placements_go_by_a_profile_of_real_servers(cluster: VllmCluster, tmp_path: Path) -> None:
    urls = cluster.urls[:2]
    before = [server.counters() for server in cluster][:2]
    saved = await measure(ProbeSettings(urls, budget_s=20.0), lambda share, what, fresh: None)
    file = tmp_path / "pair.json"
    save_profile(file, saved)

    assert saved.engine.startswith("vllm 0.") and saved.model == SERVED_NAME
    assert read_profile(file) == saved
    assert not any("of others meanwhile" in note for note in saved.notes)
    assert {(link.source, link.target) for link in saved.links} == {tuple(urls), tuple(urls[::-1])}
    assert {link.by for link in saved.links} <= {BY_BOTH, BY_ENGINE}
    assert saved.kv_bytes_per_token == KV_BYTES_PER_TOKEN
    profile = saved.profile
    assert 0 < profile.prefill_s(64) < profile.prefill_s(2048)
    assert profile.prefill_s(2048, 2048) < profile.prefill_s(4096), "what is cached costs less"
    for server, then in zip(cluster, before, strict=False):
        now = await _idle(server)
        assert (now.running, now.waiting, now.kv_cache_usage) == (0, 0, 0), "nothing stays pinned"
        assert (now - then).nixl_bytes > 0

    given: dict[str, Any] = {"vllm": urls, "profile": [str(file)], "system": "arrow-lending"}
    config = resolve(None, {}, given, warn=lambda text: None).config
    gateway = Gateway(
        GatewaySettings(port=0, admission=0.0),
        launch.make_fleet(config, config.make_system()),
        config.make_system(),
    )
    url = await gateway.start()
    try:
        prompts = [_prompt(seed) for seed in range(20)]
        async with aiohttp.ClientSession() as session:
            answers = await asyncio.gather(*(_complete(session, url, prompt) for prompt in prompts))
    finally:
        await gateway.stop()
    loop = asyncio.get_running_loop()
    for prompt, ids in zip(prompts, answers, strict=True):
        assert ids == await loop.run_in_executor(None, cluster[2].reference, prompt, len(ids))


async def _idle(server: VllmServer) -> Counters:
    """Read the counters until nothing is held, for less than a lease takes to end by itself."""
    began_s = time.monotonic()
    while True:
        now = server.counters()
        if not (now.running or now.waiting or now.kv_cache_usage) or time.monotonic() - began_s > LEASE_S / 3:
            return now
        await asyncio.sleep(0.1)


def _prompt(seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(5, 500) for _ in range(chance.randrange(20, 300))]


async def _complete(session: aiohttp.ClientSession, url: str, prompt: list[int]) -> list[int]:
    body: dict[str, Any] = {"model": SERVED_NAME, "prompt": prompt, "max_tokens": 24, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
    ids: list[int] = answer["choices"][0]["token_ids"]
    assert len(ids) == 24
    return ids

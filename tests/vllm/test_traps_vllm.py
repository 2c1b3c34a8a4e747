"""What goes wrong between vLLM servers when a router sends what it should not, and that ours cannot.

Each test shows the trap itself on bare servers, and then the same situation through the gateway.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.through_gateway import COMPLETIONS, Running, ask, client, record_legs, serving
from tests.vllm.vllm_servers import (
    BLOCK_TOKENS,
    SERVED_NAME,
    ServerOptions,
    VllmCluster,
    VllmServer,
    nixl_variant,
)
from tidegate.engines.vllm.connector import MARGIN_S
from tidegate.fleet.vllm import KvSetup, nixl_config
from tidegate.policies.protocols import Signal
from tidegate_testing.chaos import Forced

Json = dict[str, Any]
EXPORT = {"do_remote_decode": True, "do_remote_prefill": False}
AS_PREFILL = {"do_remote_decode": False, "do_remote_prefill": True}
OUTPUT = 20
HANG_S = 8.0
"""A request that takes so long hangs: vLLM gives a dead peer 5 s."""
SHORT_LEASE_S = 8


def prompt_ids(tokens: int) -> list[int]:
    """Return a prompt that no cache knows."""
    chance = random.Random(time.monotonic_ns())
    return [chance.randrange(5, 512) for _ in range(tokens)]


def export(server: VllmServer, prompt: list[int], max_tokens: int = 1) -> tuple[list[int], Json]:
    """Generate and pin; return the tokens and the handle."""
    answer = server.complete(prompt, max_tokens, kv_transfer_params=EXPORT)
    params: Json = answer["kv_transfer_params"]
    return answer["choices"][0]["token_ids"], params


def pull(server: VllmServer, prompt: list[int], handle: Json, **flags: bool) -> list[int]:
    """Generate from a handle."""
    answer = server.post(
        COMPLETIONS,
        greedy(prompt, OUTPUT) | {"kv_transfer_params": handle | flags},
        timeout_s=HANG_S,
    )
    ids: list[int] = answer["choices"][0]["token_ids"]
    return ids


def greedy(prompt: list[int], max_tokens: int) -> Json:
    body: Json = {"model": SERVED_NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    return body | {"ignore_eos": True, "return_token_ids": True}


async def served_right(running: Running, reference: VllmServer, prompts: list[list[int]]) -> None:
    """Assert that the gateway's answers are those of one server."""
    async with client() as session:
        answers = await asyncio.gather(
            *(ask(session, running.url, COMPLETIONS, greedy(prompt, OUTPUT)) for prompt in prompts)
        )
    for prompt, said in zip(prompts, answers, strict=True):
        assert said.error is None
        assert said.ids == await in_thread(reference.reference, prompt, OUTPUT)


async def in_thread(call: Any, *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, call, *args)


llama_only = pytest.mark.parametrize("servers_of_arch", ["llama"], indirect=True)


@llama_only
class TestOnSharedServers:
    def test_kv_of_more_tokens_than_a_prompt_has_makes_wrong_tokens(self, cluster: VllmCluster) -> None:
        prompt = prompt_ids(300)
        _, handle = export(cluster[0], prompt)
        shorter = prompt[:200]
        assert pull(cluster[1], shorter, handle, **EXPORT) != cluster[1].reference(shorter, OUTPUT)

    def test_kv_of_fewer_tokens_than_a_prompt_has_makes_wrong_tokens(self, cluster: VllmCluster) -> None:
        prompt = prompt_ids(300)
        _, handle = export(cluster[0], prompt)
        longer = prompt + prompt_ids(10)
        assert pull(cluster[1], longer, handle, **AS_PREFILL) != cluster[1].reference(longer, OUTPUT)

    def test_a_server_fails_on_its_own_handle(self, cluster: VllmCluster) -> None:
        prompt = prompt_ids(100)
        _, handle = export(cluster[0], prompt)
        with pytest.raises(urllib.error.HTTPError, match="500"):
            pull(cluster[0], prompt, handle, **AS_PREFILL)

    @pytest.mark.parametrize("stale", [{"remote_engine_id": "none"}, {"remote_port": 9}])
    def test_a_peer_that_is_gone_costs_seconds_and_the_request(
        self, cluster: VllmCluster, stale: Json
    ) -> None:
        prompt = prompt_ids(100)
        _, handle = export(cluster[0], prompt)
        began_s = time.monotonic()
        gone = handle | {"remote_engine_id": "none"} | stale
        with pytest.raises(urllib.error.HTTPError, match="500"):
            pull(cluster[1], prompt, gone, **AS_PREFILL)
        assert time.monotonic() - began_s < HANG_S
        assert cluster[1].healthy()

    async def test_the_gateway_sends_handles_only_to_others_and_for_exactly_their_tokens(
        self, cluster: VllmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs = record_legs(monkeypatch)
        async with serving(
            cluster.urls, tmp_path, forced=Forced(migrate_every_s=0.02, flip_every_s=0.1)
        ) as running:
            prompts = [prompt_ids(random.Random(n).randrange(1, 300)) for n in range(40)]
            await served_right(running, cluster[2], prompts)
        pulls = [run for run in runs if run.handle is not None]
        assert len(pulls) > 20
        for run in pulls:
            assert run.handle is not None and isinstance(run.leg.prompt, list)
            assert run.handle.owner != run.engine_id
            assert run.leg.pin or run.handle.tokens == len(run.leg.prompt)

    async def test_a_handle_near_the_end_of_its_lease_is_not_used(
        self, cluster: VllmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs = record_legs(monkeypatch)
        kv = KvSetup(lease_s=MARGIN_S, bidirectional=True)
        async with serving(cluster.urls, tmp_path, system="static", kv=kv) as running:
            await served_right(running, cluster[2], [prompt_ids(200) for _ in range(6)])
            assert running.metric("tidegate_kv_handles_refused_total", reason="expired") >= 6
        assert not any(run.handle is not None for run in runs)


@pytest.fixture(scope="class")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmCluster]:
    """Two servers with the options of the class."""
    options: list[ServerOptions] = request.cls.servers
    with VllmCluster(tmp_path_factory.mktemp(request.cls.__name__), options) as cluster:
        yield cluster


class TestLeases:
    """The last two end a server: in this order."""

    servers = (ServerOptions(kv=nixl_config(lease_s=SHORT_LEASE_S)),) * 2

    def test_kv_pulled_after_its_lease_may_be_that_of_others(self, pair: VllmCluster) -> None:
        prompt = prompt_ids(500)
        _, handle = export(pair[0], prompt)
        ended_s = time.monotonic() + SHORT_LEASE_S + 1
        while time.monotonic() < ended_s or pair[0].counters().kv_cache_usage:
            pair[0].complete(prompt_ids(3000), 1)
        for _ in range(12):
            pair[0].complete(prompt_ids(3000), 1)
        assert pull(pair[1], prompt, handle, **AS_PREFILL) != pair[1].reference(prompt, OUTPUT)

    async def test_the_gateway_gives_up_a_pull_that_waits_for_longer_than_the_lease(
        self, pair: VllmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs = record_legs(monkeypatch)
        kv = KvSetup(lease_s=SHORT_LEASE_S, bidirectional=True)
        prompt = prompt_ids(200)
        async with serving(pair.urls, tmp_path, system="static", kv=kv) as running:
            assert Signal.PROFILE not in running.gateway.dispatcher.system.needs
            async with client() as session:
                stopped = pair[1]
                await in_thread(stop_process, stopped, signal.SIGSTOP)
                try:
                    asked = asyncio.create_task(
                        ask(session, running.url, COMPLETIONS, greedy(prompt, OUTPUT))
                    )
                    await running.until(lambda: any(run.handle is not None for run in runs))
                    (waiting,) = (run for run in runs if run.handle is not None)
                    await running.until(lambda: not waiting.runs, SHORT_LEASE_S)
                    assert waiting.handle is not None
                    spent_s = asyncio.get_running_loop().time() - waiting.began_s
                    assert type(waiting.error).__name__ in ("KvLost", "EngineUnreachable")
                    assert spent_s < SHORT_LEASE_S - MARGIN_S + 1
                    said = await asked
                finally:
                    await in_thread(stop_process, stopped, signal.SIGCONT)
        assert said.ids == await in_thread(pair[0].reference, prompt, OUTPUT)

    def test_a_restarted_server_has_another_engine_id(self, pair: VllmCluster) -> None:
        prompt = prompt_ids(100)
        _, handle = export(pair[0], prompt)
        pair[0].kill()
        pair.ensure_up()
        with pytest.raises(urllib.error.HTTPError, match="500"):
            pull(pair[1], prompt, handle, **AS_PREFILL)
        assert export(pair[0], prompt)[1]["remote_engine_id"] != handle["remote_engine_id"]

    def test_kv_that_ends_at_a_block_before_the_prompt_ends_the_server(self, pair: VllmCluster) -> None:
        prompt = prompt_ids(10 * BLOCK_TOKENS - 20)
        ids, handle = export(pair[0], prompt, max_tokens=21)
        assert handle["remote_num_tokens"] == 10 * BLOCK_TOKENS
        with pytest.raises(OSError):
            pull(pair[1], prompt + ids, handle, **AS_PREFILL)
        deadline_s = time.monotonic() + 30
        while pair[1].healthy():
            assert time.monotonic() < deadline_s, "it survives"
            time.sleep(0.2)


class TestArgumentsOfClients:
    servers = (ServerOptions(),)

    def test_an_empty_text_for_a_handle_ends_the_server(self, pair: VllmCluster) -> None:
        def send(text: str) -> None:
            body = greedy(prompt_ids(40), 4) | {"vllm_xargs": {"kv_transfer_params": text}}
            with pytest.raises(urllib.error.HTTPError, match="500"):
                pair[0].post(COMPLETIONS, body, timeout_s=HANG_S)

        send("x")
        assert pair[0].complete(prompt_ids(40), 1), "any other text costs the request only"
        send("")
        deadline_s = time.monotonic() + 30
        while pair[0].healthy():
            assert time.monotonic() < deadline_s, "it survives"
            time.sleep(0.2)


class TestRecompute:
    """One server with the policy ``recompute`` and vLLM's own threshold for reading back."""

    servers = (
        ServerOptions(),
        ServerOptions(kv=nixl_variant(failure_policy="recompute", kv_recompute_threshold=64)),
    )

    def test_kv_below_the_threshold_is_recomputed(self, pair: VllmCluster) -> None:
        prompt = prompt_ids(40)
        ids, handle = export(pair[0], prompt)
        before = pair[1].counters()
        pull(pair[1], prompt + ids, handle, **EXPORT)
        spent = pair[1].counters() - before
        assert (spent.pulled_tokens, spent.computed_tokens) == (0, 41)

    def test_a_peer_that_is_gone_is_hidden_or_waited_for_without_end(self, pair: VllmCluster) -> None:
        first, second = prompt_ids(300), prompt_ids(300)
        handles = [export(pair[0], prompt) for prompt in (first, second)]
        expected = pair[1].reference(first, OUTPUT)
        pair[0].kill()
        assert pull(pair[1], first, handles[0][1], **AS_PREFILL) == expected
        with pytest.raises(TimeoutError):
            pull(pair[1], second + handles[1][0], handles[1][1], **EXPORT)


class TestOneWay:
    """Servers without ``bidirectional_kv_xfer``."""

    servers = (ServerOptions(kv=nixl_variant(bidirectional_kv_xfer=False)),) * 2

    async def test_the_gateway_moves_decodes_without_it(
        self, pair: VllmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs = record_legs(monkeypatch)
        before = [server.counters() for server in pair]
        async with serving(
            pair.urls, tmp_path, kv=KvSetup(), forced=Forced(migrate_every_s=0.05, flip_every_s=0.2)
        ) as running:
            await served_right(running, pair[0], [prompt_ids(100 + n) for n in range(12)])
        assert sum((s.counters() - b).pulled_tokens for s, b in zip(pair, before, strict=True)) > 1200
        assert not any(run.leg.pin and run.handle is not None for run in runs)

    def test_a_prefill_that_reads_kv_hangs(self, pair: VllmCluster) -> None:
        prompt = prompt_ids(300)
        ids, handle = export(pair[0], prompt)
        with pytest.raises(TimeoutError):
            pull(pair[1], prompt + ids, handle, **EXPORT)


def stop_process(server: VllmServer, number: int) -> None:
    """Send a signal to all processes of a server."""
    assert server._process is not None
    os.killpg(server._process.pid, number)

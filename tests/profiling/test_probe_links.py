"""Links: what is asked of two servers that hand KV over, and what their times say."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tidegate.core.errors import ConfigError, EngineFault
from tidegate.costs.saved_profile import LinkSample
from tidegate.engines.vllm.client import ServerFacts, VllmClient
from tidegate.engines.vllm.metrics import VllmMetrics
from tidegate.profiling.links import (
    BY_BOTH,
    BY_ENGINE,
    BY_OUTSIDE,
    REPEATS,
    LinkEnd,
    fit_link,
    link_lengths,
    time_link,
)

FACTS = ServerFacts(("m",), 1000, VllmMetrics(block_tokens=32, kv_blocks=500))
BYTES_PER_TOKEN = 2048


def samples(latency_s: float, bytes_per_s: float, read: tuple[float, float] | None) -> list[LinkSample]:
    return [
        LinkSample(n, b, latency_s + b / bytes_per_s, read[0] + b / read[1] if read else None)
        for n in (65, 257, 1025)
        for b in [n * BYTES_PER_TOKEN]
    ]


def test_a_link_is_fitted_from_outside() -> None:
    link = fit_link("a", "b", samples(0.004, 1e9, None))
    assert (link.latency_s, link.bytes_per_s) == pytest.approx((0.004, 1e9))
    assert (link.by, link.read_bytes_per_s) == (BY_OUTSIDE, None)


def test_the_connectors_own_times_bound_what_jitter_hides() -> None:
    link = fit_link("a", "b", samples(0.004, 1e9, (0.001, 2e9)))
    assert (link.latency_s, link.bytes_per_s) == pytest.approx((0.004, 1e9)) and link.by == BY_BOTH
    assert (link.read_latency_s, link.read_bytes_per_s) == pytest.approx((0.001, 2e9))
    flat = [LinkSample(s.tokens, s.n_bytes, 0.004, s.read_s) for s in samples(0, 1e9, (0.0001, 2e9))]
    assert fit_link("a", "b", flat).bytes_per_s == pytest.approx(2e9), "no link is faster than its reads"
    hidden = [LinkSample(s.tokens, s.n_bytes, -0.001, s.read_s) for s in flat]
    link = fit_link("a", "b", hidden)
    assert link.by == BY_ENGINE and (link.latency_s, link.bytes_per_s) == pytest.approx((0.0001, 2e9))
    with pytest.raises(ConfigError, match="too few"):
        fit_link("a", "b", hidden[:1])


def test_prompts_are_whole_blocks_and_a_token_that_both_have_room_for() -> None:
    wide = ServerFacts(("m",), 100_000, VllmMetrics(block_tokens=16, kv_blocks=62_500))
    assert link_lengths(wide, wide) == [65, 257, 1025, 4097]
    assert link_lengths(wide, FACTS) == [65, 257, 993]
    assert link_lengths(ServerFacts(("m",), 100, VllmMetrics(block_tokens=64, kv_blocks=3)), wide) == []


@dataclass
class Server:
    """Answers as vLLM with NixlConnector does; ``pinned`` is what its KV cache holds for others."""

    name: str
    bytes_per_token: int = BYTES_PER_TOKEN
    exports: bool = True
    status: int = 200
    pinned: set[str] = field(default_factory=set)
    others: dict[str, Server] = field(default_factory=dict)
    prompts: list[list[int]] = field(default_factory=list)
    reads: int = 0
    read_tokens: int = 0

    async def completion(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        kv, prompt = body.get("kv_transfer_params") or {}, body["prompt"]
        if kv.get("do_remote_prefill"):
            self.others[kv["remote_engine_id"]].pinned.discard(kv["remote_request_id"])
        if body["max_tokens"] > 1000 or self.status != 200:
            return web.json_response({"error": {"message": "no"}}, status=400)
        self.prompts.append(prompt)
        if kv.get("do_remote_prefill"):
            assert kv["remote_num_tokens"] == len(prompt), "anything else is wrong output"
            self.reads += 1
            self.read_tokens += len(prompt)
        if not kv or not self.exports:
            return web.json_response({"choices": [{"text": ""}], "kv_transfer_params": None})
        request_id = f"{self.name}-{len(self.prompts)}"
        self.pinned.add(request_id)
        handle = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [[0]],
            "remote_engine_id": self.name,
            "remote_request_id": request_id,
            "remote_num_tokens": len(prompt),
        }
        return web.json_response({"choices": [{"text": ""}], "kv_transfer_params": handle})

    async def metrics(self, request: web.Request) -> web.Response:
        labels = '{engine="0",model_name="m"}'
        lines = [
            f'vllm:prompt_tokens_by_source_total{{source="external_kv_transfer"}} {self.read_tokens}',
            f'vllm:prompt_tokens_by_source_total{{source="local_compute"}} {10**9}',
        ]
        if self.bytes_per_token:
            lines += [
                f"vllm:nixl_xfer_time_seconds_count{labels} {self.reads}.0",
                f"vllm:nixl_xfer_time_seconds_sum{labels} {self.reads * 1e-3}",
                f"vllm:nixl_bytes_transferred_sum{labels} {self.read_tokens * self.bytes_per_token}",
            ]
        return web.Response(text="\n".join(lines) + "\n")


def random_prompt(tokens: int) -> list[int]:
    return random.choices(range(5, 500), k=tokens)


@asynccontextmanager
async def linked(source: Server, target: Server) -> AsyncIterator[tuple[LinkEnd, LinkEnd]]:
    source.others = target.others = {server.name: server for server in (source, target)}
    runners = []
    async with aiohttp.ClientSession() as session:
        ends = []
        for server in (source, target):
            app = web.Application()
            app.add_routes(
                [web.post("/v1/completions", server.completion), web.get("/metrics", server.metrics)]
            )
            runner = web.AppRunner(app)
            runners.append(runner)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            ends.append(LinkEnd(VllmClient(session, url), FACTS, random_prompt))
        try:
            yield ends[0], ends[1]
        finally:
            for runner in runners:
                await runner.cleanup()


async def test_a_link_leaves_nothing_pinned_and_counts_what_moved() -> None:
    source, target = Server("a"), Server("b")
    async with linked(source, target) as (here, there):
        timed = await time_link(here, there)
    lengths = link_lengths(FACTS, FACTS)
    assert [s.tokens for s in timed] == lengths
    assert [s.n_bytes for s in timed] == [n * BYTES_PER_TOKEN for n in lengths]
    assert all(s.read_s == pytest.approx(1e-3) for s in timed)
    assert source.pinned == target.pinned == set()
    assert len({tuple(prompt) for prompt in source.prompts}) == len(lengths) * REPEATS + 1


async def test_bytes_that_nobody_counts_have_to_be_given() -> None:
    source, target = Server("a"), Server("b", bytes_per_token=0)
    async with linked(source, target) as (here, there):
        assert await time_link(here, there) == []
        timed = await time_link(here, there, kv_bytes_per_token=7)
    assert [(s.n_bytes, s.read_s) for s in timed] == [(7 * n, None) for n in link_lengths(FACTS, FACTS)]


async def test_servers_that_hand_nothing_over_are_no_link() -> None:
    async with linked(Server("a", exports=False), Server("b")) as (here, there):
        assert await time_link(here, there) == []
    async with linked(Server("a", status=400), Server("b")) as (here, there):
        with pytest.raises(EngineFault, match="HTTP 400"):
            await time_link(here, there)

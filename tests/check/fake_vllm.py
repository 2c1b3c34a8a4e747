"""Stand-ins for vLLM servers that move KV: tokens that follow from the prompt, handles, counters, faults.

A ``Network`` is what servers can reach each other by. KV is the list of tokens it covers, so that a wrong
handle shows as wrong tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson
from aiohttp import web

Json = dict[str, Any]
VOCABULARY = 400
BLOCKS = 256
DEAD_PEER_S = 0.05


@dataclass
class Fault:
    """What is wrong with a server; by default nothing."""

    model: str = "tiny"
    weights: int = 0
    """Another number answers differently."""
    tokenizer_shift: int = 0
    block_tokens: int = 16
    version: str = "0.32.0"
    connector: bool = True
    recompute: bool = False
    bidirectional: bool = True
    side_channel_open: bool = True
    producer_only: bool = False
    prefix_cache: bool = True
    hangs: frozenset[str] = frozenset()
    """Paths that are never answered."""
    hangs_on_pull: bool = False
    garbles_kv: bool = False
    slow_handshakes: int = 0
    """How many pulls fail before one works."""
    lease_s: float = 30.0
    decoded_s: float = 30.0
    """How long what it decoded stays pinned."""


@dataclass
class Network:
    """Pinned KV by engine id and request id: its tokens, its blocks, its owner."""

    servers: dict[str, FakeVllm] = field(default_factory=dict)


class FakeVllm:
    """One server on a port of its own. ``in_use`` counts pinned blocks."""

    def __init__(self, network: Network, fault: Fault | None = None) -> None:
        self.fault = fault or Fault()
        self.engine_id = f"engine-{len(network.servers)}"
        self.network = network
        network.servers[self.engine_id] = self
        self.pinned: dict[str, tuple[list[int], int, float]] = {}
        self.cached: set[tuple[str, tuple[int, ...]]] = set()
        self.by_source = {"local_compute": 0, "local_cache_hit": 0, "external_kv_transfer": 0}
        self.nixl_bytes = 0
        self.expired = 0
        self.hung: list[str] = []
        self.url = ""
        self._numbers = itertools.count()
        self._runner: web.AppRunner | None = None
        self._side: asyncio.Server | None = None
        self.side_port = 0

    async def start(self) -> None:
        """Listen for HTTP, and on the side channel."""
        app = web.Application(client_max_size=1 << 24)
        app.add_routes(
            [
                web.get("/health", self._told({})),
                web.get("/version", self._told({"version": self.fault.version})),
                web.get("/v1/models", self._told(self._models())),
                web.get("/metrics", self._metrics),
                web.post("/tokenize", self._tokenize),
                web.post("/v1/completions", self._complete),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self._side = await asyncio.start_server(self._greet, "127.0.0.1", 0)
        self.side_port = self._side.sockets[0].getsockname()[1]
        if not self.fault.side_channel_open:
            self._side.close()

    async def stop(self) -> None:
        """Close everything."""
        if self._side is not None:
            self._side.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\xff")
        writer.close()

    def _models(self) -> Json:
        return {"data": [{"id": self.fault.model, "max_model_len": 4096}]}

    def _told(self, body: Json) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            await self._perhaps_hang(request.path)
            return web.json_response(body)

        return answer

    async def _perhaps_hang(self, path: str) -> None:
        if path in self.fault.hangs:
            self.hung.append(path)
            await asyncio.Event().wait()

    async def _tokenize(self, request: web.Request) -> web.Response:
        await self._perhaps_hang(request.path)
        text = (await request.json())["prompt"]
        ids = [(byte + self.fault.tokenizer_shift) % VOCABULARY for byte in text.encode()]
        return web.json_response({"tokens": ids, "count": len(ids)})

    async def _metrics(self, request: web.Request) -> web.Response:
        await self._perhaps_hang(request.path)
        self._expire()
        info = (
            f'block_size="{self.fault.block_tokens}",num_gpu_blocks="{BLOCKS}",engine="0",'
            f'enable_prefix_caching="{self.fault.prefix_cache}"'
        )
        used = sum(blocks for _, blocks, _ in self.pinned.values()) / BLOCKS
        lines = [
            f"vllm:cache_config_info{{{info}}} 1.0",
            f'vllm:kv_cache_usage_perc{{engine="0"}} {used}',
            'vllm:num_requests_running{engine="0"} 0.0',
            *(
                f'vllm:prompt_tokens_by_source_total{{engine="0",source="{name}"}} {count}'
                for name, count in self.by_source.items()
            ),
        ]
        if self.fault.connector:
            lines += [
                f'vllm:nixl_bytes_transferred_sum{{engine="0"}} {self.nixl_bytes}',
                f'vllm:nixl_num_kv_expired_reqs_total{{engine="0"}} {self.expired}',
            ]
            if not self.fault.producer_only:
                lines.append('vllm:num_requests_kv_fetch_by_stage{engine="0",stage="in_progress"} 0')
        return web.Response(text="\n".join(lines) + "\n")

    def _expire(self) -> None:
        for name, (_, _, until_s) in list(self.pinned.items()):
            if until_s < time.monotonic():
                del self.pinned[name]
                self.expired += 1

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        await self._perhaps_hang(request.path)
        body = await request.json()
        prompt, salt = body["prompt"], body.get("cache_salt", "")
        kv = body.get("kv_transfer_params") or {}
        if not self.fault.connector:
            kv = {}
        owner = self.network.servers.get(kv.get("remote_engine_id", ""))
        if len(prompt) + body["max_tokens"] > 4096:
            if owner is not None and owner.fault.side_channel_open and kv.get("do_remote_prefill"):
                owner.pinned.pop(kv["remote_request_id"], None)
            return web.json_response({"error": {"message": "too long"}}, status=400)
        loads = bool(kv.get("remote_engine_id"))
        known = prompt
        if loads:
            if kv["do_remote_decode"] and not self.fault.bidirectional:
                self.hung.append("pull")
                await asyncio.Event().wait()
            if self.fault.hangs_on_pull:
                await asyncio.Event().wait()
            pulled = owner.pinned.get(kv["remote_request_id"]) if owner is not None else None
            stumbles = pulled is not None and self.fault.slow_handshakes > 0
            self.fault.slow_handshakes -= stumbles
            if pulled is None or owner is None or stumbles or not owner.fault.side_channel_open:
                await asyncio.sleep(DEAD_PEER_S)
                if not self.fault.recompute:
                    return web.json_response({"error": {"message": "Internal server error"}}, status=500)
                self._computed(prompt, salt)
            else:
                owner.pinned.pop(kv["remote_request_id"])
                covered = pulled[0][: len(prompt)]
                self.by_source["external_kv_transfer"] += len(covered)
                self.by_source["local_compute"] += len(prompt) - len(covered)
                self.nixl_bytes += 100 * len(covered)
                known = [*covered, *prompt[len(covered) :]]
                self._remember(prompt, salt)
        else:
            self._computed(prompt, salt)
        if body.get("stream"):
            return await self._stream(request, known, body["max_tokens"], salt)
        ids = self._continue(known, body["max_tokens"])
        answer: Json = {
            "choices": [{"token_ids": ids, "finish_reason": "length"}],
            "kv_transfer_params": None,
        }
        pins = kv.get("do_remote_decode") or (loads and self.fault.bidirectional)
        if pins:
            answer["kv_transfer_params"] = self._pin(known + ids[:-1], decoded=not kv["do_remote_decode"])
        return web.json_response(answer)

    async def _stream(
        self, request: web.Request, known: list[int], max_tokens: int, salt: str
    ) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        ids = self._continue(known, max_tokens)
        try:
            for n, token in enumerate(ids):
                self._remember(known + ids[: n + 1], salt)
                event = {"choices": [{"token_ids": [token]}]}
                await response.write(b"data: " + orjson.dumps(event) + b"\n\n")
                await asyncio.sleep(0.001)
            await response.write(b"data: [DONE]\n\n")
        except ConnectionResetError:
            pass
        return response

    def _continue(self, known: list[int], count: int) -> list[int]:
        tokens = list(known)
        for _ in range(count):
            state = sum((n + 1) * token for n, token in enumerate(tokens)) + 7919 * self.fault.weights
            tokens.append((state * 31 + 17 + len(tokens)) % VOCABULARY)
        return tokens[len(known) :]

    def _blocks_of(self, tokens: list[int], salt: str) -> list[tuple[str, tuple[int, ...]]]:
        size = self.fault.block_tokens
        return [(salt, tuple(tokens[:end])) for end in range(size, len(tokens) + 1, size)]

    def _remember(self, tokens: list[int], salt: str) -> None:
        if self.fault.prefix_cache:
            self.cached.update(self._blocks_of(tokens, salt))

    def _computed(self, prompt: list[int], salt: str) -> None:
        hit = 0
        for block in self._blocks_of(prompt[:-1], salt):
            if block not in self.cached:
                break
            hit = len(block[1])
        self.by_source["local_cache_hit"] += hit
        self.by_source["local_compute"] += len(prompt) - hit
        self._remember(prompt, salt)

    def _pin(self, tokens: list[int], *, decoded: bool) -> Json:
        name = f"{self.engine_id}-{next(self._numbers)}"
        blocks = -(-len(tokens) // self.fault.block_tokens)
        held = [token + 1 for token in tokens] if self.fault.garbles_kv else tokens
        lease_s = self.fault.decoded_s if decoded else self.fault.lease_s
        self.pinned[name] = (held, blocks, time.monotonic() + lease_s)
        return {
            "do_remote_prefill": not decoded,
            "do_remote_decode": decoded,
            "remote_engine_id": self.engine_id,
            "remote_request_id": name,
            "remote_block_ids": [list(range(blocks))],
            "remote_num_tokens": len(tokens),
            "remote_host": "127.0.0.1",
            "remote_port": self.side_port,
            "remote_blocks_expiry_time": time.perf_counter() + lease_s if decoded else None,
        }


class StartFleet(Protocol):
    """Starts servers with the given faults, i0 first."""

    async def __call__(self, *faults: Fault) -> list[FakeVllm]: ...


"""What the fixture ``fleet`` gives: starts servers with the given faults."""

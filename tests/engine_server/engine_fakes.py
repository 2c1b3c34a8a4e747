"""Stand-ins for the compute side: a KV store in shared memory, a pin book, an engine without a model."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import orjson
import torch

from tidegate.core.clock import WallClock
from tidegate.core.errors import BadRequest
from tidegate.engines.embedded import blocks
from tidegate.engines.embedded.kv_store import KvShape, PagedKvStore
from tidegate.engines.serving.delivery import OutputRouter
from tidegate.engines.serving.metrics import ServerMetrics
from tidegate.engines.serving.secret import LaunchSecret
from tidegate.engines.serving.server import EngineServer, Parts
from tidegate.engines.serving.types import (
    EngineStats,
    GenerateRequest,
    KvSource,
    Output,
    PinnedKv,
    RequestTimes,
    ServingFacts,
    TokenLogprob,
)
from tidegate.protocol.chunks import SseParser

WAIT_S = 10.0


def wait_until(condition: Callable[[], bool], what: str = "condition", within_s: float = WAIT_S) -> None:
    """Poll ``condition``; AssertionError when it does not hold in time."""
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, f"{what} not reached within {within_s} s"
        threading.Event().wait(0.002)


class MemoryStore(PagedKvStore):
    """A store that tells of reads and writes; ``shared`` False hides the descriptor, as a GPU store does."""

    def __init__(
        self, total_blocks: int = 16, block_bytes: int = 4096, block_tokens: int = 16, shared: bool = True
    ) -> None:
        shape = KvShape(1, 1, block_bytes // (2 * block_tokens), torch.uint8)
        super().__init__(shape, total_blocks, block_tokens, torch.device("cpu"))
        self._shared = shared
        self.on_read: Callable[[int], object] = lambda block_id: None
        self.on_write: Callable[[int], object] = lambda block_id: None

    def fill(self, seed: int) -> MemoryStore:
        for block in range(self.total_blocks):
            pattern = bytes((seed * 31 + block * 7 + i) % 251 for i in range(self.block_bytes))
            super().write_block(block, memoryview(pattern))
        return self

    def block(self, block_id: int) -> bytes:
        return bytes(super().read_block(block_id))

    @property
    def memory_fd(self) -> int | None:
        return super().memory_fd if self._shared else None

    def read_block(self, block_id: int) -> memoryview:
        self.on_read(block_id)
        return super().read_block(block_id)

    def write_block(self, block_id: int, data: memoryview) -> None:
        self.on_write(block_id)
        super().write_block(block_id, data)


class Pins(blocks.Pins):
    """Pins that end when told, or after half a minute."""

    def __init__(self) -> None:
        super().__init__(30.0, WallClock(), lambda: None)


class PullResult:
    """Receives ``done`` of one pull."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.error: str | None = None
        self.moved = -1
        self.calls = 0

    def __call__(self, error: str | None, moved: int) -> None:
        self.error, self.moved = error, moved
        self.calls += 1
        self._event.set()

    def wait(self) -> PullResult:
        assert self._event.wait(WAIT_S), "the pull never ended"
        return self


def source_for(port: int, pinned: PinnedKv, engine_id: str = "engine-a", host: str = "127.0.0.1") -> KvSource:
    return KvSource(engine_id, pinned.request_id, host, port, pinned.block_ids, pinned.num_tokens)


class FakeEngine:
    """A ServedEngine without a model: token i of an answer is 100 + i and reads ``w<i> ``.

    Outputs come from a thread of its own. With ``hold`` set nothing is produced until it is cleared
    or the request is aborted; ``fail`` makes every request end with that error after ``fail_after``
    tokens. ``predicts`` are the tokens left that it predicts, by how many are out.
    """

    def __init__(self) -> None:
        self.sink: Callable[[list[Output]], None] = lambda outputs: None
        self.requests: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.pins = Pins()
        self.hold = False
        self.hold_after: int | None = None
        self.fail: str | None = None
        self.fail_after = 0
        self.predicts: dict[int, float] = {}
        self.remaining_tokens: float | None = None
        self._changed = threading.Condition()
        self._live: dict[str, tuple[GenerateRequest, int]] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def live(self) -> int:
        return len(self._live)

    def submit(self, request: GenerateRequest) -> None:
        with self._changed:
            self.requests.append(request)
            self._live[request.id] = (request, 0)
            self._changed.notify()

    def abort(self, request_id: str) -> None:
        with self._changed:
            self.aborted.append(request_id)
            if self._live.pop(request_id, None) is not None:
                self.sink([Output(request_id, [], "", "abort", times=RequestTimes())])

    def release(self, request_id: str) -> bool:
        return self.pins.release(request_id)

    def resume(self) -> None:
        with self._changed:
            self.hold = False
            self.hold_after = None
            self._changed.notify()

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self.live,
            waiting=0,
            loading=0,
            pinned=len(self.pins),
            free_blocks=64,
            total_blocks=64,
            block_tokens=16,
            kv_usage=0.25,
            preemptions=1,
            prompt_tokens=10,
            generation_tokens=20,
            prefix_queries=30,
            prefix_hits=15,
            computed_prompt_tokens=6,
            cached_prompt_tokens=3,
            pulled_prompt_tokens=1,
            pulled_bytes=4096,
            pull_failures=2,
            steps=9,
            remaining_tokens=self.remaining_tokens,
        )

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._ready())
                if self._stopping:
                    return
                self.sink([self._next(name) for name in self._ready()])

    def _ready(self) -> list[str]:
        if self.hold:
            return []
        stop_at = self.hold_after
        return [name for name, (_, count) in self._live.items() if stop_at is None or count < stop_at]

    def _next(self, name: str) -> Output:
        request, index = self._live[name]
        if self.fail is not None and index >= self.fail_after:
            del self._live[name]
            return Output(name, [], "", "error", error=self.fail)
        self._live[name] = (request, index + 1)
        output = Output(name, [100 + index], f"w{index} ")
        output.remaining_tokens, output.at_token = self.predicts.get(index + 1), index + 1
        if request.sampling.logprobs is not None:
            top = (TokenLogprob(7, "alt", b"alt", -2.5),) if request.sampling.logprobs else ()
            output.logprobs = [TokenLogprob(100 + index, f"w{index} ", f"w{index} ".encode(), -0.5, top)]
        if index + 1 == request.sampling.max_tokens:
            del self._live[name]
            output.finish_reason = "length"
            output.times = RequestTimes(0.001, 0.002, 0.003, 0.004, kv_loaded_tokens=4, cached_tokens=8)
            if request.pin_kv:
                output.pinned = self.pins.pin(name, (5, 6), len(request.prompt_token_ids) + index)
        return output


class CharCodec:
    """A PromptCodec with one token per character."""

    longest_token_chars = 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(char) % 500 for char in text]

    def encode_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        if messages[0]["role"] == "odd":
            raise BadRequest("messages: the chat template refuses them", param="messages")
        return [1, *self.encode(str(messages[0].get("content", ""))), 2]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(token_id) for token_id in token_ids)


FACTS = ServingFacts(
    engine_id="engine-a",
    model="tiny",
    max_model_len=64,
    vocab_size=512,
    block_tokens=16,
    kv_capacity_tokens=1024,
    kv_bytes_per_token=2048,
    kv_host="127.0.0.1",
    kv_port=5601,
)


class Served:
    """A server over real HTTP around a FakeEngine. Use as an async context manager."""

    def __init__(self, secret: str = "", api_key: str = "") -> None:
        self.engine = FakeEngine()
        self.released: list[KvSource] = []
        router = OutputRouter(asyncio.get_running_loop())
        self.engine.sink = router.sink
        self.parts = Parts(
            engine=self.engine,
            codec=CharCodec(),
            facts=FACTS,
            secret=LaunchSecret(secret),
            metrics=ServerMetrics(FACTS, self.engine.stats),
            router=router,
            release_source=self.released.append,
        )
        self.server = EngineServer(self.parts, api_key=api_key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.client = aiohttp.ClientSession(self.url, connector=aiohttp.TCPConnector(limit=0))

    async def __aenter__(self) -> Served:
        await self.server.start(self._listener)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await self.server.stop(0.0)
        self.engine.stop()

    async def post(
        self, path: str, body: object, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Return status and JSON. ``body`` is sent as JSON, or as it is when it is bytes."""
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        async with self.client.post(path, data=io.BytesIO(data), headers=headers) as answer:
            return answer.status, await answer.json()

    async def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Return a stream's events; it must end with [DONE] or with an error, not with both."""
        async with self.client.post(path, json={**body, "stream": True}) as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            payloads = SseParser().feed(await answer.read())
        events = [orjson.loads(payload) for payload in payloads if payload != b"[DONE]"]
        assert (payloads[-1] == b"[DONE]") != ("error" in events[-1])
        return events


async def until(condition: Callable[[], bool], what: str = "condition", within_s: float = WAIT_S) -> None:
    """Await ``condition``, checked on the loop; AssertionError when it does not hold in time."""
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, f"{what} not reached within {within_s} s"
        await asyncio.sleep(0.002)

"""An instance with known costs, in virtual time, as a prober sees it: no sockets, no waiting."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tidegate.costs.forms import attention_work
from tidegate.costs.profile import Profile
from tidegate.profiling.target import Streams
from tidegate.protocol.chunks import Tokens


class _Skipping(selectors.SelectSelector):
    """Returns at once and remembers how long the loop wanted to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise AssertionError("the loop waits for something that never comes")
        self.skipped_s += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that never waits: its time jumps to the next timer."""

    def __init__(self) -> None:
        self._skipping = _Skipping()
        super().__init__(self._skipping)
        self._clock_resolution = 1e-12

    def time(self) -> float:
        return self._skipping.skipped_s


class LoopClock:
    """The running loop's time as a clock."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()


@dataclass(eq=False)
class _Running:
    prompt: int
    cached: int
    most: int
    sink: Any
    computed: int = 0
    made: int = 0
    done: asyncio.Event = field(default_factory=asyncio.Event)


class VirtualTarget:
    """Stands in for ``ProbeTarget``: steps of one engine that cost exactly what ``profile`` says."""

    url = "virtual"

    def __init__(
        self,
        profile: Profile,
        *,
        front_s: float,
        max_batch_tokens: int,
        max_num_seqs: int = 10_000,
        prefix_cache: bool = True,
    ) -> None:
        self.clock = LoopClock()
        self._profile, self._front_s = profile, front_s
        self._budget, self._seqs, self._caching = max_batch_tokens, max_num_seqs, prefix_cache
        self._waiting: list[_Running] = []
        self._running: list[_Running] = []
        self._known: set[int] = set()
        self._next = 0
        self._loop: asyncio.Task[None] | None = None

    def prompt(self, tokens: int) -> list[int]:
        self._next += 1
        return [self._next] * tokens

    async def first_token(self, prompt: list[int], within_s: float) -> tuple[float, float]:
        streams = Streams(1, self.clock)
        sent_s = self.clock.now()
        async with asyncio.timeout(within_s):
            await self._serve(prompt, 1, streams.times[0])
        return sent_s, streams.times[0].at[0]

    @asynccontextmanager
    async def streams(self, prompts: Sequence[list[int]], most: int) -> AsyncIterator[Streams]:
        streams = Streams(len(prompts), self.clock)
        pairs = zip(prompts, streams.times, strict=True)
        tasks = [asyncio.create_task(self._serve(prompt, most, sink)) for prompt, sink in pairs]
        try:
            yield streams
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, prompt: list[int], most: int, sink: Any) -> None:
        await asyncio.sleep(self._front_s)
        cached = 0
        while self._caching and cached < len(prompt) - 1 and prompt[cached] in self._known:
            cached += 1
        self._known.update(prompt)
        request = _Running(len(prompt), cached, most, sink, computed=cached)
        self._waiting.append(request)
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._steps())
        try:
            await request.done.wait()
        finally:
            for queue in (self._waiting, self._running):
                if request in queue:
                    queue.remove(request)

    async def _steps(self) -> None:
        while self._waiting or self._running:
            while self._waiting and len(self._running) < self._seqs:
                self._running.append(self._waiting.pop(0))
            decodes = [r for r in self._running if r.made]
            budget = self._budget - len(decodes)
            chunks: list[tuple[_Running, int]] = []
            for request in (r for r in self._running if not r.made):
                count = min(budget, request.prompt - request.computed)
                if count > 0:
                    chunks.append((request, count))
                    budget -= count
            await asyncio.sleep(self._cost(decodes, chunks))
            for request, count in chunks:
                request.computed += count
            for request in [*decodes, *(r for r, _ in chunks if r.computed == r.prompt)]:
                request.made += 1
                request.sink.tokens(Tokens("", [1]))
                if request.made == request.most:
                    if request in self._running:
                        self._running.remove(request)
                    request.done.set()

    def _cost(self, decodes: list[_Running], chunks: list[tuple[_Running, int]]) -> float:
        new = sum(count for _, count in chunks)
        work = sum(attention_work(count, request.computed) for request, count in chunks)
        context = sum(r.prompt + r.made for r in decodes)
        if not chunks:
            return float(self._profile.step.seconds(len(decodes), context))
        if not decodes:
            return float(self._profile.prefill.seconds(new, work))
        return float(self._profile.mixed.seconds(new + len(decodes), work, context))

"""One live instance as a prober sees it: streams whose every token has a time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tidegate.core.clock import Clock, WallClock
from tidegate.core.errors import EngineError
from tidegate.engines.dialect import DialectEngine
from tidegate.engines.seam import KvHandle, Leg, LegEnd
from tidegate.protocol.chunks import Tokens

GREEDY: dict[str, object] = {"temperature": 0.0, "ignore_eos": True}


@dataclass(slots=True)
class TokenTimes:
    """When each token of one stream came, by ``clock``; the sink of its leg."""

    at: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    on_token: Callable[[], None] = lambda: None
    clock: Clock = field(default_factory=WallClock)

    def tokens(self, tokens: Tokens) -> None:
        self._came(tokens.token_ids)

    def plain(self, text: str, token_ids: list[int]) -> None:
        self._came(token_ids)

    def _came(self, ids: list[int]) -> None:
        if ids:
            self.at += [self.clock.now()] * len(ids)
            self.ids += ids
            self.on_token()


class Streams:
    """Several streams that were started together. ``failed`` has the first error of any."""

    def __init__(self, count: int, clock: Clock) -> None:
        self._changed = asyncio.Event()
        self.times = [TokenTimes(on_token=self._changed.set, clock=clock) for _ in range(count)]
        self.failed: EngineError | None = None

    def fail(self, error: EngineError) -> None:
        """Take note that a stream broke."""
        self.failed = self.failed or error
        self._changed.set()

    async def have(self, tokens: Sequence[int], within_s: float) -> bool:
        """Wait until stream i has ``tokens[i]`` tokens; False when they do not come in time. Raises the
        EngineError of a stream that broke."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while any(len(t.at) < n for t, n in zip(self.times, tokens, strict=True)):
                    if self.failed is not None:
                        raise self.failed
                    self._changed.clear()
                    await self._changed.wait()
                return True
        return False

    async def more(self, count: int, within_s: float) -> bool:
        """Wait until every stream has ``count`` tokens more than now; see ``have``."""
        return await self.have([len(t.at) + count for t in self.times], within_s)


class ProbeTarget:
    """Sends prompts of random token ids, each one unlike any before, to one instance. Every measurement needs
    another ``seed``, or the prefix cache knows the prompts. ``sent_tokens`` counts the prompts' tokens."""

    def __init__(
        self,
        url: str,
        model: str,
        vocab: tuple[int, int],
        *,
        seed: int,
        api_key: str = "",
        secret: str = "",
        clock: Clock | None = None,
    ) -> None:
        self.url = url
        self.clock = clock or WallClock()
        self._engine = DialectEngine(
            url, url, model, connect_s=5.0, stall_s=60.0, secret=secret, api_key=api_key
        )
        self._vocab = vocab
        self._random = random.Random(seed)
        self._sent = 0
        self.sent_tokens = 0

    def close(self) -> None:
        """Close all connections."""
        self._engine.close("the prober is done")

    def prompt(self, tokens: int) -> list[int]:
        """Return a prompt that no prefix cache knows."""
        low, high = self._vocab
        return self._random.choices(range(low, high), k=tokens)

    async def first_token(self, prompt: list[int], within_s: float) -> tuple[float, float]:
        """Send a prompt for one token; return when it left and when the token came."""
        seen = TokenTimes(clock=self.clock)
        sent_s = self.clock.now()
        await self._engine.run(self._leg(prompt, 1), seen, deadline_s=within_s)
        return sent_s, seen.at[0]

    @asynccontextmanager
    async def streams(self, prompts: Sequence[list[int]], most: int) -> AsyncIterator[Streams]:
        """Decode ``prompts`` side by side, for at most ``most`` tokens each; leaving aborts them."""
        streams = Streams(len(prompts), self.clock)

        async def one(prompt: list[int], times: TokenTimes) -> None:
            try:
                await self._engine.run(self._leg(prompt, most), times, deadline_s=600.0)
            except EngineError as error:
                streams.fail(error)

        tasks = [asyncio.create_task(one(*pair)) for pair in zip(prompts, streams.times, strict=True)]
        try:
            yield streams
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def prefill_for(self, prompt: list[int], within_s: float) -> tuple[KvHandle | None, list[int]]:
        """Compute a prompt whose KV another instance is to pull: its handle, if any, and the first token."""
        seen = TokenTimes()
        end = await self._engine.run(self._leg(prompt, 1, pin=True), seen, deadline_s=within_s)
        return end.handle, seen.ids

    async def pull(self, prompt: list[int], handle: KvHandle, within_s: float) -> LegEnd:
        """Decode one token of a prompt whose KV is pulled; raises EngineError when that cannot be."""
        leg = self._leg(prompt, 1, handle=handle, generated=1)
        return await self._engine.run(leg, TokenTimes(), deadline_s=within_s)

    def _leg(self, prompt: list[int], most: int, **options: Any) -> Leg:
        self._sent += 1
        self.sent_tokens += len(prompt)
        name = f"probe-{self._random.getrandbits(48):x}-{self._sent}"
        return Leg(name, prompt, None, most, dict(GREEDY), **options)

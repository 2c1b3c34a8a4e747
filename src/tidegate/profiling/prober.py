"""Measure a live, idle instance over HTTP with few requests: the plan and its budget.

The TTFT of unlike prompts gives prefill, with a cached prefix the slope of attention; gaps between the tokens
of streams that decode side by side give decode steps, and with one more prompt mixed steps. Cheap points come
first, so that any budget covers the widest range it can.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

from tidegate.core.errors import EngineTimeout
from tidegate.costs.fitting import MixedSample, StepSample
from tidegate.engines.vllm.client import ServerFacts
from tidegate.profiling import fit
from tidegate.profiling.target import ProbeTarget, Streams
from tidegate.profiling.unfinished import Unfinished

LENGTHS = (16, 64, 256, 1024, 32, 128, 512, 2048, 4096, 8192, 192, 384, 768, 1536, 3072, 6144)
CACHED = ((64, 512), (64, 2048), (256, 2048), (64, 8192), (256, 8192))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (64, 512, 2048, 8192)
REPEATS = 5
SETTLE_STEPS, STEPS = 3, 20
CHUNKS_PER_SESSION = 4
ROOM = 256
"""Tokens a stream may decode while others start; what a context and the cache must have room for."""
KV_SHARE = 0.8
PREFILL_SHARE, BUDGET_SHARE = 0.35, 0.1
"""Shares of the time budget: for prefills, and for finding the token budget of a step."""
LEAST_OF_STEP = 0.5
"""A gap of less than this share of a pure decode step was two tokens delivered as one."""
LEAST_WAIT_S = 10.0
ALONE_WAIT_S = 60.0
"""For a prompt that nothing is beside: it comes, unless the instance is broken."""
NO_CACHE = "the instance shows no prefix cache: attention is fitted without it"


class Prober:
    """Times one instance. ``max_batch_tokens`` is measured where it is None. ``notes`` is for the user;
    ``advance`` receives the share of the budget spent, what is timed, and the share spent by this run."""

    def __init__(
        self,
        target: ProbeTarget,
        facts: ServerFacts,
        max_batch_tokens: int | None,
        budget_s: float,
        advance: Callable[[float, str, float], None],
    ) -> None:
        self.timed = fit.Timed()
        self.notes: list[str] = []
        self.max_batch_tokens = max_batch_tokens
        self._target, self._facts, self._budget_s, self._advance = target, facts, budget_s, advance
        self._spent_s = 0.0
        self._start_s: float | None = None
        self._sessions_done: list[tuple[int, int]] = []
        self._token_s = 0.0
        self._most_streams = max(BATCHES)

    async def run(self) -> None:
        """Measure until all points are done or the budget is spent. Raises EngineError when it breaks."""
        await self._warm_up()
        self._start_s = self._target.clock.now() - self._spent_s
        if self.max_batch_tokens is None:
            await self._find_budget()
        await self._prefills()
        await self._cached_prefills()
        await self._sessions()

    def go_on(self, found: Unfinished) -> None:
        """Take over what an interrupted run timed: it is not timed again, and its time counts as spent."""
        self.max_batch_tokens = found.max_batch_tokens
        self.notes = list(found.notes)
        ttft = {(new, cached): list(seconds) for new, cached, seconds in found.ttft}
        self.timed = fit.Timed(ttft, list(found.step), list(found.mixed))
        self._spent_s, self._sessions_done = found.spent_s, list(found.sessions)

    def unfinished(self, of: tuple[str, ...]) -> Unfinished:
        """Return what has been timed so far."""
        timed, now = self.timed, self._target.clock.now()
        return Unfinished(
            of,
            self._spent_s if self._start_s is None else now - self._start_s,
            self.max_batch_tokens,
            self.notes,
            [(*point, seconds) for point, seconds in timed.ttft.items()],
            timed.step,
            timed.mixed,
            self._sessions_done,
        )

    async def _warm_up(self) -> None:
        """Have everything computed once that is compiled, captured or connected at first use."""
        for tokens in (16, 16, min(512, self._longest())):
            sent_s, first_s = await self._target.first_token(self._target.prompt(tokens), 120.0)
            self._token_s = (first_s - sent_s) / tokens

    async def _prefills(self) -> None:
        lengths = [n for n in LENGTHS if n <= self._longest()]
        for repeat in range(REPEATS):
            for n in lengths:
                known = (n, 0) in self.timed.ttft
                if len(self.timed.ttft.get((n, 0), ())) > repeat:
                    continue
                if self._left(PREFILL_SHARE) < self._token_s * n and (repeat or len(self.timed.ttft) > 4):
                    if known or repeat:
                        return
                    continue
                self._show(f"prefill of {n} tokens")
                await self._time_prefill(self._target.prompt(n), (n, 0))

    async def _cached_prefills(self) -> None:
        """Time prompts whose beginning was just computed; an instance without a prefix cache shows none."""
        block = self._facts.block_tokens
        if NO_CACHE in self.notes:
            return
        for new, cached in CACHED:
            if new + cached + 1 > self._facts.max_model_len or (new, 0) not in self.timed.ttft:
                continue
            if self._left(PREFILL_SHARE + BUDGET_SHARE) < 2 * self._token_s * cached:
                return
            self._show(f"prefill of {new} tokens after {cached} cached ones")
            if (new, cached - cached % block) in self.timed.ttft:
                continue
            prefix = self._target.prompt(cached - cached % block)
            whole_s = await self._time_prefill(prefix, None)
            seconds = [
                await self._time_prefill(prefix + self._target.prompt(new), None) for _ in range(REPEATS - 2)
            ]
            if whole_s < 2 * self.timed.first_token_s(new):
                continue  # too short to show whether it was found
            if median(seconds) > 0.7 * whole_s:
                self.notes.append(NO_CACHE)
                return
            self.timed.ttft[new, len(prefix)] = seconds

    async def _time_prefill(self, prompt: list[int], point: tuple[int, int] | None) -> float:
        sent_s, first_s = await self._target.first_token(prompt, ALONE_WAIT_S + self._wait_s(len(prompt)))
        seconds = first_s - sent_s
        if point is not None:
            self.timed.ttft.setdefault(point, []).append(seconds)
            self._token_s = max(self._token_s * 0.9, seconds / point[0]) if point[0] >= 256 else self._token_s
        return seconds

    async def _find_budget(self) -> None:
        """Learn how many tokens a step takes at most: count the steps of a long prompt beside a decode."""
        most = min(self._facts.max_model_len - 2, int(KV_SHARE * self._facts.kv_capacity_tokens) - ROOM)
        affordable = self._budget_s * BUDGET_SHARE / max(self._token_s, 1e-9)
        power = int(math.log2(max(64.0, min(most, affordable, 16384.0) / fit.REMAINDER_SAFE)))
        tokens = min(most, int(fit.REMAINDER_SAFE * 2**power))
        self._show(f"the token budget, by a prompt of {tokens}")
        counts = []
        async with self._target.streams([self._target.prompt(16)], self._room(16)) as streams:
            if not await self._settled(streams, 1):
                return
            for _ in range(REPEATS - 2):
                step_s = await self._watch(streams)
                if step_s is None:
                    break
                sent_s, first_s = await self._target.first_token(
                    self._target.prompt(tokens), self._wait_s(tokens)
                )
                await streams.more(1, LEAST_WAIT_S)
                counts.append(fit.chunks_between(streams.times[0].at, sent_s, first_s, step_s))
        if counts:
            self.max_batch_tokens = fit.token_budget(tokens, min(counts))  # what is held up adds to a count

    def _longest(self) -> int:
        """Return the longest prompt that is sure to be computed in one step."""
        one_step = self.max_batch_tokens or 8192
        in_cache = int(KV_SHARE * self._facts.kv_capacity_tokens)
        return max(16, min(one_step, in_cache, self._facts.max_model_len - 2))

    async def _sessions(self) -> None:
        points = [(b, c) for b in BATCHES for c in CONTEXTS if self._fits(b, c)]
        points.sort(key=lambda p: p[0] * p[1])
        for index, (batch, context) in enumerate(points):
            cost_s = batch * context * self._token_s + 0.2
            if index >= len(CONTEXTS) and self._left(1.0) < cost_s:
                continue
            if batch <= self._most_streams and (batch, context) not in self._sessions_done:
                await self._session(index, batch, context)
                self._sessions_done.append((batch, context))

    def _fits(self, batch: int, context: int) -> bool:
        held = batch * (context + ROOM) + self._longest()
        return (
            context + ROOM <= self._facts.max_model_len
            and held <= KV_SHARE * self._facts.kv_capacity_tokens
            and batch + 16 <= (self.max_batch_tokens or 8192)
        )

    async def _session(self, index: int, batch: int, context: int) -> None:
        """Start ``batch`` streams, time their steps, then prompts beside them one after another."""
        self._show(f"decode of {batch} x {context}")
        prompts = [self._target.prompt(context) for _ in range(batch)]
        async with self._target.streams(prompts, self._room(context)) as streams:
            if not await self._settled(streams, batch * context):
                self._most_streams = batch - 1
                return
            held = self._held(streams, context)
            step_s = await self._watch(streams)
            if step_s is None:
                return
            middle = (held + self._held(streams, context)) // 2
            self.timed.step.append(StepSample(batch, middle, step_s))
            for tokens in self._chunks(index, batch):
                if len(self.timed.mixed) > len(CONTEXTS) and self._left(1.0) < tokens * self._token_s:
                    return
                held = self._held(streams, context)
                seconds = [await self._beside(streams, tokens) for _ in range(REPEATS - 2)]
                held = (held + self._held(streams, context)) // 2
                timed = [each for each in seconds if each is not None and each > LEAST_OF_STEP * step_s]
                if len(timed) >= 2:
                    self.timed.mixed.append(MixedSample(tokens, 0, batch, held, median(timed)))
                if None in seconds:
                    return

    async def _beside(self, streams: Streams, tokens: int) -> float | None:
        """Return the time of the step that computes a prompt beside the streams; None at their end."""
        try:
            _, first_s = await self._target.first_token(self._target.prompt(tokens), self._wait_s(tokens))
        except EngineTimeout:
            self._most_streams = min(self._most_streams, len(streams.times))
            return None
        if not await streams.more(fit.BEFORE + 2, LEAST_WAIT_S):
            return None
        return fit.gap_of_chunk([t.at for t in streams.times], first_s)

    def _chunks(self, index: int, batch: int) -> list[int]:
        """Return the prompts to put beside ``batch`` decodes: others in each session, each within a step."""
        most = (self.max_batch_tokens or self._longest()) - batch
        lengths = sorted(n for n in LENGTHS if n <= min(most, self._longest()))
        if batch == 1:
            return [n for n in lengths if n <= 256][:CHUNKS_PER_SESSION] + lengths[-1:]
        return lengths[index % 3 :: 3][-CHUNKS_PER_SESSION:]

    async def _settled(self, streams: Streams, tokens: int) -> bool:
        return await streams.have([2] * len(streams.times), self._wait_s(tokens)) and await streams.more(
            SETTLE_STEPS, LEAST_WAIT_S
        )

    async def _watch(self, streams: Streams) -> float | None:
        """Return the time of a pure decode step of the streams; None when it could not be seen."""
        since = [len(t.at) - 1 for t in streams.times]
        if not await streams.more(STEPS, LEAST_WAIT_S):
            return None
        until = [len(t.at) - 1 for t in streams.times]
        return fit.step_seconds([t.at for t in streams.times], since, until) or None

    @staticmethod
    def _held(streams: Streams, context: int) -> int:
        return sum(context + len(t.at) for t in streams.times)

    def _room(self, context: int) -> int:
        return min(self._facts.max_model_len - context - 1, 16 * ROOM)

    def _wait_s(self, tokens: int) -> float:
        return LEAST_WAIT_S + 5 * tokens * self._token_s

    def _left(self, share: float) -> float:
        """Return the seconds left of the first ``share`` of the budget."""
        return (self._start_s or 0.0) + share * self._budget_s - self._target.clock.now()

    def _show(self, what: str) -> None:
        share = min(1.0, 1.0 - self._left(1.0) / self._budget_s)
        self._advance(share, what, share - self._spent_s / self._budget_s)

"""Probes of two servers: KV that one has made and the other one goes on with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from tidegate.check.context import CheckContext
from tidegate.check.server import ProbedServer
from tidegate.check.verdict import GREEN, RED, YELLOW, CheckVerdict
from tidegate.core.errors import EngineError
from tidegate.engines.seam import Json, KvHandle
from tidegate.engines.vllm.metrics import CACHED, COMPUTED, PULLED, VllmMetrics

PULLED_ENOUGH = 0.95
TAKE_TOKENS = 12
LEASE_TOKENS = 7


@dataclass(frozen=True, slots=True)
class PullResult:
    """What happened when a server was sent somebody's handle.

    ``pulled``, ``hit`` and ``computed`` say where its prompt tokens came from; None when it does not tell.
    ``error`` is empty when it answered; ``wrong_at`` is the first token that differs from a local run.
    ``params`` is the handle of what it pinned itself, given at ``at_s`` of our performance counter.
    """

    seconds: float
    params: Json | None = None
    at_s: float = 0.0
    error: str = ""
    pulled: int | None = None
    hit: int = 0
    computed: int = 0
    nixl_bytes: int = 0
    wrong_at: int | None = None

    def judge(self, wanted: int) -> tuple[CheckVerdict, str, str]:
        """Return verdict, observation and what to change, where ``wanted`` tokens were there to pull."""
        if self.error:
            return (
                RED,
                f"{self.error} after {self.seconds:.1f} s",
                "open the side channel and UCX's ports between both; compare their --kv-transfer-config",
            )
        if self.wrong_at is not None:
            return (
                RED,
                f"wrong tokens: differs from a local run at token {self.wrong_at}",
                "do not serve with it: compare models, dtypes, --block-size and vLLM versions",
            )
        if self.pulled is None:
            return YELLOW, "right tokens; the server does not show where KV came from", ""
        if self.pulled + self.hit < PULLED_ENOUGH * wanted:
            return (
                RED,
                f"KV was recomputed: {self.pulled} of {wanted} tokens pulled, {self.computed} computed",
                "its pulls fail and are hidden: set kv_load_failure_policy to fail and see its log",
            )
        return (
            GREEN,
            f"{self.pulled} tokens pulled, {self.nixl_bytes:,} B, {1e3 * self.seconds:.0f} ms",
            "",
        )


@dataclass(frozen=True, slots=True)
class PinnedPrefill:
    """What a leg that pins its KV answered. ``handle`` is None where ``params`` do not cover all of it."""

    token_ids: list[int]
    params: Json | None
    handle: KvHandle | None


async def pin_prefill(
    check: CheckContext, owner: ProbedServer, prompt: list[int], tokens: int, salt: str
) -> PinnedPrefill:
    """Have ``owner`` prefill ``prompt``, make ``tokens`` tokens and pin the KV."""
    reply = await owner.complete(prompt, tokens, kv=check.nixl.export(""), salt=salt)
    ids = reply.new_tokens()
    now = asyncio.get_running_loop().time()
    handle = check.nixl.handle(reply.kv_params, "", owner.id, len(prompt) + tokens - 1, now)
    return PinnedPrefill(ids, reply.kv_params, handle)


async def pull_kv(
    check: CheckContext,
    taker: ProbedServer,
    handle: KvHandle,
    prompt: list[int],
    expected: list[int],
    *,
    pin: bool,
    salt: str,
) -> PullResult:
    """Send ``taker`` a handle and compare what it makes of it with ``expected``."""
    kv = check.nixl.load(handle, len(prompt), pin=pin)
    before = await taker.metrics()
    began_s = time.perf_counter()
    try:
        reply = await taker.complete(prompt, len(expected), kv=kv, salt=salt)
    except EngineError as error:
        check.pins.missed(handle.params)
        return PullResult(time.perf_counter() - began_s, error=error.message)
    if reply.status != 200:
        check.pins.missed(handle.params)
        return PullResult(reply.seconds, error=reply.error)
    at_s = time.perf_counter()
    try:
        ids = reply.new_tokens()
    except EngineError as error:
        return PullResult(reply.seconds, error=error.message)
    after = await taker.metrics_once(_prompt_counted(before, len(prompt)))
    wrong_at = next((n for n, want in enumerate(expected) if ids[n : n + 1] != [want]), None)
    pulled = after.source(PULLED) - before.source(PULLED)
    if pulled or after.prompt_tokens_by_source is None:
        check.pins.taken(handle.params, taker.id)
    return PullResult(
        reply.seconds,
        reply.kv_params,
        at_s,
        pulled=None if after.prompt_tokens_by_source is None else pulled,
        hit=after.source(CACHED) - before.source(CACHED),
        computed=after.source(COMPUTED) - before.source(COMPUTED),
        nixl_bytes=(after.nixl_bytes or 0) - (before.nixl_bytes or 0),
        wrong_at=wrong_at,
    )


def _prompt_counted(before: VllmMetrics, tokens: int) -> Callable[[VllmMetrics], bool]:
    def counted(now: VllmMetrics) -> bool:
        new = sum(now.source(name) - before.source(name) for name in (PULLED, CACHED, COMPUTED))
        moved = (now.nixl_bytes or 0) > (before.nixl_bytes or 0)
        unmoved = now.source(PULLED) == before.source(PULLED)
        return now.prompt_tokens_by_source is None or (new >= tokens and (moved or unmoved))

    return counted

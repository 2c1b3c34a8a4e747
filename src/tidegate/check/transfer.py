"""Probes of two servers: KV that one has made and the other one goes on with."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from tidegate.check.context import CheckContext
from tidegate.check.server import ProbedServer
from tidegate.check.verdict import GREEN, RED, YELLOW, CheckVerdict
from tidegate.core.errors import EngineError
from tidegate.engines.seam import Json, KvHandle
from tidegate.engines.vllm.client import Reply
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
            observed = f"{self.error} after {self.seconds:.1f} s"
            change = "open the side channel and UCX's ports between both; compare their --kv-transfer-config"
            return RED, observed, change
        if self.wrong_at is not None:
            observed = f"wrong tokens: differs from a local run at token {self.wrong_at}"
            change = "do not serve with it: compare models, dtypes, --block-size and vLLM versions"
            return RED, observed, change
        if self.pulled is None:
            return YELLOW, "right tokens; the server does not show where KV came from", ""
        if self.pulled + self.hit < PULLED_ENOUGH * wanted:
            observed = f"KV was recomputed: {self.pulled} of {wanted} tokens pulled, {self.computed} computed"
            change = "its pulls fail and are hidden: set kv_load_failure_policy to fail and see its log"
            return RED, observed, change
        return GREEN, f"{self.pulled} tokens pulled, {self.nixl_bytes:,} B, {1e3 * self.seconds:.0f} ms", ""


async def pin_prefill(
    check: CheckContext, owner: ProbedServer, prompt: list[int], tokens: int, salt: str
) -> tuple[Reply, KvHandle | None]:
    """Have ``owner`` prefill ``prompt``, make ``tokens`` tokens and pin the KV; None for a handle that does
    not cover all of it. Raises EngineError."""
    reply = await owner.complete(prompt, tokens, kv=check.nixl.export(""), salt=salt)
    reply.new_tokens()
    now = asyncio.get_running_loop().time()
    return reply, check.nixl.handle(reply.kv_params, "", owner.id, len(prompt) + tokens - 1, now)


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
        at_s = time.perf_counter()
        ids = reply.new_tokens()
    except EngineError as error:
        check.pins.missed(handle.params)
        return PullResult(time.perf_counter() - began_s, error=error.message)

    def counted(now: VllmMetrics) -> bool:
        new = sum(now.source(name) - before.source(name) for name in (PULLED, CACHED, COMPUTED))
        moved = (now.nixl_bytes or 0) > (before.nixl_bytes or 0)
        unmoved = now.source(PULLED) == before.source(PULLED)
        return now.prompt_tokens_by_source is None or (new >= len(prompt) and (moved or unmoved))

    after = await taker.metrics_once(counted)
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

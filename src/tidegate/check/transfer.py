"""Probes of two servers: KV that one has made and the other one goes on with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from tidegate.check.board import Board
from tidegate.check.counters import COMPUTED, EXTERNAL, LOCAL_HIT, Counters
from tidegate.check.server import Server
from tidegate.check.verdict import Json, Verdict
from tidegate.core.errors import EngineError
from tidegate.engines.seam import KvHandle

PULLED_ENOUGH = 0.95
TAKE_TOKENS = 12
LEASE_TOKENS = 7


@dataclass(frozen=True, slots=True)
class Taken:
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

    def judge(self, wanted: int) -> tuple[Verdict, str, str]:
        """Return verdict, observation and what to change, where ``wanted`` tokens were there to pull."""
        if self.error:
            return (
                Verdict.RED,
                f"{self.error} after {self.seconds:.1f} s",
                "open the side channel and UCX's ports between both; compare their --kv-transfer-config",
            )
        if self.wrong_at is not None:
            return (
                Verdict.RED,
                f"wrong tokens: differs from a local run at token {self.wrong_at}",
                "do not serve with it: compare models, dtypes, --block-size and vLLM versions",
            )
        if self.pulled is None:
            return Verdict.YELLOW, "right tokens; the server does not show where KV came from", ""
        if self.pulled + self.hit < PULLED_ENOUGH * wanted:
            return (
                Verdict.RED,
                f"KV was recomputed: {self.pulled} of {wanted} tokens pulled, {self.computed} computed",
                "its pulls fail and are hidden: set kv_load_failure_policy to fail and see its log",
            )
        return (
            Verdict.GREEN,
            f"{self.pulled} tokens pulled, {self.nixl_bytes:,} B, {1e3 * self.seconds:.0f} ms",
            "",
        )


@dataclass(frozen=True, slots=True)
class Made:
    """What a leg that pins its KV answered. ``handle`` is None where ``params`` do not cover all of it."""

    token_ids: list[int]
    params: Json | None
    handle: KvHandle | None


async def produce(board: Board, owner: Server, prompt: list[int], tokens: int, salt: str) -> Made:
    """Have ``owner`` prefill ``prompt``, make ``tokens`` tokens and pin the KV."""
    leg = await owner.complete(prompt, tokens, kv=board.nixl.export(""), salt=salt)
    now = asyncio.get_running_loop().time()
    handle = board.nixl.handle(leg.params, "", owner.id, len(prompt) + tokens - 1, now)
    return Made(leg.token_ids, leg.params, handle)


async def take(
    board: Board,
    taker: Server,
    handle: KvHandle,
    prompt: list[int],
    expected: list[int],
    *,
    pin: bool,
    salt: str,
) -> Taken:
    """Send ``taker`` a handle and compare what it makes of it with ``expected``."""
    kv = board.nixl.load(handle, len(prompt), pin=pin)
    before = await taker.counters()
    began_s = time.perf_counter()
    try:
        reply = await taker.send(prompt, len(expected), kv=kv, salt=salt, deadline_s=taker.deadlines.leg_s)
    except EngineError as error:
        board.pins.missed(handle.params)
        return Taken(time.perf_counter() - began_s, error=error.message)
    if reply.status != 200:
        board.pins.missed(handle.params)
        return Taken(reply.seconds, error=reply.error)
    at_s = time.perf_counter()
    try:
        ids = list(reply.body["choices"][0]["token_ids"])
    except (LookupError, TypeError):
        return Taken(reply.seconds, error="it returns no token ids")
    after = await taker.counters_once(_prompt_counted(before, len(prompt)))
    params = reply.body.get("kv_transfer_params")
    wrong_at = next((n for n, want in enumerate(expected) if ids[n : n + 1] != [want]), None)
    pulled = int(after.source(EXTERNAL) - before.source(EXTERNAL))
    if pulled or after.by_source is None:
        board.pins.taken(handle.params, taker.id)
    return Taken(
        reply.seconds,
        params if isinstance(params, dict) and params.get("remote_block_ids") else None,
        at_s,
        pulled=None if after.by_source is None else pulled,
        hit=int(after.source(LOCAL_HIT) - before.source(LOCAL_HIT)),
        computed=int(after.source(COMPUTED) - before.source(COMPUTED)),
        nixl_bytes=int((after.nixl_bytes or 0.0) - (before.nixl_bytes or 0.0)),
        wrong_at=wrong_at,
    )


def _prompt_counted(before: Counters, tokens: int) -> Callable[[Counters], bool]:
    def counted(now: Counters) -> bool:
        new = sum(now.source(name) - before.source(name) for name in (EXTERNAL, LOCAL_HIT, COMPUTED))
        moved = (now.nixl_bytes or 0.0) > (before.nixl_bytes or 0.0)
        unmoved = now.source(EXTERNAL) == before.source(EXTERNAL)
        return now.by_source is None or (new >= tokens and (moved or unmoved))

    return counted

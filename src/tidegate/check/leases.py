"""How long servers keep pinned KV, and what they do when KV cannot be had."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from tidegate.check.board import LEASE_S, Board
from tidegate.check.server import Server
from tidegate.check.transfer import produce
from tidegate.check.verdict import Finding, Json, Verdict
from tidegate.core.errors import EngineError, EngineTimeout
from tidegate.engines.seam import KvHandle
from tidegate.engines.vllm.connector import MARGIN_S

PROBE_POLICY, PROBE_LEASE = "failure policy", "lease"
NOBODY = {"remote_host": "127.0.0.1", "remote_port": 1}
"""Where no side channel listens."""
LONGEST_WAIT_S = 90.0
POLL_S = 0.5
LONG_TTL_S = 120.0
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Canary:
    """KV pinned to see how long it stays. ``expired`` counts what the server had given up before."""

    handle: KvHandle
    at_s: float
    expired: float | None


async def pin_canaries(board: Board) -> dict[str, Canary]:
    """Pin a little KV on every server that gives handles."""
    found: dict[str, Canary] = {}

    async def pin(server: Server) -> None:
        try:
            expired = (await server.counters()).nixl_expired
            _, handle = await produce(board, server, board.prompt, 1, board.salt(server.id, "lease"))
        except EngineError:
            return
        if handle is not None:
            found[server.id] = Canary(handle, time.monotonic(), expired)

    await asyncio.gather(*(pin(server) for server in board.active))
    return found


async def probe_policy(board: Board, canaries: dict[str, Canary], server: Server) -> list[Finding]:
    """Send the server a handle of a peer that does not exist: it must fail the request, not hide that."""
    template = next((each for name, each in canaries.items() if name != server.id), None)
    template = template or canaries.get(server.id)
    if template is None:
        observed = "not probed: no server gives a KV handle"
        return [Finding(PROBE_POLICY, (server.id,), Verdict.SKIPPED, observed)]
    dead = {**template.handle.params, **NOBODY}
    for name in ("remote_engine_id", "remote_request_id"):
        dead[name] = f"tidegate-check-{secrets.token_hex(6)}"
    began_s = time.monotonic()
    try:
        reply = await server.send(
            board.prompt,
            2,
            kv={**dead, "do_remote_prefill": True, "do_remote_decode": False},
            salt=board.salt(server.id, "dead"),
            deadline_s=server.deadlines.dead_peer_s,
        )
    except EngineTimeout as error:
        observed = f"a dead peer hangs it: {error.message}"
        change = "restart it, and set kv_load_failure_policy to fail"
        return [Finding(PROBE_POLICY, (server.id,), Verdict.RED, observed, change)]
    seconds = time.monotonic() - began_s
    if reply.status >= 500:
        observed = f"fail: a dead peer is an error after {seconds:.1f} s"
        return [Finding(PROBE_POLICY, (server.id,), Verdict.GREEN, observed)]
    if reply.status == 200:
        observed = f"recompute: a dead peer is hidden, answered after {seconds:.1f} s"
        change = (
            'set "kv_load_failure_policy": "fail" in --kv-transfer-config: with recompute a request that '
            "extends KV hangs for ever when its peer dies, and its blocks leak"
        )
        return [Finding(PROBE_POLICY, (server.id,), Verdict.RED, observed, change)]
    observed = f"unexpected answer to a dead peer: {reply.error}"
    return [Finding(PROBE_POLICY, (server.id,), Verdict.RED, observed, "see its log")]


async def probe_lease(board: Board, canaries: dict[str, Canary], server: Server) -> list[Finding]:
    """Look whether the server still keeps its canary."""
    canary = canaries.get(server.id)
    if canary is None:
        return []
    counters = await server.counters()
    held_s = time.monotonic() - canary.at_s
    if canary.expired is None or counters.nixl_expired is None:
        observed = "the server does not show when leases end"
        return [Finding(PROBE_LEASE, (server.id,), Verdict.YELLOW, observed)]
    if counters.nixl_expired > canary.expired and held_s < board.settings.lease_s - MARGIN_S:
        return [
            Finding(
                PROBE_LEASE, (server.id,), Verdict.RED, f"ended within {held_s:.1f} s", _lease_change(board)
            )
        ]
    observed = f"pinned KV still there after {held_s:.1f} s (--thorough waits for its end)"
    return [Finding(PROBE_LEASE, (server.id,), Verdict.GREEN, observed)]


async def measure_lease(board: Board, canaries: dict[str, Canary], server: Server) -> list[Finding]:
    """Wait until the server gives up its canary, by its count of expired requests."""
    canary = canaries.get(server.id)
    if canary is None or canary.expired is None:
        return await probe_lease(board, canaries, server)
    before = canary.expired
    rest_s = canary.at_s + LONGEST_WAIT_S - time.monotonic()
    while rest_s > 0:
        expired = (await server.counters()).nixl_expired
        if expired is not None and expired > before:
            break
        await asyncio.sleep(POLL_S)
        rest_s = canary.at_s + LONGEST_WAIT_S - time.monotonic()
    lease_s = time.monotonic() - canary.at_s
    if rest_s <= 0:
        observed = f"more than {LONGEST_WAIT_S:.0f} s: KV that nobody fetches stays pinned as long"
        change = f'set "kv_lease_duration" to {LEASE_S:.0f} in kv_connector_extra_config'
        return [Finding(PROBE_LEASE, (server.id,), Verdict.YELLOW, observed, change)]
    board.pins.forget(canary.handle.params)
    if lease_s < board.settings.lease_s - 2 * POLL_S:
        return [Finding(PROBE_LEASE, (server.id,), Verdict.RED, f"{lease_s:.1f} s", _lease_change(board))]
    return [Finding(PROBE_LEASE, (server.id,), Verdict.GREEN, f"{lease_s:.1f} s")]


def judge_read_back_ttl(server: Server, params: Json, now_s: float) -> list[Finding]:
    """Judge how long a server keeps what it decoded, from a handle that was given just before ``now_s``.

    Its expiry is a reading of the server's own clock since boot, which is ours only on the same machine.
    """
    expiry_s = params.get("remote_blocks_expiry_time")
    if not isinstance(expiry_s, float | int) or urlsplit(server.url).hostname not in LOCAL_HOSTS:
        return []
    ttl_s = expiry_s - now_s
    if not 0 < ttl_s < 24 * 3600:
        return []
    observed = f"what it decoded stays pinned for {ttl_s:.0f} s"
    if ttl_s <= 2 * MARGIN_S:
        change = f'set "decoder_kv_blocks_ttl" to {LEASE_S:.0f}: vLLM declines reads in its last 5 s'
        return [Finding("read-back lease", (server.id,), Verdict.RED, observed, change)]
    if ttl_s > LONG_TTL_S:
        change = f'set "decoder_kv_blocks_ttl" to {LEASE_S:.0f}: it takes KV from running requests'
        return [Finding("read-back lease", (server.id,), Verdict.YELLOW, observed, change)]
    return [Finding("read-back lease", (server.id,), Verdict.GREEN, observed)]


def _lease_change(board: Board) -> str:
    return (
        f'set "kv_lease_duration" to at least {board.settings.lease_s:.0f} in kv_connector_extra_config: '
        "tidegate counts on it, and a pull behind the lease's end loads other KV"
    )

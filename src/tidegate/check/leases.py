"""How long servers keep KV that they have pinned for others."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from tidegate.check.board import Board
from tidegate.check.pins import Pins
from tidegate.check.server import Server
from tidegate.check.transfer import TAKE_TOKENS, Taken, produce, take
from tidegate.check.verdict import Finding, Json, Verdict

PROBE_HANDLE, PROBE_LEASE, PROBE_READ_BACK = "KV handle", "lease", "read-back lease"
LONGEST_WAIT_S = 90.0
POLL_S = 0.5
SLACK_S = 1.0
"""How much shorter than promised a lease may look: we see its beginning with the answer, not before."""
LONG_TTL_S = 120.0
"""Longer read-back leases are worth knowing of (ours): they take KV space from requests."""
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
NO_CONNECTOR = (
    "start it with --kv-transfer-config: NixlConnector, kv_role kv_both, kv_load_failure_policy fail, "
    "bidirectional_kv_xfer true"
)


@dataclass(slots=True)
class Canary:
    """KV that was pinned at ``at_s`` to see how long it stays, as ``params`` describe it.

    ``expired`` counts the leases that the server had ended before, ``given`` the handles it had given up to
    this one; ``kept_s`` is how long the canary is known to have stayed, ``ended_s`` how long it was there at
    most once it is gone.
    """

    params: Json
    expired: float | None
    given: int
    at_s: float
    kept_s: float = 0.0
    ended_s: float | None = None

    async def watch(self, server: Server, pins: Pins) -> None:
        """Look whether the server still keeps it. Raises EngineError.

        A lease that ended may be another handle's, given since: then there are blocks left for the canary.
        """
        counters = await server.counters()
        age_s = time.monotonic() - self.at_s
        if self.expired is None or counters.nixl_expired is None or self.ended_s is not None:
            return
        ended = counters.nixl_expired - self.expired
        in_use, blocks = counters.blocks_in_use, max(map(len, self.params["remote_block_ids"]))
        others = pins.given_by(server.id) - self.given
        if ended > others or (ended and in_use is not None and in_use < blocks - 0.5):
            self.ended_s = age_s
        else:
            self.kept_s = age_s


async def pin_canary(board: Board, canaries: dict[str, Canary], server: Server) -> list[Finding]:
    """Pin a little KV on a server that others pull from, and keep it among ``canaries``."""
    if not board.gives(server.id):
        return []
    expired = (await server.counters()).nixl_expired
    made = await produce(board, server, board.prompt, 1, board.salt(server.id, "lease"))
    if made.handle is not None:
        board.pins.keep(made.handle.params)
        given = board.pins.given_by(server.id)
        canaries[server.id] = Canary(made.handle.params, expired, given, time.monotonic())
        return [
            Finding(PROBE_HANDLE, (server.id,), Verdict.GREEN, "pins the KV of a prefill, and tells where")
        ]
    if made.params is None:
        observed = "no KV transfer: it gives no handle for the KV of a prefill"
        return [Finding(PROBE_HANDLE, (server.id,), Verdict.RED, observed, NO_CONNECTOR)]
    covered = made.params.get("remote_num_tokens")
    observed = f"its handle covers {covered} tokens of {len(board.prompt)}, which vLLM does for hybrid models"
    change = "serve a model with plain attention, or serve without KV transfer"
    return [Finding(PROBE_HANDLE, (server.id,), Verdict.RED, observed, change)]


async def watch_canaries(board: Board, canaries: dict[str, Canary]) -> None:
    """Look at all canaries whose servers answer."""
    servers = [server for server in board.active if server.id in canaries]
    await asyncio.gather(
        *(canaries[server.id].watch(server, board.pins) for server in servers), return_exceptions=True
    )


def judge_canary(board: Board, canary: Canary, name: str) -> list[Finding]:
    """Judge a lease by what was seen of it until now, without waiting for its end."""
    wanted_s = board.settings.lease_s
    if canary.expired is None or not (canary.kept_s or canary.ended_s):
        return [Finding(PROBE_LEASE, (name,), Verdict.YELLOW, "the server does not show when leases end")]
    if canary.ended_s is None or canary.ended_s >= wanted_s - SLACK_S:
        observed = f"still pinned after {canary.kept_s:.1f} s (--thorough waits for the end)"
        return [Finding(PROBE_LEASE, (name,), Verdict.GREEN, observed)]
    observed = f"a lease ended after {canary.ended_s:.1f} s at most"
    if _others_pinned(board, name):
        observed += ", but somebody else had KV pinned too"
        return [Finding(PROBE_LEASE, (name,), Verdict.YELLOW, observed, "check an idle fleet")]
    return [Finding(PROBE_LEASE, (name,), Verdict.RED, observed, _longer(PROBE_LEASE, board))]


async def measure_lease(
    board: Board, probe: str, canaries: dict[str, Canary], server: Server
) -> list[Finding]:
    """Wait until the server gives up its canary, and judge how long that took."""
    canary = canaries.get(server.id)
    if canary is None:
        return []
    await canary.watch(server, board.pins)
    while canary.kept_s and canary.ended_s is None and canary.kept_s < LONGEST_WAIT_S:
        await asyncio.sleep(POLL_S)
        await canary.watch(server, board.pins)
    if canary.ended_s is None:
        if not canary.kept_s:
            return [Finding(probe, (server.id,), Verdict.YELLOW, "the server does not show when leases end")]
        observed = f"more than {LONGEST_WAIT_S:.0f} s: KV that nobody fetches stays pinned as long"
        good_s = board.settings.lease_s if probe == PROBE_LEASE else 1.0
        change = f'set "{_setting(probe)}" to {good_s:.0f} in kv_connector_extra_config'
        return [Finding(probe, (server.id,), Verdict.YELLOW, observed, change)]
    board.pins.forget(canary.params)
    observed = f"ended between {canary.kept_s:.1f} and {canary.ended_s:.1f} s"
    if probe == PROBE_LEASE and canary.ended_s < board.settings.lease_s - SLACK_S:
        return [Finding(probe, (server.id,), Verdict.RED, observed, _longer(probe, board))]
    return [Finding(probe, (server.id,), Verdict.GREEN, observed)]


async def pin_decoded(board: Board, canaries: dict[str, Canary], owner: Server, taker: Server) -> None:
    """Have ``taker`` decode from ``owner``'s KV and keep the result pinned, for ``canaries``."""
    salt = board.salt(taker.id, "decoded")
    made = await produce(board, owner, board.prompt, 1, salt)
    if made.handle is None:
        return
    expired = (await taker.counters()).nixl_expired
    rest = board.expected(owner.id, taker.id)[:TAKE_TOKENS]
    taken = await take(board, taker, made.handle, board.prompt, rest, pin=False, salt=salt)
    if taken.params is not None:
        board.pins.keep(taken.params)
        since_s = time.perf_counter() - taken.at_s
        given = board.pins.given_by(taker.id)
        canaries[taker.id] = Canary(taken.params, expired, given, time.monotonic() - since_s)


def judge_read_back(server: Server, taken: Taken) -> list[Finding]:
    """Judge how long a server keeps what it decoded, by the handle that it gave.

    The handle's expiry is a reading of the server's own clock since boot, which is ours only on the same
    machine; no finding elsewhere.
    """
    expiry_s = (taken.params or {}).get("remote_blocks_expiry_time")
    if not isinstance(expiry_s, float | int) or urlsplit(server.url).hostname not in LOCAL_HOSTS:
        return []
    ttl_s = expiry_s - taken.at_s
    if not 0 < ttl_s < 24 * 3600:
        return []
    observed = f"what it decoded stays pinned for {ttl_s:.0f} s"
    if ttl_s > LONG_TTL_S:
        change = 'set "decoder_kv_blocks_ttl" to 1: tidegate reads no KV there, and it leaves less room'
        return [Finding(PROBE_READ_BACK, (server.id,), Verdict.YELLOW, observed, change)]
    return [Finding(PROBE_READ_BACK, (server.id,), Verdict.GREEN, observed)]


def _others_pinned(board: Board, name: str) -> bool:
    """Tell whether blocks were in use on the server before the check."""
    counters = board.facts[name].counters
    return counters is not None and (counters.blocks_in_use or 0.0) >= 1.0


def _setting(probe: str) -> str:
    return "kv_lease_duration" if probe == PROBE_LEASE else "decoder_kv_blocks_ttl"


def _longer(probe: str, board: Board) -> str:
    return (
        f'set "{_setting(probe)}" to at least {board.settings.lease_s:.0f} in kv_connector_extra_config: '
        "tidegate counts on it, and a pull behind the lease's end loads other KV"
    )

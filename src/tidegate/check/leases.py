"""How long servers keep KV that they have pinned, and what they do when KV cannot be had."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from tidegate.check.context import CheckContext
from tidegate.check.pairs import TAKE_TOKENS, PullResult, pin_prefill, pull_kv
from tidegate.check.server import PinnedHandles, ProbedServer
from tidegate.check.verdict import GREEN, RED, SKIPPED, YELLOW, Finding
from tidegate.core.errors import EngineTimeout
from tidegate.engines.seam import Json

PROBE_HANDLE, PROBE_LEASE, PROBE_READ_BACK = "KV handle", "lease", "read-back lease"
PROBE_POLICY = "failure policy"
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
SETTINGS = {PROBE_LEASE: "kv_lease_duration", PROBE_READ_BACK: "decoder_kv_blocks_ttl"}
HIDDEN_LEASES = "the server does not show when leases end"
NOBODY = {"remote_host": "127.0.0.1", "remote_port": 1}
"""Where no side channel listens."""
SET_FAIL = (
    'set "kv_load_failure_policy": "fail" in --kv-transfer-config: with recompute a request that extends '
    "KV hangs for ever when its peer dies, and its blocks leak"
)


@dataclass(slots=True)
class PinnedSample:
    """KV that was pinned at ``at_s`` to see how long it stays, as ``params`` describe it.

    ``expired`` counts the leases that the server had ended before, ``given`` the handles it had given up to
    this one. The sample stayed for ``kept_s`` at least and, once it is gone, ``ended_s`` at most.
    """

    params: Json
    expired: int | None
    given: int
    at_s: float
    kept_s: float = 0.0
    ended_s: float | None = None

    async def watch(self, server: ProbedServer, pins: PinnedHandles) -> None:
        """Look whether the server still keeps it. A lease that ended may be another handle's, given since:
        then there are blocks left for the sample. Raises EngineError."""
        metrics = await server.metrics()
        age_s = time.monotonic() - self.at_s
        if self.expired is None or metrics.nixl_expired is None or self.ended_s is not None:
            return
        ended = metrics.nixl_expired - self.expired
        in_use, blocks = metrics.kv_blocks_in_use, max(map(len, self.params["remote_block_ids"]))
        others = pins.given_by(server.id) - self.given
        if ended > others or (ended and in_use is not None and in_use < blocks - 0.5):
            self.ended_s = age_s
        else:
            self.kept_s = age_s


Samples = dict[str, PinnedSample]
"""Samples by the id of the server that keeps them."""


async def pin_sample(check: CheckContext, samples: Samples, server: ProbedServer) -> Finding | None:
    """Pin a little KV on a server that others pull from, and keep it among ``samples``."""
    if not check.produces_kv(server.id):
        return None
    expired = (await server.metrics()).nixl_expired
    reply, handle = await pin_prefill(check, server, check.prompt, 1, check.salt(server.id, "lease"))
    if handle is not None:
        check.pins.keep(handle.params)
        given = check.pins.given_by(server.id)
        samples[server.id] = PinnedSample(handle.params, expired, given, time.monotonic())
        return Finding(PROBE_HANDLE, (server.id,), GREEN, "pins the KV of a prefill, and tells where")
    if reply.kv_params is None:
        observed = "no KV transfer: it gives no handle for the KV of a prefill"
        return Finding(PROBE_HANDLE, (server.id,), RED, observed, NO_CONNECTOR)
    covered = reply.kv_params.get("remote_num_tokens")
    observed = f"its handle covers {covered} tokens of {len(check.prompt)}, which vLLM does for hybrid models"
    change = "serve a model with plain attention, or serve without KV transfer"
    return Finding(PROBE_HANDLE, (server.id,), RED, observed, change)


async def watch_samples(check: CheckContext, samples: Samples) -> None:
    """Look at all samples whose servers answer."""
    servers = [server for server in check.active if server.id in samples]
    await asyncio.gather(
        *(samples[server.id].watch(server, check.pins) for server in servers), return_exceptions=True
    )


def judge_sample(check: CheckContext, sample: PinnedSample, name: str) -> Finding:
    """Judge a lease by what was seen of it until now, without waiting for its end."""
    if sample.expired is None or not (sample.kept_s or sample.ended_s):
        return Finding(PROBE_LEASE, (name,), YELLOW, HIDDEN_LEASES)
    if sample.ended_s is None or sample.ended_s >= check.settings.lease_s - SLACK_S:
        observed = f"still pinned after {sample.kept_s:.1f} s (--thorough waits for the end)"
        return Finding(PROBE_LEASE, (name,), GREEN, observed)
    observed = f"a lease ended after {sample.ended_s:.1f} s at most"
    if (check.described[name].facts.metrics.kv_blocks_in_use or 0.0) >= 1.0:
        observed += ", but somebody else had KV pinned too"
        return Finding(PROBE_LEASE, (name,), YELLOW, observed, "check an idle fleet")
    return Finding(PROBE_LEASE, (name,), RED, observed, _longer(check))


async def measure_lease(
    check: CheckContext, probe: str, samples: Samples, server: ProbedServer
) -> Finding | None:
    """Wait until the server gives up its sample, and judge how long that took."""
    sample = samples.get(server.id)
    if sample is None:
        return None
    await sample.watch(server, check.pins)
    while sample.kept_s and sample.ended_s is None and sample.kept_s < LONGEST_WAIT_S:
        await asyncio.sleep(POLL_S)
        await sample.watch(server, check.pins)
    if sample.ended_s is None:
        if not sample.kept_s:
            return Finding(probe, (server.id,), YELLOW, HIDDEN_LEASES)
        observed = f"more than {LONGEST_WAIT_S:.0f} s: KV that nobody fetches stays pinned as long"
        good_s = check.settings.lease_s if probe == PROBE_LEASE else 1.0
        change = f'set "{SETTINGS[probe]}" to {good_s:.0f} in kv_connector_extra_config'
        return Finding(probe, (server.id,), YELLOW, observed, change)
    check.pins.forget(sample.params)
    observed = f"ended between {sample.kept_s:.1f} and {sample.ended_s:.1f} s"
    if probe == PROBE_LEASE and sample.ended_s < check.settings.lease_s - SLACK_S:
        return Finding(probe, (server.id,), RED, observed, _longer(check))
    return Finding(probe, (server.id,), GREEN, observed)


async def pin_decoded(
    check: CheckContext, samples: Samples, owner: ProbedServer, taker: ProbedServer
) -> None:
    """Have ``taker`` decode from ``owner``'s KV and keep the result pinned, for ``samples``."""
    salt = check.salt(taker.id, "decoded")
    _, handle = await pin_prefill(check, owner, check.prompt, 1, salt)
    if handle is None:
        return
    expired = (await taker.metrics()).nixl_expired
    rest = check.expected(owner.id, taker.id)[:TAKE_TOKENS]
    taken = await pull_kv(check, taker, handle, check.prompt, rest, pin=False, salt=salt)
    if taken.params is not None:
        check.pins.keep(taken.params)
        since_s = time.perf_counter() - taken.at_s
        given = check.pins.given_by(taker.id)
        samples[taker.id] = PinnedSample(taken.params, expired, given, time.monotonic() - since_s)


def judge_read_back(server: ProbedServer, taken: PullResult) -> Finding | None:
    """Judge how long a server on this machine keeps what it decoded: the handle that it gave has its expiry,
    by the clock since boot."""
    expiry_s = (taken.params or {}).get("remote_blocks_expiry_time")
    if not isinstance(expiry_s, float | int) or urlsplit(server.url).hostname not in LOCAL_HOSTS:
        return None
    ttl_s = expiry_s - taken.at_s
    if not 0 < ttl_s < 24 * 3600:
        return None
    observed = f"what it decoded stays pinned for {ttl_s:.0f} s"
    if ttl_s > LONG_TTL_S:
        change = 'set "decoder_kv_blocks_ttl" to 1: tidegate reads no KV there, and it leaves less room'
        return Finding(PROBE_READ_BACK, (server.id,), YELLOW, observed, change)
    return Finding(PROBE_READ_BACK, (server.id,), GREEN, observed)


def _longer(check: CheckContext) -> str:
    return (
        f'set "kv_lease_duration" to at least {check.settings.lease_s:.0f} in kv_connector_extra_config: '
        "tidegate counts on it, and a pull behind the lease's end loads other KV"
    )


async def probe_policy(check: CheckContext, samples: Samples, server: ProbedServer) -> Finding | None:
    """Send the server the handle of a peer that does not exist: it must fail the request, not hide that. The
    handle is a sample's, under another name: as ``do_remote_prefill`` it ends under either policy."""
    where = (server.id,)
    if not check.consumes_kv(server.id):
        return None
    template = samples.get(server.id) or next(iter(samples.values()), None)
    if template is None:
        return Finding(PROBE_POLICY, where, SKIPPED, "not probed: no server gives a KV handle")
    kv = {**template.params, **NOBODY, "do_remote_prefill": True, "do_remote_decode": False}
    for name in ("remote_engine_id", "remote_request_id"):
        kv[name] = f"tidegate-check-{secrets.token_hex(6)}"
    salt = check.salt(server.id, "dead")
    began_s = time.monotonic()
    try:
        reply = await server.complete(check.prompt, 2, kv=kv, salt=salt, deadline_s=server.dead_peer_s)
    except EngineTimeout as error:
        observed = f"a dead peer hangs it: {error.message}"
        return Finding(PROBE_POLICY, where, RED, observed, f"restart it, and {SET_FAIL}")
    seconds = time.monotonic() - began_s
    if reply.status >= 500:
        return Finding(PROBE_POLICY, where, GREEN, f"fail: a dead peer is an error after {seconds:.1f} s")
    if reply.status == 200:
        observed = f"recompute: a dead peer is hidden, and answered for after {seconds:.1f} s"
        return Finding(PROBE_POLICY, where, RED, observed, SET_FAIL)
    return Finding(
        PROBE_POLICY, where, RED, f"unexpected answer to a dead peer: {reply.error}", "see its log"
    )

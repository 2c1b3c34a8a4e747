"""What a server does when the KV that a request comes with cannot be had."""

from __future__ import annotations

import secrets
import time

from tidegate.check.context import CheckContext
from tidegate.check.leases import PinnedSample
from tidegate.check.server import ProbedServer
from tidegate.check.verdict import CheckVerdict, Finding
from tidegate.core.errors import EngineTimeout

PROBE = "failure policy"
NOBODY = {"remote_host": "127.0.0.1", "remote_port": 1}
"""Where no side channel listens."""
SET_FAIL = (
    'set "kv_load_failure_policy": "fail" in --kv-transfer-config: with recompute a request that extends '
    "KV hangs for ever when its peer dies, and its blocks leak"
)


async def probe_policy(
    check: CheckContext, samples: dict[str, PinnedSample], server: ProbedServer
) -> list[Finding]:
    """Send the server the handle of a peer that does not exist: it must fail the request, not hide that.

    The handle is a sample's, under another name: as ``do_remote_prefill`` it ends under either policy.
    """
    if not check.consumes_kv(server.id):
        return []
    template = samples.get(server.id) or next(iter(samples.values()), None)
    if template is None:
        observed = "not probed: no server gives a KV handle"
        return [Finding(PROBE, (server.id,), CheckVerdict.SKIPPED, observed)]
    kv = {**template.params, **NOBODY, "do_remote_prefill": True, "do_remote_decode": False}
    for name in ("remote_engine_id", "remote_request_id"):
        kv[name] = f"tidegate-check-{secrets.token_hex(6)}"
    deadline_s = server.dead_peer_s
    began_s = time.monotonic()
    try:
        reply = await server.complete(
            check.prompt, 2, kv=kv, salt=check.salt(server.id, "dead"), deadline_s=deadline_s
        )
    except EngineTimeout as error:
        observed = f"a dead peer hangs it: {error.message}"
        return [Finding(PROBE, (server.id,), CheckVerdict.RED, observed, f"restart it, and {SET_FAIL}")]
    seconds = time.monotonic() - began_s
    if reply.status >= 500:
        observed = f"fail: a dead peer is an error after {seconds:.1f} s"
        return [Finding(PROBE, (server.id,), CheckVerdict.GREEN, observed)]
    if reply.status == 200:
        observed = f"recompute: a dead peer is hidden, and answered for after {seconds:.1f} s"
        return [Finding(PROBE, (server.id,), CheckVerdict.RED, observed, SET_FAIL)]
    observed = f"unexpected answer to a dead peer: {reply.error}"
    return [Finding(PROBE, (server.id,), CheckVerdict.RED, observed, "see its log")]

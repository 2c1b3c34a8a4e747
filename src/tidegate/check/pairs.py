"""Probes of pairs of servers: can the second one go on with KV, or with a stream, of the first one?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from urllib.parse import urlsplit

from tidegate.check.context import CheckContext
from tidegate.check.server import ProbedServer
from tidegate.check.verdict import GREEN, RED, SKIPPED, YELLOW, CheckVerdict, Finding
from tidegate.core.errors import EngineError
from tidegate.engines.seam import Json, KvHandle
from tidegate.engines.vllm.client import Reply
from tidegate.engines.vllm.metrics import CACHED, COMPUTED, PULLED, VllmMetrics

PROBE_PULL, PROBE_READ, PROBE_FLIP = "KV pull", "bidirectional reads", "flip without restart"
PROBE_CHANNEL, PROBE_EXPORT = "side channel", "export on demand"
BIDIRECTIONAL = (
    'add "kv_connector_extra_config": {"bidirectional_kv_xfer": true} to --kv-transfer-config: '
    "without it KV of earlier rounds cannot be read back, and a request that tries would hang"
)
SIDE_CHANNEL = (
    "set VLLM_NIXL_SIDE_CHANNEL_HOST to an address that its peers can reach, and open "
    "VLLM_NIXL_SIDE_CHANNEL_PORT to them"
)
CONNECT_S = 2.0
GREETING = b"\xff"
"""How every ZeroMQ peer begins."""
STREAMED_TOKENS = 11
LONGEST_STREAM = 512
PULLED_ENOUGH = 0.95
TAKE_TOKENS = 12
LEASE_TOKENS = 7


@dataclass(frozen=True, slots=True)
class PullResult:
    """What happened when a server was sent somebody's handle.

    ``pulled`` (None if unknown), ``hit`` and ``computed`` count its prompt tokens by source.
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


@dataclass(frozen=True, slots=True)
class PairResult:
    """What one ordered pair showed. ``handle`` is the owner's; None when it pins nothing. ``read`` is
    None where reading back was not tried."""

    handle: Json | None = None
    pull: PullResult | None = None
    read: PullResult | None = None
    failed: str = ""
    """Why the owner could not even prefill."""
    skipped: str = ""
    first_failure: str = ""
    """What went wrong with the first of two pulls."""

    @property
    def works(self) -> bool:
        """Whether the KV moved and was right."""
        return self.pull is not None and self.pull.judge(0)[0] is not RED and self.pull.pulled != 0


PairResults = dict[tuple[str, str], PairResult]
"""Results by the ids of the KV's owner and of its taker."""


def rounds(names: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """Yield matches in which every two names meet once, and nobody is in two matches of one round."""
    ring: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        matches = zip(ring[:half], reversed(ring[half:]), strict=True)
        yield [(a, b) for a, b in matches if a is not None and b is not None]
        ring = [ring[0], ring[-1], *ring[1:-1]]


async def probe_pairs(check: CheckContext, advance: Callable[[float], None]) -> PairResults:
    """Probe all ordered pairs of active servers: both directions of a match in turn, matches of a round at
    once. A server that stops answering is excluded, and its further matches are left out."""
    results: PairResults = {}

    async def match(a: str, b: str) -> None:
        for owner, taker in ((a, b), (b, a)):
            if {a, b} & check.excluded.keys() or not (check.produces_kv(owner) and check.consumes_kv(taker)):
                continue
            hopeless = _hopeless(results, owner, taker)
            results[owner, taker] = (
                PairResult(skipped=hopeless)
                if hopeless
                else await _probe_pair(check, check.servers[owner], check.servers[taker])
            )

    planned = list(rounds([each.id for each in check.active]))
    for n, matches in enumerate(planned):
        await asyncio.gather(*(match(a, b) for a, b in matches))
        advance((n + 1) / len(planned))
    return results


def _hopeless(results: PairResults, owner: str, taker: str) -> str:
    """Say why nothing can be expected of a pair, after two others failed in the same way; else empty."""
    for name, side, what in ((owner, 0, "two others could not pull from"), (taker, 1, "two pulls failed on")):
        pulls = [each.pull for pair, each in results.items() if pair[side] == name and each.pull]
        if len(pulls) >= 2 and all(pull.error for pull in pulls):
            return f"not probed: {what} {name}"
    return ""


async def _probe_pair(check: CheckContext, owner: ProbedServer, taker: ProbedServer) -> PairResult:
    """Probe one pair. A pull that fails is tried once more, and the result has the first failure."""
    try:
        found = await _pulled(check, owner, taker, "pull")
        if found.pull is not None and not found.works and owner.id not in check.excluded:
            if found.pull.error:
                await _still_serves(check, taker)
            if taker.id in check.excluded:
                return found
            again = await _pulled(check, owner, taker, "again")
            if again.works:
                found = replace(again, first_failure=found.pull.judge(len(check.prompt))[1])
        # Only now: a server without bidirectional reads would never answer what follows, and leak its blocks.
        if found.works and found.pull is not None and found.pull.params is not None:
            found = replace(found, read=await _read(check, owner, taker))
        return found
    except EngineError as error:
        return PairResult(failed=f"{error.instance}: {error.message}")
    finally:
        await check.pins.release(check.servers, (owner.id, taker.id))


async def _pulled(check: CheckContext, owner: ProbedServer, taker: ProbedServer, trial: str) -> PairResult:
    salt = check.salt(owner.id, taker.id, trial)
    expected = check.expected(owner.id, taker.id)[:TAKE_TOKENS]
    _, handle = await pin_prefill(check, owner, check.prompt, 1, salt)
    if handle is None:
        return PairResult(failed=f"{owner.id}: it gave no handle this time")
    pull = await pull_kv(check, taker, handle, check.prompt, expected, pin=False, salt=salt)
    return PairResult(handle.params, pull)


async def _read(check: CheckContext, owner: ProbedServer, taker: ProbedServer) -> PullResult | None:
    salt = check.salt(owner.id, taker.id, "read")
    reply, handle = await pin_prefill(check, owner, check.prompt, LEASE_TOKENS, salt)
    if handle is None:
        return None
    rest = check.expected(owner.id, taker.id)[LEASE_TOKENS : LEASE_TOKENS + TAKE_TOKENS]
    prompt = check.prompt + reply.new_tokens()
    read = await pull_kv(check, taker, handle, prompt, rest, pin=True, salt=salt)
    if read.error:
        await _still_serves(check, taker)
    return read


async def _still_serves(check: CheckContext, server: ProbedServer) -> None:
    try:
        (await server.complete(check.fresh_prompt(8), 1)).new_tokens()
    except EngineError as error:
        check.excluded.setdefault(server.id, "it stopped answering")
        observed = f"stopped answering after a pull failed: {error.message}"
        check.add(Finding("reachable", (server.id,), RED, observed, "restart it; its log has the reason"))


def judge_pairs(check: CheckContext, results: PairResults) -> list[Finding]:
    """Return the findings of all pairs."""
    found: list[Finding] = []
    reads: list[Finding] = []
    wanted = len(check.prompt)
    for pair, each in results.items():
        if each.skipped:
            found.append(Finding(PROBE_PULL, pair, SKIPPED, each.skipped))
        elif each.failed:
            found.append(Finding(PROBE_PULL, pair, RED, each.failed, "see the server's log"))
        elif each.first_failure:
            observed = f"the first of two pulls failed: {each.first_failure}"
            change = "check again; if it stays, the machines or their network are too busy for handshakes"
            found.append(Finding(PROBE_PULL, pair, YELLOW, observed, change))
        elif each.pull is not None:
            found.append(Finding(PROBE_PULL, pair, *each.pull.judge(wanted)))
        if each.read is not None:
            reads.append(Finding(PROBE_READ, pair, *each.read.judge(wanted + LEASE_TOKENS - 1)))
    return found + _judge_flips(results) + _judge_readers(results) + reads


def _judge_flips(results: PairResults) -> list[Finding]:
    found = []
    for (a, b), there in results.items():
        back = results.get((b, a))
        if a > b or back is None or there.pull is None or back.pull is None:
            continue
        if there.works and back.works:
            observed = "each gave KV to the other and took some, in one process"
            found.append(Finding(PROBE_FLIP, (a, b), GREEN, observed))
        elif there.works or back.works:
            good = f"{a} -> {b}" if there.works else f"{b} -> {a}"
            observed = f"KV moves one way only: {good}"
            found.append(Finding(PROBE_FLIP, (a, b), RED, observed, "see the pull that failed"))
    return found


def _judge_readers(results: PairResults) -> list[Finding]:
    """Tell who pins what it has decoded, which a server does only with bidirectional reads."""
    found = []
    for name in sorted({taker for _, taker in results}):
        pulls = [each.pull for (_, taker), each in results.items() if taker == name and each.pull]
        answered = [pull for pull in pulls if not pull.error]
        if answered and not any(pull.params for pull in answered):
            observed = "bidirectional reads are missing: it keeps no KV of what it decoded"
            found.append(Finding(PROBE_READ, (name,), RED, observed, BIDIRECTIONAL))
        elif pulls and not answered:
            found.append(Finding(PROBE_READ, (name,), SKIPPED, "not probed: no pull worked"))
    return found


async def judge_channels(check: CheckContext, results: PairResults) -> list[Finding]:
    """Judge each owner of KV: was somebody able to fetch it? Also tries the address from here, which says
    where to look when nobody was."""
    names = sorted({owner for (owner, _), each in results.items() if each.handle is not None})
    return await asyncio.gather(*(_judge_channel(check, results, name) for name in names))


async def _judge_channel(check: CheckContext, results: PairResults, name: str) -> Finding:
    pairs = {taker: each for (owner, taker), each in results.items() if owner == name and each.handle}
    params = next(each.handle for each in pairs.values() if each.handle is not None)
    host, port = str(params.get("remote_host")), params.get("remote_port")
    address = f"{host}:{port}"
    working = [taker for taker, each in pairs.items() if each.works]
    if working:
        return Finding(PROBE_CHANNEL, (name,), GREEN, f"{address} serves {', '.join(working)}")
    if await _greets(host, port):
        observed = f"{address} answers from here, but no peer could fetch KV from it"
        change = "let peers reach it, and open UCX's ports (UCX_NET_DEVICES, UCX_TLS) between the servers"
        return Finding(PROBE_CHANNEL, (name,), RED, observed, change)
    observed = f"side channel blocked: neither peers nor we reach {address}"
    if _is_local(host) and not _is_local(urlsplit(check.servers[name].url).hostname or ""):
        observed += ", which is the server's own machine only"
    return Finding(PROBE_CHANNEL, (name,), RED, observed, SIDE_CHANNEL)


async def _greets(host: str, port: object) -> bool:
    """Tell whether a ZeroMQ peer answers at the address."""
    if not isinstance(port, int):
        return False
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                return await reader.read(1) == GREETING
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError):
        return False


def _is_local(host: str) -> bool:
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified


async def probe_exports(check: CheckContext, results: PairResults) -> None:
    """Move one stream away from every server that others pull from, towards one that can take it."""
    for server in check.active:
        if not check.produces_kv(server.id):
            continue
        takers = [taker for (owner, taker), each in results.items() if owner == server.id and each.works]
        target = next((taker for taker in takers if taker not in check.excluded), None)
        if target is None:
            observed = "not probed: no server can pull from it"
            check.add(Finding(PROBE_EXPORT, (server.id,), SKIPPED, observed))
        else:
            probe = _probe_export(check, server, check.servers[target])
            check.add(await check.run_probe(PROBE_EXPORT, server.id, probe))
            await check.pins.release(check.servers, (server.id, target))


async def _probe_export(check: CheckContext, source: ProbedServer, target: ProbedServer) -> Finding:
    """Stop a stream, pin its KV after the fact, and continue it on ``target``."""
    salt = check.salt(source.id, "export")
    length = min(LONGEST_STREAM, check.described[source.id].facts.max_model_len - len(check.prompt))
    stream = await source.stream(check.prompt, length, stop_after=STREAMED_TOKENS, salt=salt)
    prompt = check.prompt + stream.token_ids[:STREAMED_TOKENS]
    before = await source.metrics()
    _, handle = await pin_prefill(check, source, prompt, 1, salt)
    if handle is None:
        return Finding(PROBE_EXPORT, (source.id,), RED, "no handle for what it had streamed", "see its log")
    served = before.source(CACHED) + before.source(COMPUTED) + len(prompt)
    after = await source.metrics_once(lambda now: now.source(CACHED) + now.source(COMPUTED) >= served)
    rest = check.expected(source.id, target.id)[STREAMED_TOKENS : STREAMED_TOKENS + TAKE_TOKENS]
    taken = await pull_kv(check, target, handle, prompt, rest, pin=False, salt=salt)
    verdict, observed, change = taken.judge(len(prompt))
    if verdict is not GREEN:
        return Finding(PROBE_EXPORT, (source.id,), verdict, observed, change)
    hit = after.source(CACHED) - before.source(CACHED)
    observed = f"{hit} of {len(prompt)} tokens from its cache; {target.id} went on: {observed}"
    if after.prompt_tokens_by_source is not None and hit < len(prompt) - 2 * check.block_tokens:
        change = "turn on --enable-prefix-caching: the source computes the whole prompt again for each move"
        return Finding(PROBE_EXPORT, (source.id,), YELLOW, observed, change)
    return Finding(PROBE_EXPORT, (source.id,), GREEN, observed)

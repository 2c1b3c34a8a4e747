"""The check itself: which probes run, in which order, and what is left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

import aiohttp

from tidegate.check import leases, local, pairs
from tidegate.check.context import CheckContext, CheckSettings
from tidegate.check.server import Deadlines, PinnedHandles, ProbedServer
from tidegate.check.verdict import GREEN, RED, SKIPPED, YELLOW, CheckReport, Finding
from tidegate.core.errors import EngineError
from tidegate.engines.seam import Json

PROBE_LEFT = "left behind"
CLEAN_S = 3.0
SPARE_BLOCKS = 0.5
"""How far a reading of blocks in use may be off by rounding."""

Advance = Callable[[float, str], None]


async def check_fleet(
    settings: CheckSettings, advance: Advance, *, deadlines: Deadlines | None = None
) -> CheckReport:
    """Probe ``settings.servers``, named i0, i1, ... in that order. ``advance`` receives the share done and
    what is probed. Never raises for what servers do, and ends even when they hang: every call has its
    deadline. Pinned KV is released, also on cancellation."""
    began_s = time.monotonic()
    # A connection for each call: servers close idle ones at moments of their own, which fails a POST.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        pins = PinnedHandles()
        servers, roles = {}, {}
        for n, (url, role) in enumerate(settings.servers):
            name = f"i{n}"
            servers[name] = ProbedServer(name, url, session, pins, deadlines or Deadlines(), settings.api_key)
            if role is not None:
                roles[name] = role
        check = CheckContext(settings, servers, pins, roles)
        try:
            await _probe(check, advance)
        finally:
            await pins.release_all(servers)
        advance(1.0, "looking at what is left")
        described = [server for server in check.active if server.id in check.described]
        check.add(*await asyncio.gather(*(_left_behind(check, server) for server in described)))
    reported: dict[str, Json] = {name: {"url": server.url} for name, server in servers.items()}
    for name, said in check.described.items():
        reported[name] |= {
            "model": said.facts.model,
            "max_model_len": said.facts.max_model_len,
            "version": said.version,
            "block_tokens": said.facts.metrics.block_tokens,
            "kv_capacity_tokens": said.facts.metrics.kv_capacity_tokens,
        }
    return CheckReport(reported, check.findings, time.monotonic() - began_s)


NO_HIDDEN_STATES = (
    "vLLM gives no hidden states of running decodes: what is left of an answer is predicted from the lengths "
    "of others (--lengths histogram)"
)


async def _probe(check: CheckContext, advance: Advance) -> None:
    advance(0.0, "asking the servers what they are")
    await local.compare_descriptions(check)
    await local.compare_tokenizers(check)
    if not check.active:
        return
    check.choose_prompt()
    advance(0.05, "comparing answers")
    await local.compare_answers(check)
    await check.run_on_each("prefix cache", partial(local.probe_prefix_cache, check))
    for n, server in enumerate(check.active):
        advance(0.1 + 0.1 * n / len(check.servers), f"timing {server.id}")
        check.add(await check.run_probe("speed", server.id, local.probe_speed(check, server)))
    if check.settings.ours:
        reason = "not probed: tidegate's own instances hand KV on in a protocol of their own"
        check.add(Finding(pairs.PROBE_PULL, (), YELLOW, reason))
        return
    check.add(Finding("lengths", (), GREEN, NO_HIDDEN_STATES))
    samples: leases.Samples = {}
    await check.run_on_each(
        leases.PROBE_HANDLE, partial(leases.pin_sample, check, samples), fatal="it gives no KV handle"
    )
    results: pairs.PairResults = {}
    if len(check.active) > 1:
        results = await pairs.probe_pairs(check, lambda share: advance(0.2 + 0.5 * share, "moving KV"))
        check.add(*pairs.judge_pairs(check, results), *await pairs.judge_channels(check, results))
        advance(0.7, "moving a stream")
        await pairs.probe_exports(check, results)
    elif len(check.servers) == 1:
        check.add(Finding(pairs.PROBE_PULL, (), YELLOW, "one server: there is nobody to hand KV to"))
    advance(0.75, "pretending that a peer is dead")
    await leases.watch_samples(check, samples)
    await check.run_on_each(leases.PROBE_POLICY, partial(leases.probe_policy, check, samples))
    if check.settings.thorough:
        await _wait_for_leases(check, samples, results, advance)
    else:
        await _judge_leases(check, samples, results)
    for name, why in check.excluded.items():
        check.add(Finding(pairs.PROBE_PULL, (name,), SKIPPED, f"not probed: {why}"))


async def _judge_leases(check: CheckContext, samples: leases.Samples, results: pairs.PairResults) -> None:
    """Judge leases by what was seen of them until now."""
    await leases.watch_samples(check, samples)
    for server in check.active:
        if server.id in samples:
            check.add(leases.judge_sample(check, samples[server.id], server.id))
        taken = [each.pull for (_, taker), each in results.items() if taker == server.id]
        pull = next((each for each in taken if each is not None and each.params), None)
        if pull is not None:
            check.add(leases.judge_read_back(server, pull))


async def _wait_for_leases(
    check: CheckContext, samples: leases.Samples, results: pairs.PairResults, advance: Advance
) -> None:
    """Judge leases by waiting for their ends."""
    advance(0.8, "waiting for leases to end")
    await check.run_on_each(
        leases.PROBE_LEASE, partial(leases.measure_lease, check, leases.PROBE_LEASE, samples)
    )
    decoded: leases.Samples = {}
    for server in check.active:
        owners = [owner for (owner, taker), each in results.items() if taker == server.id and each.works]
        if owners and owners[0] not in check.excluded:
            await leases.pin_decoded(check, decoded, check.servers[owners[0]], server)
    advance(0.9, "waiting for leases to end")
    await check.run_on_each(
        leases.PROBE_READ_BACK, partial(leases.measure_lease, check, leases.PROBE_READ_BACK, decoded)
    )


async def _left_behind(check: CheckContext, server: ProbedServer) -> Finding:
    """Compare the blocks in use with those before the check."""
    where = (server.id,)
    before = check.described[server.id].facts.metrics.kv_blocks_in_use
    if before is None:
        return Finding(PROBE_LEFT, where, YELLOW, "the server does not show its blocks")
    limit = before + SPARE_BLOCKS
    try:
        metrics = await server.metrics_once(
            lambda now: (now.kv_blocks_in_use or 0.0) <= limit, within_s=CLEAN_S
        )
    except EngineError as error:
        return Finding(PROBE_LEFT, where, RED, error.message, "see the server's log")
    after = metrics.kv_blocks_in_use
    if after is not None and after <= limit:
        return Finding(PROBE_LEFT, where, GREEN, "no block is pinned")
    more = f"{(after or 0.0) - before:.0f} blocks more in use than before"
    if check.pins.held_by(server.id):
        observed, change = f"{more}: nobody can tell it to let go", "wait for its lease to end"
        return Finding(PROBE_LEFT, where, YELLOW, observed, change)
    return Finding(PROBE_LEFT, where, YELLOW, more, "somebody else uses it, or it leaks: see its log")

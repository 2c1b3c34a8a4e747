"""The check itself: which probes run, in which order, and what is left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import aiohttp

from tidegate.check.channels import judge_channels
from tidegate.check.context import CheckContext, CheckSettings
from tidegate.check.export import probe_exports
from tidegate.check.facts import (
    SAMPLE_TEXTS,
    compare_descriptions,
    compare_roles,
    compared,
    describe,
    judge_clocks,
)
from tidegate.check.leases import (
    PROBE_HANDLE,
    PROBE_LEASE,
    PROBE_READ_BACK,
    PinnedSample,
    judge_read_back,
    judge_sample,
    measure_lease,
    pin_decoded,
    pin_sample,
    watch_samples,
)
from tidegate.check.local import compare_answers, probe_prefix_cache, probe_speed
from tidegate.check.pairs import PairResult, judge_pairs, probe_pairs
from tidegate.check.pins import PinnedHandles
from tidegate.check.policy import PROBE as PROBE_POLICY
from tidegate.check.policy import probe_policy
from tidegate.check.server import Deadlines, ProbedServer
from tidegate.check.verdict import CheckReport, CheckVerdict, Finding
from tidegate.core.errors import EngineError

CLEAN_S = 3.0
SPARE_BLOCKS = 0.5
"""How far a reading of blocks in use may be off by rounding."""

Advance = Callable[[float, str], None]


async def check_fleet(
    settings: CheckSettings, advance: Advance, *, deadlines: Deadlines | None = None
) -> CheckReport:
    """Probe ``settings.servers``, named i0, i1, ... in that order.

    ``advance`` is told the share done and what is being looked at. Never raises for what servers do, and ends
    even when they hang: every call has its deadline. What was pinned is let go of, also on cancellation.
    """
    began_s = time.monotonic()
    # A connection for each call: servers close idle ones at moments of their own, which fails a POST.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        pins = PinnedHandles()
        servers = {
            f"i{n}": ProbedServer(
                f"i{n}",
                url,
                session,
                deadlines=deadlines or Deadlines(),
                api_key=settings.api_key,
                pinned=pins.add,
            )
            for n, (url, _) in enumerate(settings.servers)
        }
        roles = {f"i{n}": role for n, (_, role) in enumerate(settings.servers) if role is not None}
        check = CheckContext(settings, servers, pins, roles)
        try:
            await _probe(check, advance)
        finally:
            await pins.release_all(servers)
        advance(1.0, "looking at what is left")
        check.add(await _left_behind(check))
    described = {
        name: {"url": server.url, **(check.described[name].to_json() if name in check.described else {})}
        for name, server in servers.items()
    }
    return CheckReport(described, check.findings, time.monotonic() - began_s)


async def _probe(check: CheckContext, advance: Advance) -> None:
    advance(0.0, "asking the servers what they are")
    await _look(check)
    if not check.active:
        return
    await _tokenizers(check)
    if not check.active:
        return
    check.choose_prompt()
    advance(0.05, "comparing answers")
    await compare_answers(check)
    await check.run_on_each("prefix cache", lambda server: probe_prefix_cache(check, server))
    for n, server in enumerate(check.active):
        advance(0.1 + 0.1 * n / len(check.servers), f"timing {server.id}")
        check.add(await check.run_probe("speed", (server.id,), probe_speed(check, server)))
    samples: dict[str, PinnedSample] = {}
    await check.run_on_each(PROBE_HANDLE, lambda server: pin_sample(check, samples, server), fatal=True)
    seen: dict[tuple[str, str], PairResult] = {}
    if len(check.active) > 1:
        seen = await probe_pairs(check, lambda share: advance(0.2 + 0.5 * share, "moving KV"))
        check.add(judge_pairs(check, seen))
        check.add(await judge_channels(check, seen))
        advance(0.7, "moving a stream")
        await probe_exports(check, seen)
    elif len(check.servers) == 1:
        check.add([Finding("KV pull", (), CheckVerdict.YELLOW, "one server: there is nobody to hand KV to")])
    advance(0.75, "pretending that a peer is dead")
    await watch_samples(check, samples)
    await check.run_on_each(PROBE_POLICY, lambda server: probe_policy(check, samples, server))
    await _leases(check, samples, seen, advance)
    check.add(
        Finding("KV pull", (name,), CheckVerdict.SKIPPED, f"not probed: {why}")
        for name, why in check.excluded.items()
    )


async def _look(check: CheckContext) -> None:
    """Learn the facts of all servers; those that differ from most are excluded."""

    async def ask(server: ProbedServer) -> list[Finding]:
        told = check.described[server.id] = await describe(server)
        server.model = told.facts.model
        busy = told.facts.metrics.requests or 0
        if busy:
            observed = f"answers, and has {busy} requests of somebody else"
            change = "check an idle fleet: times, counts and blocks below include theirs"
            return [Finding("reachable", (server.id,), CheckVerdict.YELLOW, observed, change)]
        return [Finding("reachable", (server.id,), CheckVerdict.GREEN, "answers")]

    await check.run_on_each("reachable", ask, fatal=True)
    described = {name: check.described[name] for name in check.servers if name in check.described}
    check.described = described
    if not described:
        return
    for found in compare_descriptions(described):
        check.add([found])
        if found.verdict is CheckVerdict.RED and found.probe in ("model", "block size"):
            check.exclude(found.where[0], f"its {found.probe} differs")
    check.add(compare_roles(described, check.roles))
    check.add(judge_clocks(described))


async def _tokenizers(check: CheckContext) -> None:
    """Compare tokenizers, and keep the ids that probes may use."""
    told: dict[str, list[list[int]]] = {}

    async def ask(server: ProbedServer) -> list[Finding]:
        told[server.id] = [await server.tokenize(text) for text in SAMPLE_TEXTS]
        return []

    await check.run_on_each("tokenizer", ask, fatal=True)
    if not told:
        return
    in_order: dict[str, list[list[int]]] = {each.id: told[each.id] for each in check.active}
    found = compared(
        "tokenizer",
        in_order,
        lambda texts: f"{sum(map(len, texts))} ids for {len(texts)} sample texts",
        "start it with the others' --tokenizer: tokens of one server are another one's prompt",
    )
    check.add(found)
    for each in found:
        if each.verdict is CheckVerdict.RED:
            check.exclude(each.where[0], "its tokenizer differs")
    check.vocabulary = sorted(
        {token for each in check.active for text in in_order[each.id] for token in text}
    )


async def _leases(
    check: CheckContext,
    samples: dict[str, PinnedSample],
    seen: dict[tuple[str, str], PairResult],
    advance: Advance,
) -> None:
    """Judge leases by what was seen, or, thoroughly, by waiting for their ends."""
    if not check.settings.thorough:
        await watch_samples(check, samples)
        for server in check.active:
            if server.id in samples:
                check.add(judge_sample(check, samples[server.id], server.id))
            pulls = [each.pull for (_, taker), each in seen.items() if taker == server.id and each.pull]
            pull = next((each for each in pulls if each.params), None)
            check.add(judge_read_back(server, pull) if pull else [])
        return
    advance(0.8, "waiting for leases to end")
    await check.run_on_each(PROBE_LEASE, lambda server: measure_lease(check, PROBE_LEASE, samples, server))
    decoded: dict[str, PinnedSample] = {}
    for server in check.active:
        owners = [owner for (owner, taker), each in seen.items() if taker == server.id and each.works]
        if owners and owners[0] not in check.excluded:
            await pin_decoded(check, decoded, check.servers[owners[0]], server)
    advance(0.9, "waiting for leases to end")
    await check.run_on_each(
        PROBE_READ_BACK, lambda server: measure_lease(check, PROBE_READ_BACK, decoded, server)
    )


async def _left_behind(check: CheckContext) -> Sequence[Finding]:
    """Compare the blocks in use with those before the check."""
    return await asyncio.gather(
        *(_left(check, server) for server in check.active if server.id in check.described)
    )


async def _left(check: CheckContext, server: ProbedServer) -> Finding:
    before = check.facts(server.id).metrics.kv_blocks_in_use
    try:
        if before is None:
            return Finding(
                "left behind", (server.id,), CheckVerdict.YELLOW, "the server does not show its blocks"
            )
        limit = before + SPARE_BLOCKS
        after = (
            await server.metrics_once(lambda now: (now.kv_blocks_in_use or 0.0) <= limit, within_s=CLEAN_S)
        ).kv_blocks_in_use
    except EngineError as error:
        return Finding("left behind", (server.id,), CheckVerdict.RED, error.message, "see the server's log")
    if after is not None and after <= limit:
        return Finding("left behind", (server.id,), CheckVerdict.GREEN, "no block is pinned")
    more = f"{(after or 0.0) - before:.0f} blocks more in use than before"
    if check.pins.held_by(server.id):
        return Finding(
            "left behind",
            (server.id,),
            CheckVerdict.YELLOW,
            f"{more}: nobody can tell it to let go",
            "wait for its lease to end",
        )
    return Finding(
        "left behind",
        (server.id,),
        CheckVerdict.YELLOW,
        more,
        "somebody else uses it, or it leaks: see its log",
    )

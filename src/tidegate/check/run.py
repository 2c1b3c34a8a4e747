"""The check itself: which probes run, in which order, and what is left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import aiohttp

from tidegate.check.board import Board, CheckSettings
from tidegate.check.channels import judge_channels
from tidegate.check.export import probe_exports
from tidegate.check.facts import (
    SAMPLE_TEXTS,
    Facts,
    compare_facts,
    compare_roles,
    compared,
    judge_clocks,
    look,
    tokens_of,
)
from tidegate.check.leases import (
    PROBE_HANDLE,
    PROBE_LEASE,
    PROBE_READ_BACK,
    Canary,
    judge_canary,
    judge_read_back,
    measure_lease,
    pin_canary,
    pin_decoded,
    watch_canaries,
)
from tidegate.check.local import compare_answers, probe_prefix_cache, probe_speed
from tidegate.check.pairs import PairSeen, judge_pairs, probe_pairs
from tidegate.check.pins import Pins
from tidegate.check.policy import PROBE as PROBE_POLICY
from tidegate.check.policy import probe_policy
from tidegate.check.server import Deadlines, Server
from tidegate.check.verdict import CheckReport, Finding, Verdict
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
        pins = Pins()
        servers = {
            f"i{n}": Server(f"i{n}", url, session, deadlines or Deadlines(), settings.api_key, pins.add)
            for n, (url, _) in enumerate(settings.servers)
        }
        roles = {f"i{n}": role for n, (_, role) in enumerate(settings.servers) if role is not None}
        board = Board(settings, servers, pins, roles)
        try:
            await _probe(board, advance)
        finally:
            await pins.release_all(servers)
        advance(1.0, "looking at what is left")
        board.add(await _left_behind(board))
    described = {
        name: {"url": server.url, **(board.facts[name].to_json() if name in board.facts else {})}
        for name, server in servers.items()
    }
    return CheckReport(described, board.findings, time.monotonic() - began_s)


async def _probe(board: Board, advance: Advance) -> None:
    advance(0.0, "asking the servers what they are")
    await _look(board)
    if not board.active:
        return
    await _tokenizers(board)
    if not board.active:
        return
    board.choose_prompt()
    advance(0.05, "comparing answers")
    await compare_answers(board)
    await board.each("prefix cache", lambda server: probe_prefix_cache(board, server))
    for n, server in enumerate(board.active):
        advance(0.1 + 0.1 * n / len(board.servers), f"timing {server.id}")
        board.add(await board.one("speed", (server.id,), probe_speed(board, server)))
    canaries: dict[str, Canary] = {}
    await board.each(PROBE_HANDLE, lambda server: pin_canary(board, canaries, server), fatal=True)
    seen: dict[tuple[str, str], PairSeen] = {}
    if len(board.active) > 1:
        seen = await probe_pairs(board, lambda share: advance(0.2 + 0.5 * share, "moving KV"))
        board.add(judge_pairs(board, seen))
        board.add(await judge_channels(board, seen))
        advance(0.7, "moving a stream")
        await probe_exports(board, seen)
    elif len(board.servers) == 1:
        board.add([Finding("KV pull", (), Verdict.YELLOW, "one server: there is nobody to hand KV to")])
    advance(0.75, "pretending that a peer is dead")
    await watch_canaries(board, canaries)
    await board.each(PROBE_POLICY, lambda server: probe_policy(board, canaries, server))
    await _leases(board, canaries, seen, advance)
    board.add(
        Finding("KV pull", (name,), Verdict.SKIPPED, f"not probed: {why}")
        for name, why in board.aside.items()
    )


async def _look(board: Board) -> None:
    """Learn the facts of all servers; the odd ones out are set aside."""

    async def ask(server: Server) -> list[Finding]:
        facts = await look(server)
        board.facts[server.id] = facts
        server.model = facts.model
        busy = (facts.counters.requests or 0.0) if facts.counters else 0.0
        if busy:
            observed = f"answers, and has {busy:.0f} requests of somebody else"
            change = "check an idle fleet: times, counts and blocks below include theirs"
            return [Finding("reachable", (server.id,), Verdict.YELLOW, observed, change)]
        return [Finding("reachable", (server.id,), Verdict.GREEN, "answers")]

    await board.each("reachable", ask, fatal=True)
    board.facts = {name: board.facts[name] for name in board.servers if name in board.facts}
    if not board.facts:
        return
    for found in compare_facts(board.facts):
        board.add([found])
        if found.verdict is Verdict.RED and found.probe in ("model", "block size"):
            board.set_aside(found.where[0], f"its {found.probe} differs")
    board.add(compare_roles(board.facts, board.roles))
    board.add(judge_clocks(board.facts))


async def _tokenizers(board: Board) -> None:
    """Compare tokenizers, and keep the ids that probes may use."""
    told: dict[str, list[list[int]]] = {}

    async def ask(server: Server) -> list[Finding]:
        told[server.id] = [await tokens_of(server, text) for text in SAMPLE_TEXTS]
        return []

    await board.each("tokenizer", ask, fatal=True)
    if not told:
        return
    in_order: dict[str, list[list[int]]] = {each.id: told[each.id] for each in board.active}
    found = compared(
        "tokenizer",
        in_order,
        lambda texts: f"{sum(map(len, texts))} ids for {len(texts)} sample texts",
        "start it with the others' --tokenizer: tokens of one server are another one's prompt",
    )
    board.add(found)
    for each in found:
        if each.verdict is Verdict.RED:
            board.set_aside(each.where[0], "its tokenizer differs")
    board.vocabulary = sorted(
        {token for each in board.active for text in in_order[each.id] for token in text}
    )


async def _leases(
    board: Board, canaries: dict[str, Canary], seen: dict[tuple[str, str], PairSeen], advance: Advance
) -> None:
    """Judge leases by what was seen, or, thoroughly, by waiting for their ends."""
    if not board.settings.thorough:
        await watch_canaries(board, canaries)
        for server in board.active:
            if server.id in canaries:
                board.add(judge_canary(board, canaries[server.id], server.id))
            pulls = [each.pull for (_, taker), each in seen.items() if taker == server.id and each.pull]
            pull = next((each for each in pulls if each.params), None)
            board.add(judge_read_back(server, pull) if pull else [])
        return
    advance(0.8, "waiting for leases to end")
    await board.each(PROBE_LEASE, lambda server: measure_lease(board, PROBE_LEASE, canaries, server))
    decoded: dict[str, Canary] = {}
    for server in board.active:
        owners = [owner for (owner, taker), each in seen.items() if taker == server.id and each.works]
        if owners and owners[0] not in board.aside:
            await pin_decoded(board, decoded, board.servers[owners[0]], server)
    advance(0.9, "waiting for leases to end")
    await board.each(PROBE_READ_BACK, lambda server: measure_lease(board, PROBE_READ_BACK, decoded, server))


async def _left_behind(board: Board) -> Sequence[Finding]:
    """Compare the blocks in use with those before the check."""
    return await asyncio.gather(
        *(_left(board, server, board.facts[server.id]) for server in board.active if server.id in board.facts)
    )


async def _left(board: Board, server: Server, facts: Facts) -> Finding:
    before = facts.counters.blocks_in_use if facts.counters else None
    try:
        if before is None:
            return Finding("left behind", (server.id,), Verdict.YELLOW, "the server does not show its blocks")
        limit = before + SPARE_BLOCKS
        after = (
            await server.counters_once(lambda now: (now.blocks_in_use or 0.0) <= limit, within_s=CLEAN_S)
        ).blocks_in_use
    except EngineError as error:
        return Finding("left behind", (server.id,), Verdict.RED, error.message, "see the server's log")
    if after is not None and after <= limit:
        return Finding("left behind", (server.id,), Verdict.GREEN, "no block is pinned")
    more = f"{(after or 0.0) - before:.0f} blocks more in use than before"
    if board.pins.held_by(server.id):
        return Finding(
            "left behind",
            (server.id,),
            Verdict.YELLOW,
            f"{more}: nobody can tell it to let go",
            "wait for its lease to end",
        )
    return Finding(
        "left behind", (server.id,), Verdict.YELLOW, more, "somebody else uses it, or it leaks: see its log"
    )

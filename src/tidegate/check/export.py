"""Export on demand: a running stream is stopped, its KV pinned after the fact, and continued elsewhere."""

from __future__ import annotations

from tidegate.check.board import Board
from tidegate.check.counters import COMPUTED, LOCAL_HIT
from tidegate.check.pairs import PairSeen
from tidegate.check.server import Server
from tidegate.check.transfer import TAKE_TOKENS, produce, take
from tidegate.check.verdict import Finding, Verdict

PROBE = "export on demand"
STREAMED_TOKENS = 11
LONGEST_STREAM = 512


async def probe_exports(board: Board, seen: dict[tuple[str, str], PairSeen]) -> None:
    """Move one stream away from every server that others pull from, towards one that can take it."""
    for server in board.active:
        if not board.gives(server.id):
            continue
        takers = [taker for (owner, taker), each in seen.items() if owner == server.id and each.works]
        takers = [taker for taker in takers if taker not in board.aside]
        if takers:
            probe = _probe(board, server, board.servers[takers[0]])
            board.add(await board.one(PROBE, (server.id,), probe))
            await board.pins.release(board.servers, (server.id, takers[0]))
        else:
            observed = "not probed: no server can pull from it"
            board.add([Finding(PROBE, (server.id,), Verdict.SKIPPED, observed)])


async def _probe(board: Board, source: Server, target: Server) -> list[Finding]:
    salt = board.salt(source.id, "export")
    expected = board.expected(source.id, target.id)
    length = min(LONGEST_STREAM, board.facts[source.id].max_model_len - len(board.prompt))
    stream = await source.stream(board.prompt, length, stop_after=STREAMED_TOKENS, salt=salt)
    ids = stream.token_ids[:STREAMED_TOKENS]
    prompt = board.prompt + ids
    before = await source.counters()
    made = await produce(board, source, prompt, 1, salt)
    if made.handle is None:
        observed, change = "no handle for what it had streamed", "see its log"
        return [Finding(PROBE, (source.id,), Verdict.RED, observed, change)]
    after = await source.counters_once(
        lambda now: (
            now.source(LOCAL_HIT) + now.source(COMPUTED) - before.source(LOCAL_HIT) - before.source(COMPUTED)
            >= len(prompt)
        )
    )
    rest = expected[len(ids) : len(ids) + TAKE_TOKENS]
    taken = await take(board, target, made.handle, prompt, rest, pin=False, salt=salt)
    verdict, observed, change = taken.judge(len(prompt))
    hit = int(after.source(LOCAL_HIT) - before.source(LOCAL_HIT))
    if verdict is not Verdict.GREEN:
        return [Finding(PROBE, (source.id,), verdict, observed, change)]
    observed = f"{hit} of {len(prompt)} tokens from its cache; {target.id} went on: {observed}"
    if after.by_source is not None and hit < len(prompt) - 2 * board.block_tokens:
        verdict = Verdict.YELLOW
        change = "turn on --enable-prefix-caching: the source computes the whole prompt again for each move"
    return [Finding(PROBE, (source.id,), verdict, observed, change)]

"""Export on demand: a running stream is stopped, its KV pinned after the fact, and continued elsewhere."""

from __future__ import annotations

from tidegate.check.context import CheckContext
from tidegate.check.pairs import PairResult
from tidegate.check.server import ProbedServer
from tidegate.check.transfer import TAKE_TOKENS, pin_prefill, pull_kv
from tidegate.check.verdict import CheckVerdict, Finding
from tidegate.engines.vllm.metrics import CACHED, COMPUTED

PROBE = "export on demand"
STREAMED_TOKENS = 11
LONGEST_STREAM = 512


async def probe_exports(check: CheckContext, seen: dict[tuple[str, str], PairResult]) -> None:
    """Move one stream away from every server that others pull from, towards one that can take it."""
    for server in check.active:
        if not check.produces_kv(server.id):
            continue
        takers = [taker for (owner, taker), each in seen.items() if owner == server.id and each.works]
        takers = [taker for taker in takers if taker not in check.excluded]
        if takers:
            probe = _probe(check, server, check.servers[takers[0]])
            check.add(await check.run_probe(PROBE, (server.id,), probe))
            await check.pins.release(check.servers, (server.id, takers[0]))
        else:
            observed = "not probed: no server can pull from it"
            check.add([Finding(PROBE, (server.id,), CheckVerdict.SKIPPED, observed)])


async def _probe(check: CheckContext, source: ProbedServer, target: ProbedServer) -> list[Finding]:
    salt = check.salt(source.id, "export")
    expected = check.expected(source.id, target.id)
    length = min(LONGEST_STREAM, check.facts(source.id).max_model_len - len(check.prompt))
    stream = await source.stream(check.prompt, length, stop_after=STREAMED_TOKENS, salt=salt)
    ids = stream.token_ids[:STREAMED_TOKENS]
    prompt = check.prompt + ids
    before = await source.metrics()
    made = await pin_prefill(check, source, prompt, 1, salt)
    if made.handle is None:
        observed, change = "no handle for what it had streamed", "see its log"
        return [Finding(PROBE, (source.id,), CheckVerdict.RED, observed, change)]
    after = await source.metrics_once(
        lambda now: (
            now.source(CACHED) + now.source(COMPUTED) - before.source(CACHED) - before.source(COMPUTED)
            >= len(prompt)
        )
    )
    rest = expected[len(ids) : len(ids) + TAKE_TOKENS]
    taken = await pull_kv(check, target, made.handle, prompt, rest, pin=False, salt=salt)
    verdict, observed, change = taken.judge(len(prompt))
    hit = after.source(CACHED) - before.source(CACHED)
    if verdict is not CheckVerdict.GREEN:
        return [Finding(PROBE, (source.id,), verdict, observed, change)]
    observed = f"{hit} of {len(prompt)} tokens from its cache; {target.id} went on: {observed}"
    if after.prompt_tokens_by_source is not None and hit < len(prompt) - 2 * check.block_tokens:
        verdict = CheckVerdict.YELLOW
        change = "turn on --enable-prefix-caching: the source computes the whole prompt again for each move"
    return [Finding(PROBE, (source.id,), verdict, observed, change)]

"""Probes of one server by itself: its answers, its prefix cache, its speed."""

from __future__ import annotations

import asyncio

from tidegate.check.context import REFERENCE_TOKENS, CheckContext
from tidegate.check.server import ProbedServer
from tidegate.check.verdict import CheckVerdict, Finding, common_value, shared_start
from tidegate.core.errors import EngineError
from tidegate.core.slo import Slo
from tidegate.engines.vllm.metrics import CACHED

SAME_MODEL_SHARE = 0.5
"""Servers whose greedy answers part later than this share of them are taken for the same model (ours): other
weights part at once, other kernels at a near tie."""
PROFILE_PROMPT_TOKENS = 1024
PROFILE_STEPS = 32


async def compare_answers(check: CheckContext) -> None:
    """Have every server answer one prompt by itself, and keep the answers as references.

    A server that answers otherwise than most serves other weights, and is excluded; one that parts late
    computes differently, which no transfer of KV can be held against.
    """
    servers = check.active
    told = await asyncio.gather(*(_answer(check, each) for each in servers))
    for server, answer in zip(servers, told, strict=True):
        if isinstance(answer, EngineError):
            check.add(
                [Finding("same answers", (server.id,), CheckVerdict.RED, answer.message, "see its log")]
            )
            check.exclude(server.id, "it does not answer a plain request")
        else:
            check.answers[server.id] = answer
    if not check.answers:
        return
    usual = common_value(check.answers)
    odd = {name: answer for name, answer in check.answers.items() if answer != usual}
    for name, answer in odd.items():
        same = len(shared_start([answer, usual]))
        if same < SAME_MODEL_SHARE * REFERENCE_TOKENS:
            observed = f"another model: its greedy answer differs from token {same} on"
            check.exclude(name, "it serves another model")
            change = "serve the same weights everywhere: compare --model and --revision"
            check.add([Finding("same answers", (name,), CheckVerdict.RED, observed, change)])
        else:
            observed = f"its greedy answer parts from the others' after {same} of {REFERENCE_TOKENS} tokens"
            change = "expect moved requests to go on in other words: kernels, GPU or dtype differ"
            check.add([Finding("same answers", (name,), CheckVerdict.YELLOW, observed, change)])
    if not odd:
        observed = f"{REFERENCE_TOKENS} tokens after a prompt of {len(check.prompt)}, greedily"
        check.add([Finding("same answers", (), CheckVerdict.GREEN, observed)])


async def _answer(check: CheckContext, server: ProbedServer) -> list[int] | EngineError:
    try:
        reply = await server.complete(check.prompt, REFERENCE_TOKENS, salt=check.salt("reference"))
        return reply.new_tokens()
    except EngineError as error:
        return error


async def probe_prefix_cache(check: CheckContext, server: ProbedServer) -> list[Finding]:
    """Send one prompt twice: the second time its whole blocks must come from the prefix cache."""
    prompt = check.fresh_prompt(len(check.prompt))
    whole = (len(prompt) - 1) // check.block_tokens * check.block_tokens
    (await server.complete(prompt, 1)).new_tokens()
    before = await server.metrics()
    (await server.complete(prompt, 1)).new_tokens()
    if before.prompt_tokens_by_source is None:
        observed = "the server does not show where KV came from"
        return [Finding("prefix cache", (server.id,), CheckVerdict.YELLOW, observed)]
    after = await server.metrics_once(lambda now: now.source(CACHED) - before.source(CACHED) >= whole)
    hit = after.source(CACHED) - before.source(CACHED)
    if hit >= whole:
        observed = f"{hit} of {len(prompt)} tokens found again"
        return [Finding("prefix cache", (server.id,), CheckVerdict.GREEN, observed)]
    off = " (enable_prefix_caching is off)" if before.prefix_caching is False else ""
    return [
        Finding(
            "prefix cache",
            (server.id,),
            CheckVerdict.RED,
            f"prefix cache off: {hit} of {len(prompt)} tokens found again{off}",
            "start it with --enable-prefix-caching: exports and later rounds compute everything again",
        )
    ]


async def probe_speed(check: CheckContext, server: ProbedServer) -> list[Finding]:
    """Time a prefill and some decode steps on the server while nothing else runs there, and hold them
    against the SLO if there is one: what an idle server misses, a busy one misses too."""
    facts = check.facts(server.id)
    size = min(PROFILE_PROMPT_TOKENS, facts.max_model_len // 2)
    ttft_s = min([(await server.stream(check.fresh_prompt(size), 2, stop_after=1)).first_s for _ in range(2)])
    steps = await server.stream(check.fresh_prompt(16), PROFILE_STEPS, stop_after=PROFILE_STEPS)
    tpot_s = (steps.last_s - steps.first_s) / (PROFILE_STEPS - 1)
    observed = f"{1e3 * ttft_s:.0f} ms to the first token after {size:,}, then {1e3 * tpot_s:.1f} ms each"
    slo = check.settings.slo
    if slo is None:
        return [
            Finding("speed", (server.id,), CheckVerdict.GREEN, f"{observed} (no --slo to hold it against)")
        ]
    if slo.attained(ttft_s, tpot_s):
        return [Finding("SLO", (server.id,), CheckVerdict.GREEN, observed)]
    return [
        Finding(
            "SLO",
            (server.id,),
            CheckVerdict.RED,
            f"{slo} missed while idle: {observed}",
            _relief(slo, ttft_s),
        )
    ]


def _relief(slo: Slo, ttft_s: float) -> str:
    if ttft_s > slo.ttft_s:
        return "no scheduler can meet it: take a faster GPU, more tensor parallelism, or a longer TTFT target"
    return "no scheduler can meet it: take a faster GPU, a smaller model, or a longer TPOT target"

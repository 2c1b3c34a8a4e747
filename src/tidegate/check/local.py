"""Probes of one server by itself: its answers, its prefix cache, its speed."""

from __future__ import annotations

import asyncio

from tidegate.check.board import REFERENCE_TOKENS, Board
from tidegate.check.counters import LOCAL_HIT
from tidegate.check.server import Server
from tidegate.check.verdict import Finding, Verdict, common_value, shared_start
from tidegate.core.errors import EngineError
from tidegate.core.slo import Slo

SAME_MODEL_SHARE = 0.5
"""Servers whose greedy answers part later than this share of them are taken for the same model (ours): other
weights part at once, other kernels at a near tie."""
PROFILE_PROMPT_TOKENS = 1024
PROFILE_STEPS = 32


async def compare_answers(board: Board) -> None:
    """Have every server answer one prompt by itself, and keep the answers as references.

    A server that answers otherwise than most serves other weights, and is set aside; one that parts late
    computes differently, which no transfer of KV can be held against.
    """
    servers = board.active
    told = await asyncio.gather(*(_answer(board, each) for each in servers))
    for server, answer in zip(servers, told, strict=True):
        if isinstance(answer, EngineError):
            board.add([Finding("same answers", (server.id,), Verdict.RED, answer.message, "see its log")])
            board.set_aside(server.id, "it does not answer a plain request")
        else:
            board.answers[server.id] = answer
    if not board.answers:
        return
    usual = common_value(board.answers)
    odd = {name: answer for name, answer in board.answers.items() if answer != usual}
    for name, answer in odd.items():
        same = len(shared_start([answer, usual]))
        if same < SAME_MODEL_SHARE * REFERENCE_TOKENS:
            observed = f"another model: its greedy answer differs from token {same} on"
            board.set_aside(name, "it serves another model")
            change = "serve the same weights everywhere: compare --model and --revision"
            board.add([Finding("same answers", (name,), Verdict.RED, observed, change)])
        else:
            observed = f"its greedy answer parts from the others' after {same} of {REFERENCE_TOKENS} tokens"
            change = "expect moved requests to go on in other words: kernels, GPU or dtype differ"
            board.add([Finding("same answers", (name,), Verdict.YELLOW, observed, change)])
    if not odd:
        observed = f"{REFERENCE_TOKENS} tokens after a prompt of {len(board.prompt)}, greedily"
        board.add([Finding("same answers", (), Verdict.GREEN, observed)])


async def _answer(board: Board, server: Server) -> list[int] | EngineError:
    try:
        leg = await server.complete(board.prompt, REFERENCE_TOKENS, salt=board.salt("reference"))
    except EngineError as error:
        return error
    return leg.token_ids


async def probe_prefix_cache(board: Board, server: Server) -> list[Finding]:
    """Send one prompt twice: the second time its whole blocks must come from the prefix cache."""
    prompt = board.fresh_prompt(len(board.prompt))
    whole = (len(prompt) - 1) // board.block_tokens * board.block_tokens
    await server.complete(prompt, 1)
    before = await server.counters()
    await server.complete(prompt, 1)
    if before.by_source is None:
        observed = "the server does not show where KV came from"
        return [Finding("prefix cache", (server.id,), Verdict.YELLOW, observed)]
    after = await server.counters_once(lambda now: now.source(LOCAL_HIT) - before.source(LOCAL_HIT) >= whole)
    hit = int(after.source(LOCAL_HIT) - before.source(LOCAL_HIT))
    if hit >= whole:
        observed = f"{hit} of {len(prompt)} tokens found again"
        return [Finding("prefix cache", (server.id,), Verdict.GREEN, observed)]
    off = " (enable_prefix_caching is off)" if before.prefix_caching is False else ""
    return [
        Finding(
            "prefix cache",
            (server.id,),
            Verdict.RED,
            f"prefix cache off: {hit} of {len(prompt)} tokens found again{off}",
            "start it with --enable-prefix-caching: exports and later rounds compute everything again",
        )
    ]


async def probe_speed(board: Board, server: Server) -> list[Finding]:
    """Time a prefill and some decode steps on the server while nothing else runs there, and hold them
    against the SLO if there is one: what an idle server misses, a busy one misses too."""
    facts = board.facts[server.id]
    size = min(PROFILE_PROMPT_TOKENS, facts.max_model_len // 2)
    ttft_s = min([(await server.stream(board.fresh_prompt(size), 2, stop_after=1)).first_s for _ in range(2)])
    steps = await server.stream(board.fresh_prompt(16), PROFILE_STEPS, stop_after=PROFILE_STEPS)
    tpot_s = (steps.seconds - steps.first_s) / (PROFILE_STEPS - 1)
    observed = f"{1e3 * ttft_s:.0f} ms to the first token after {size:,}, then {1e3 * tpot_s:.1f} ms each"
    slo = board.settings.slo
    if slo is None:
        return [Finding("speed", (server.id,), Verdict.GREEN, f"{observed} (no --slo to hold it against)")]
    if slo.attained(ttft_s, tpot_s):
        return [Finding("SLO", (server.id,), Verdict.GREEN, observed)]
    return [
        Finding(
            "SLO", (server.id,), Verdict.RED, f"{slo} missed while idle: {observed}", _relief(slo, ttft_s)
        )
    ]


def _relief(slo: Slo, ttft_s: float) -> str:
    if ttft_s > slo.ttft_s:
        return "no scheduler can meet it: take a faster GPU, more tensor parallelism, or a longer TTFT target"
    return "no scheduler can meet it: take a faster GPU, a smaller model, or a longer TPOT target"

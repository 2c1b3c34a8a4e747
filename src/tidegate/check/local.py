"""Probes of servers by themselves: what they say of themselves, their answers, prefix cache and speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tidegate.check.context import REFERENCE_TOKENS, CheckContext
from tidegate.check.server import ProbedServer, SelfDescription
from tidegate.check.verdict import GREEN, RED, YELLOW, Finding, common_value, shared_start
from tidegate.core.instance import Role
from tidegate.engines.vllm.metrics import CACHED

TRIED_VERSIONS = ("0.32.0",)
"""Versions of vLLM that the adapter was run against."""
LARGEST_SKEW_S = 2.0
SAMPLE_TEXTS = (
    "The quick brown fox jumps over the lazy dog 0123456789 times.",
    "  Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich – наука, 科学, 🙂\n\tend",
    "def f(x):\n    return {'a': [x, -1.5e-3], \"b\": None}  # comment <|im_start|> </s>",
)
SAME_MODEL_SHARE = 0.5
"""Servers whose greedy answers part later than this share of them are taken for the same model (ours): other
weights part at once, other kernels at a near tie."""
FIXED_CHUNKS = "what --max-num-batched-tokens said at the launch; vLLM takes none per step"
PROFILE_PROMPT_TOKENS = 1024
PROFILE_STEPS = 32


async def compare_descriptions(check: CheckContext) -> None:
    """Learn the facts of all servers, and exclude those that serve another model or block size than most."""

    async def ask(server: ProbedServer) -> Finding:
        described = await server.describe()
        check.described[server.id] = described
        server.model = described.facts.model
        busy = described.facts.metrics.requests or 0
        if busy:
            observed = f"answers, and has {busy} requests of somebody else"
            change = "check an idle fleet: times, counts and blocks below include theirs"
            return Finding("reachable", (server.id,), YELLOW, observed, change)
        return Finding("reachable", (server.id,), GREEN, "answers")

    await check.run_on_each("reachable", ask, fatal="it is not reachable")
    described = {name: check.described[name] for name in check.servers if name in check.described}
    if not described:
        return
    for found in [*_compare_facts(described), *_compare_block_sizes(described)]:
        check.add(found)
        if found.verdict is RED and found.probe in ("model", "block size"):
            check.excluded.setdefault(found.where[0], f"its {found.probe} differs")
    check.add(*(_judge_role(name, each, check.roles.get(name)) for name, each in described.items()))
    check.add(*(_judge_clock(name, each.clock_skew_s) for name, each in described.items()))
    check.add(Finding("chunk budget", (), GREEN, FIXED_CHUNKS))


def _compared(probe: str, values: Mapping[str, Any], say: Callable[[Any], str], change: str) -> list[Finding]:
    """Return one finding when all values are equal, else one for each server that differs from most."""
    usual = common_value(values)
    differing = {name: value for name, value in values.items() if value != usual}
    if not differing:
        return [Finding(probe, tuple(values) if len(values) == 1 else (), GREEN, say(usual))]
    return [
        Finding(probe, (name,), RED, f"{say(value)}; the others: {say(usual)}", change)
        for name, value in differing.items()
    ]


def _compare_facts(described: Mapping[str, SelfDescription]) -> list[Finding]:
    """Compare models, context lengths and versions."""
    versions = {name: each.version for name, each in described.items()}
    found = [
        *_compared(
            "model",
            {name: each.facts.models for name, each in described.items()},
            lambda names: f"serves {', '.join(names)}",
            "start it with the same model and --served-model-name as the others",
        ),
        *_compared(
            "context length",
            {name: each.facts.max_model_len for name, each in described.items()},
            lambda length: f"{length:,} tokens",
            "start all with the same --max-model-len: a request has to fit wherever it goes",
        ),
        *_compared(
            "version",
            versions,
            lambda version: f"vLLM {version}",
            "run the same vLLM everywhere: servers of different versions refuse each other's KV",
        ),
    ]
    if len(set(versions.values())) == 1 and not set(versions.values()) <= set(TRIED_VERSIONS):
        change = f"tidegate was run against {', '.join(TRIED_VERSIONS)}: trust what the other probes found"
        found[-1] = Finding("version", (), YELLOW, found[-1].observed, change)
    return found


def _compare_block_sizes(described: Mapping[str, SelfDescription]) -> list[Finding]:
    sizes = {name: each.facts.metrics.block_tokens for name, each in described.items()}
    observed = "shows no vllm:cache_config_info in /metrics"
    change = "start it without --disable-log-stats: tidegate needs its metrics"
    found = [
        Finding("block size", (name,), RED, observed, change) for name, size in sizes.items() if size is None
    ]
    known = {name: size for name, size in sizes.items() if size is not None}
    if known:
        change = "start all with the same --block-size"
        found += _compared("block size", known, lambda size: f"{size} tokens", change)
    return found


def _judge_role(name: str, described: SelfDescription, kept: Role | None) -> Finding | None:
    """Find out whether a server was started for one role; ``kept`` is the role that it is said to keep. A
    ``kv_producer`` does not count loads of its own; a ``kv_consumer`` looks and serves like ``kv_both``."""
    metrics = described.facts.metrics
    if metrics.nixl_bytes is None:
        return None
    if kept is not None:
        return Finding("role", (name,), GREEN, f"keeps its role: {kept.label}")
    if metrics.counts_kv_fetches:
        return Finding("role", (name,), GREEN, "loads KV as well as giving it")
    observed = "fixed role: started as kv_producer (it does not count loads of its own)"
    change = "plan around it as prefill=URL, or start it with kv_role kv_both to let it flip"
    return Finding("role", (name,), YELLOW, observed, change)


def _judge_clock(name: str, skew_s: float | None) -> Finding:
    if skew_s is None:
        return Finding("clock", (name,), YELLOW, "answers without a Date header")
    if abs(skew_s) <= LARGEST_SKEW_S:
        return Finding("clock", (name,), GREEN, "within a second or two of ours")
    observed = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} ours"
    change = "run NTP: logs of the server and the gateway do not line up (leases are not affected)"
    return Finding("clock", (name,), YELLOW, observed, change)


async def compare_tokenizers(check: CheckContext) -> None:
    """Exclude servers whose tokenizer differs from most, and keep the ids that probes may use."""
    ids: dict[str, list[list[int]]] = {}

    async def ask(server: ProbedServer) -> None:
        ids[server.id] = [await server.tokenize(text) for text in SAMPLE_TEXTS]

    await check.run_on_each("tokenizer", ask, fatal="its tokenizer cannot be compared")
    if not ids:
        return
    found = _compared(
        "tokenizer",
        {each.id: ids[each.id] for each in check.active},
        lambda texts: f"{sum(map(len, texts))} ids for {len(texts)} sample texts",
        "start it with the others' --tokenizer: tokens of one server are another one's prompt",
    )
    check.add(*found)
    for each in found:
        if each.verdict is RED:
            check.excluded.setdefault(each.where[0], "its tokenizer differs")
    check.vocabulary = sorted({token for each in check.active for text in ids[each.id] for token in text})


async def compare_answers(check: CheckContext) -> None:
    """Have every server answer one prompt by itself, and keep the answers as references. A server that parts
    early from most serves other weights, and is excluded; one that parts late has other kernels."""

    answers: dict[str, list[int]] = {}

    async def answer(server: ProbedServer) -> None:
        reply = await server.complete(check.prompt, REFERENCE_TOKENS, salt=check.salt("reference"))
        answers[server.id] = reply.new_tokens()

    await check.run_on_each("same answers", answer, fatal="it does not answer a plain request")
    check.answers = {name: answers[name] for name in check.servers if name in answers}
    if not answers:
        return
    usual = common_value(check.answers)
    odd = {name: tokens for name, tokens in check.answers.items() if tokens != usual}
    for name, tokens in odd.items():
        same = len(shared_start([tokens, usual]))
        if same < SAME_MODEL_SHARE * REFERENCE_TOKENS:
            check.excluded.setdefault(name, "it serves another model")
            observed = f"another model: its greedy answer differs from token {same} on"
            change = "serve the same weights everywhere: compare --model and --revision"
            check.add(Finding("same answers", (name,), RED, observed, change))
        else:
            observed = f"its greedy answer parts from the others' after {same} of {REFERENCE_TOKENS} tokens"
            change = "expect moved requests to go on in other words: kernels, GPU or dtype differ"
            check.add(Finding("same answers", (name,), YELLOW, observed, change))
    if not odd:
        observed = f"{REFERENCE_TOKENS} tokens after a prompt of {len(check.prompt)}, greedily"
        check.add(Finding("same answers", (), GREEN, observed))


async def probe_prefix_cache(check: CheckContext, server: ProbedServer) -> Finding:
    """Send one prompt twice: the second time its whole blocks must come from the prefix cache."""
    prompt = check.fresh_prompt(len(check.prompt))
    whole = (len(prompt) - 1) // check.block_tokens * check.block_tokens
    (await server.complete(prompt, 1)).new_tokens()
    before = await server.metrics()
    (await server.complete(prompt, 1)).new_tokens()
    if before.prompt_tokens_by_source is None:
        observed = "the server does not show where KV came from"
        return Finding("prefix cache", (server.id,), YELLOW, observed)
    after = await server.metrics_once(lambda now: now.source(CACHED) - before.source(CACHED) >= whole)
    hit = after.source(CACHED) - before.source(CACHED)
    observed = f"{hit} of {len(prompt)} tokens found again"
    if hit >= whole:
        return Finding("prefix cache", (server.id,), GREEN, observed)
    off = " (enable_prefix_caching is off)" if before.prefix_caching is False else ""
    change = "start it with --enable-prefix-caching: exports and later rounds compute everything again"
    return Finding("prefix cache", (server.id,), RED, f"prefix cache off: {observed}{off}", change)


async def probe_speed(check: CheckContext, server: ProbedServer) -> Finding:
    """Time a prefill and some decode steps on the server while nothing else runs there, and hold them
    against the SLO if there is one: what an idle server misses, a busy one misses too."""
    facts = check.described[server.id].facts
    size = min(PROFILE_PROMPT_TOKENS, facts.max_model_len // 2)
    ttft_s = min([(await server.stream(check.fresh_prompt(size), 2, stop_after=1)).first_s for _ in range(2)])
    steps = await server.stream(check.fresh_prompt(16), PROFILE_STEPS, stop_after=PROFILE_STEPS)
    tpot_s = (steps.last_s - steps.first_s) / (PROFILE_STEPS - 1)
    observed = f"{1e3 * ttft_s:.0f} ms to the first token after {size:,}, then {1e3 * tpot_s:.1f} ms each"
    slo = check.settings.slo
    if slo is None:
        return Finding("speed", (server.id,), GREEN, f"{observed} (no --slo to hold it against)")
    if slo.attained(ttft_s, tpot_s):
        return Finding("SLO", (server.id,), GREEN, observed)
    slow_prefill = ttft_s > slo.ttft_s
    relief = (
        "more tensor parallelism, or a longer TTFT" if slow_prefill else "a smaller model, or a longer TPOT"
    )
    change = f"no scheduler can meet it: take a faster GPU, {relief} target"
    return Finding("SLO", (server.id,), RED, f"{slo} missed while idle: {observed}", change)

"""What it costs to move KV from one vLLM server to another, seen from outside and by the connector itself.

One server computes a prompt and pins its KV. Another answers the same prompt for one token from the pinned
KV, and then again from its own prefix cache: the difference is the transfer. Prompts hold one token more than
whole blocks, so that both answers compute one token. NixlConnector also times its reads and counts their
bytes. Its times leave out the waits around a read, and show less jitter: they bound those seen from outside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from statistics import median

from tidegate.core.errors import ConfigError, EngineFault
from tidegate.costs.fitting import TransferSample, fit_transfer
from tidegate.costs.forms import TransferCost
from tidegate.costs.saved_profile import LinkSample, MeasuredLink
from tidegate.engines.seam import Json, KvHandle
from tidegate.engines.vllm.client import Reply, ServerFacts, VllmClient
from tidegate.engines.vllm.connector import Nixl
from tidegate.engines.vllm.metrics import PULLED
from tidegate.fleet.member import LEASE_S
from tidegate.profiling.target import ProbeTarget

LENGTHS = (64, 256, 1024, 4096)
REPEATS = 5
KV_SHARE = 0.2
"""Share of a server's KV cache that one prompt may take: what is pinned goes only with its lease."""
ANSWER_S = 60.0
SHORTEST_S = 1e-5
"""What jitter may leave of a transfer that takes next to no time."""
BY_OUTSIDE = "from outside"
BY_BOTH = "from outside, no faster than NIXL's own times"
BY_ENGINE = "by the engine's own times"


class LinkEnd:
    """One server as a link's end. ``prompt`` returns prompts of so many tokens that no prefix cache knows."""

    def __init__(self, client: VllmClient, facts: ServerFacts, prompt: Callable[[int], list[int]]) -> None:
        self.client = client
        self.facts = facts
        self.prompt = prompt
        self.connector = Nixl(facts.block_tokens, LEASE_S)

    def handle(self, reply: Reply, prompt: list[int]) -> KvHandle | None:
        """Return the handle of what an answer pinned; None when it pinned nothing."""
        now = asyncio.get_running_loop().time()
        return self.connector.handle(reply.kv_params, "", self.client.url, len(prompt), now)

    async def answer(self, prompt: list[int], kv: Json | None = None) -> Reply:
        """Have the server answer a prompt for one token. Raises EngineFault when it refuses."""
        reply = await self.client.complete(prompt, 1, kv=kv)
        if reply.status != 200:
            raise EngineFault(reply.error, instance=self.client.instance)
        return reply


async def time_link(source: LinkEnd, target: LinkEnd, kv_bytes_per_token: int = 0) -> list[LinkSample]:
    """Time prompts of several lengths; none at all where no KV moves or its bytes are unknown.
    ``kv_bytes_per_token`` is for servers that do not count them. The first pull, with its handshake, is left
    out. Raises EngineFault when a server refuses."""
    samples = []
    for number, tokens in enumerate(link_lengths(source.facts, target.facts)):
        if not number and await _pull_once(source, target, tokens) is None:
            return []
        before = await target.client.metrics()
        pairs = [await _pull_once(source, target, tokens) for _ in range(REPEATS)]
        timed = [pair for pair in pairs if pair is not None]
        after = await target.client.metrics()
        read_bytes = (after.nixl_bytes or 0) - (before.nixl_bytes or 0)
        if not timed or not (read_bytes > 0 or after.source(PULLED) > before.source(PULLED)):
            return []
        seconds = median(pulled_s for pulled_s, _ in timed) - median(local_s for _, local_s in timed)
        n_bytes = round(read_bytes / len(timed)) or kv_bytes_per_token * tokens
        if not n_bytes:
            return []
        reads = (after.nixl_reads or 0) - (before.nixl_reads or 0)
        spent_s = (after.nixl_read_s or 0.0) - (before.nixl_read_s or 0.0)
        samples.append(LinkSample(tokens, n_bytes, seconds, spent_s / reads if reads else None))
    return samples


async def time_reported_link(
    source: ProbeTarget, target: ProbeTarget, facts: ServerFacts
) -> list[LinkSample]:
    """Time transfers between engines that say what each took; none at all where no KV moves."""
    samples = []
    for tokens in (n for n in LENGTHS if n + 2 <= facts.max_model_len):
        moved = []
        for _ in range(REPEATS):
            prompt = source.prompt(tokens)
            handle, first = await source.prefill_for(prompt, ANSWER_S)
            if handle is None or not first:
                return []
            times = (await target.pull(prompt + first, handle, ANSWER_S)).times
            if not times.kv_loaded_bytes or times.kv_load_s is None:
                return []
            moved.append((times.kv_load_s, times.kv_loaded_bytes))
        seconds = median(each_s for each_s, _ in moved[1:])
        samples.append(LinkSample(tokens, moved[-1][1], seconds, seconds))
    return samples


async def _pull_once(source: LinkEnd, target: LinkEnd, tokens: int) -> tuple[float, float] | None:
    """Answer a prompt from the source's KV, then from the target's own: both seconds; None if none moves."""
    prompt = source.prompt(tokens)
    handle = source.handle(await source.answer(prompt, source.connector.export("")), prompt)
    if handle is None:
        return None
    pulled = await target.answer(prompt, target.connector.load(handle, tokens, pin=False))
    pinned = target.handle(pulled, prompt)
    if pinned is not None:
        await source.client.decline(source.connector.load(pinned, tokens, pin=False))
    return pulled.seconds, (await target.answer(prompt)).seconds


def link_lengths(source: ServerFacts, target: ServerFacts) -> list[int]:
    """Return prompt lengths of one token more than whole blocks that both servers have room for."""
    block = max(source.block_tokens, target.block_tokens)
    room = min(
        limit
        for facts in (source, target)
        for limit in (facts.max_model_len - 1, int(KV_SHARE * facts.kv_capacity_tokens))
    )
    whole = {max(1, min(length, room - 1) // block) * block for length in LENGTHS}
    return [tokens + 1 for tokens in sorted(whole) if tokens < room]


def fit_link(source: str, target: str, samples: Sequence[LinkSample]) -> MeasuredLink:
    """Fit latency and bandwidth; the connector's own times bound both the times and the bandwidth. Raises
    ConfigError for fewer than two lengths."""
    if len({sample.tokens for sample in samples}) < 2:
        raise ConfigError(f"too few transfers from {source} to {target} were timed; give longer contexts")
    reported = [TransferSample(s.tokens, s.n_bytes, s.read_s) for s in samples if s.read_s]
    reads = fit_transfer(reported)[0] if len(reported) == len(samples) else None
    seen = [TransferSample(s.tokens, s.n_bytes, max(s.seconds, s.read_s or SHORTEST_S)) for s in samples]
    cost = fit_transfer(seen)[0]
    by = BY_OUTSIDE
    if reads is not None:
        hidden = sum(sample.seconds <= (sample.read_s or 0.0) for sample in samples)
        by = BY_ENGINE if 2 * hidden > len(samples) else BY_BOTH
        bytes_per_s = min(float(cost.bytes_per_s), float(reads.bytes_per_s))
        latency_s = median(max(0.0, s.seconds - s.n_bytes / bytes_per_s) for s in seen)
        cost = TransferCost(latency_s, bytes_per_s)
    return MeasuredLink(
        source,
        target,
        by,
        float(cost.latency_s),
        float(cost.bytes_per_s),
        median(abs(float(cost.seconds(s.n_bytes)) / s.seconds - 1.0) for s in seen),
        float(reads.latency_s) if reads else None,
        float(reads.bytes_per_s) if reads else None,
        tuple(samples),
    )

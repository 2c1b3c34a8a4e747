"""What it costs to move KV from one vLLM server to another, seen from outside and by the connector itself.

One server computes a prompt and pins it. Another answers the same prompt for one token from the pinned KV,
and then again from its own prefix cache: what the first answer took longer is the transfer, and the front
end's time is in both. Prompts hold one token more than whole blocks, so that both answers compute one token.
NixlConnector also times its reads and counts their bytes. Its times leave out what a request waits for around
a read, and show less of the machine's jitter: they bound what is seen from outside.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from statistics import median

import aiohttp
import orjson

from tidegate.bench.probe_target import ProbeTarget
from tidegate.bench.saved_profile import Link, LinkSample
from tidegate.core.errors import ConfigError, EngineFault, EngineUnreachable
from tidegate.costs.fitting import TransferSample, fit_transfer
from tidegate.costs.forms import TransferCost
from tidegate.engines.seam import Json, KvHandle
from tidegate.engines.vllm.connector import Nixl, refused_request
from tidegate.fleet.member import LEASE_S
from tidegate.fleet.vllm_facts import ServerFacts

LENGTHS = (64, 256, 1024, 4096)
REPEATS = 5
KV_SHARE = 0.2
"""Share of a server's KV cache that one prompt may take: what is pinned goes only with its lease."""
ANSWER_S = 60.0
SHORTEST_S = 1e-5
"""What jitter may leave of a transfer that takes next to no time."""
_SAMPLE = re.compile(r"^vllm:(\w+)(\{[^}]*\})? (\S+)", re.MULTILINE)
_COUNTERS = (
    "prompt_tokens_by_source_total:external",
    "nixl_xfer_time_seconds_count",
    "nixl_xfer_time_seconds_sum",
    "nixl_bytes_transferred_sum",
)
BY_OUTSIDE = "from outside"
BY_BOTH = "from outside, no faster than NIXL's own times"
BY_ENGINE = "by the engine's own times"


@dataclass(frozen=True, slots=True)
class Reads:
    """What a server counted of KV that came from others: tokens, and NixlConnector's reads of them."""

    tokens: float = 0.0
    count: float = 0.0
    seconds: float = 0.0
    n_bytes: float = 0.0

    @classmethod
    def parse(cls, metrics: str) -> Reads:
        """Sum the counters over a server's engines; all are 0 where it shows none."""
        sums = dict.fromkeys(_COUNTERS, 0.0)
        for name, labels, value in _SAMPLE.findall(metrics):
            key = f"{name}:external" if 'source="external_kv_transfer"' in labels else name
            if key in sums:
                sums[key] += float(value)
        return cls(*sums.values())

    def since(self, before: Reads) -> Reads:
        """Return what came in between."""
        return Reads(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))

    @property
    def moved(self) -> bool:
        """Whether any KV came from another server."""
        return self.tokens > 0 or self.n_bytes > 0


class LinkEnd:
    """One server as a link's end. All its calls are whole answers of one token."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        facts: ServerFacts,
        vocab: tuple[int, int],
        api_key: str,
    ) -> None:
        self.url = url
        self.facts = facts
        self._session = session
        self._vocab = vocab
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._connector = Nixl(facts.block_tokens, LEASE_S)
        self._random = random.Random(time.time_ns())

    def prompt(self, tokens: int) -> list[int]:
        """Return a prompt that no prefix cache knows."""
        return self._random.choices(range(*self._vocab), k=tokens)

    async def export(self, prompt: list[int]) -> KvHandle | None:
        """Compute a prompt and pin its KV; None when the server pins none."""
        _, params = await self._answer(prompt, self._connector.export(""))
        return self._owned(params, prompt)

    async def pull(self, prompt: list[int], handle: KvHandle) -> tuple[float, KvHandle | None]:
        """Answer a prompt from another's KV: the seconds, and the handle of what is pinned here since."""
        seconds, params = await self._answer(prompt, self._connector.load(handle, len(prompt), pin=False))
        return seconds, self._owned(params, prompt)

    async def again(self, prompt: list[int]) -> float:
        """Answer a prompt whose KV is here: the seconds."""
        return (await self._answer(prompt, None))[0]

    async def decline(self, handle: KvHandle) -> None:
        """Have the owner of ``handle``, another server, free its KV."""
        params = self._connector.load(handle, handle.tokens, pin=False)
        await self._ask(refused_request(params))

    async def reads(self) -> Reads:
        """Return what the server counted so far."""
        async with self._session.get(f"{self.url}/metrics") as response:
            return Reads.parse(await response.text())

    def _owned(self, params: Json | None, prompt: list[int]) -> KvHandle | None:
        return self._connector.handle(params, "", self.url, len(prompt), asyncio.get_running_loop().time())

    async def _answer(self, prompt: list[int], kv: Json | None) -> tuple[float, Json | None]:
        body: Json = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        status, raw, seconds = await self._ask(body | ({"kv_transfer_params": kv} if kv else {}))
        if status != 200:
            text = raw[:200].decode(errors="replace")
            raise EngineFault(f"HTTP {status}: {text}", instance=self.url)
        return seconds, orjson.loads(raw).get("kv_transfer_params")

    async def _ask(self, body: Json) -> tuple[int, bytes, float]:
        """Send a completion: the answer's status and body, and the seconds until it was there."""
        sent_s = time.perf_counter()
        try:
            async with self._session.post(
                f"{self.url}/v1/completions",
                data=orjson.dumps({"model": self.facts.model, **body}),
                headers={"Content-Type": "application/json", **self._headers},
                timeout=aiohttp.ClientTimeout(total=ANSWER_S),
            ) as response:
                raw = await response.read()
                return response.status, raw, time.perf_counter() - sent_s
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            why = str(error) or type(error).__name__
            raise EngineUnreachable(f"no answer: {why}", instance=self.url) from None


async def time_link(source: LinkEnd, target: LinkEnd, kv_bytes_per_token: int = 0) -> list[LinkSample]:
    """Time prompts of several lengths; none at all where no KV moves or nobody knows how many bytes.

    ``kv_bytes_per_token`` is for servers that do not count them. The first pull of all is left out: the
    servers make their acquaintance in it. Raises EngineFault when a server refuses.
    """
    samples = []
    for number, tokens in enumerate(link_lengths(source.facts, target.facts)):
        if not number and await _pull_once(source, target, tokens) is None:
            return []
        before = await target.reads()
        pairs = [await _pull_once(source, target, tokens) for _ in range(REPEATS)]
        timed = [pair for pair in pairs if pair is not None]
        reads = (await target.reads()).since(before)
        if not timed or not reads.moved:
            return []
        seconds = median(pulled_s for pulled_s, _ in timed) - median(local_s for _, local_s in timed)
        n_bytes = round(reads.n_bytes / len(timed)) or kv_bytes_per_token * tokens
        if not n_bytes:
            return []
        read_s = reads.seconds / reads.count if reads.count else None
        samples.append(LinkSample(tokens, n_bytes, seconds, read_s))
    return samples


async def told_link(source: ProbeTarget, target: ProbeTarget, facts: ServerFacts) -> list[LinkSample]:
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
    handle = await source.export(prompt)
    if handle is None:
        return None
    pulled_s, pinned = await target.pull(prompt, handle)
    if pinned is not None:
        await source.decline(pinned)
    return pulled_s, await target.again(prompt)


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


def fit_link(source: str, target: str, samples: Sequence[LinkSample]) -> Link:
    """Fit latency and bandwidth; the connector's own times bound both the times and the bandwidth.

    Raises ConfigError for fewer than two lengths.
    """
    if len({sample.tokens for sample in samples}) < 2:
        raise ConfigError(f"too few transfers from {source} to {target} were timed; give longer contexts")
    told = [TransferSample(s.tokens, s.n_bytes, s.read_s) for s in samples if s.read_s]
    reads = fit_transfer(told)[0] if len(told) == len(samples) else None
    seen = [TransferSample(s.tokens, s.n_bytes, max(s.seconds, s.read_s or SHORTEST_S)) for s in samples]
    cost = fit_transfer(seen)[0]
    by = BY_OUTSIDE
    if reads is not None:
        hidden = sum(sample.seconds <= (sample.read_s or 0.0) for sample in samples)
        by = BY_ENGINE if 2 * hidden > len(samples) else BY_BOTH
        bytes_per_s = min(float(cost.bytes_per_s), float(reads.bytes_per_s))
        latency_s = median(max(0.0, s.seconds - s.n_bytes / bytes_per_s) for s in seen)
        cost = TransferCost(latency_s, bytes_per_s)
    return Link(
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

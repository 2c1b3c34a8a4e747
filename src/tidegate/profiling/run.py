"""One measurement from start to end: who the instances are, whether they are idle, what the fits say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from statistics import median
from typing import Any

import aiohttp
import uvloop

from tidegate import __version__
from tidegate.bench.endpoint import Endpoint, probe_endpoint
from tidegate.bench.settings import BenchSettings, PromptForm
from tidegate.core.errors import ConfigError, EngineError
from tidegate.costs.forms import TransferCost
from tidegate.costs.profile import Profile
from tidegate.costs.saved_profile import LinkSample, MeasuredLink, SavedProfile
from tidegate.engines.vllm.client import ServerFacts, VllmClient
from tidegate.fleet.static import checked_url
from tidegate.profiling.facts import busy_servers, engine_name, hardware_name, prompt_tokens_served
from tidegate.profiling.fit import Fitted, fit_timed
from tidegate.profiling.links import LinkEnd, fit_link, time_link, told_link
from tidegate.profiling.prober import Limits, Prober
from tidegate.profiling.target import ProbeTarget
from tidegate.workloads.prompts import TokenPrompts

MOST_SERVERS = 16
OTHERS = 0.02
"""Share of the prompt tokens that a server may have answered to others, above which the user is told."""
ALIKE = 1.3
"""Servers whose prefills differ by more than this factor should have profiles of their own (ours)."""
ALIKE_TOKENS, ALIKE_REPEATS = (64, 512, 2048), 3

Advance = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """What to measure. ``urls`` has the instance, and others between which KV is moved.

    ``busy`` allows instances that serve other requests. ``hardware`` is what they run on, found out where it
    is empty and they run here; ``kv_bytes_per_token`` is for engines that do not count what they move.
    """

    urls: Sequence[str]
    budget_s: float = 60.0
    name: str = ""
    api_key: str = field(default="", repr=False)
    secret: str = field(default="", repr=False)
    max_batch_tokens: int | None = None
    busy: bool = False
    hardware: str = ""
    kv_bytes_per_token: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.urls) <= MOST_SERVERS:
            raise ConfigError(f"give one URL, or up to {MOST_SERVERS} between which KV is to be moved")
        if not 0 < self.budget_s < float("inf"):
            raise ConfigError(f"the budget is a positive number of seconds, not {self.budget_s}")


def measure_profile(settings: ProbeSettings, advance: Advance) -> SavedProfile:
    """Measure and fit. Raises ConfigError when an instance cannot be measured, EngineError when it breaks."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(settings, advance))


async def measure(settings: ProbeSettings, advance: Advance) -> SavedProfile:
    """Do the work of ``measure_profile`` inside a running loop."""
    urls = [checked_url(url) for url in settings.urls]
    if len(set(urls)) < len(urls):
        raise ConfigError("a URL is given more than once")
    async with aiohttp.ClientSession() as session:
        servers = _Servers(session, settings, urls)
        await servers.ask()
        served = await prompt_tokens_served(servers.clients[0])
        target = servers.targets[0]
        facts = servers.facts[0]
        limits = Limits(
            facts.max_model_len, facts.kv_capacity_tokens, facts.block_tokens, settings.max_batch_tokens
        )
        prober = Prober(target, limits, settings.budget_s, advance)
        try:
            await prober.run()
            notes = await _interference(servers.clients[0], served, target.sent_tokens)
            fitted = fit_timed(
                settings.name or f"{servers.engine.split(' ')[0]}/{servers.endpoint.model}",
                prober.timed,
                source=f"measured over HTTP on {servers.engine}, host time included",
            )
            notes += await servers.unlike(fitted.profile)
            links, missing = await servers.links(advance)
        finally:
            servers.close()
        busy = await busy_servers(servers.clients)
        notes += [f"{url} serves other requests: the times are those of a busy instance" for url in busy]
    return _saved(servers, prober, fitted, links, [*prober.notes, *notes, *missing])


class _Servers:
    """The instances of one measurement: one whose steps are timed, and the others."""

    endpoint: Endpoint
    engine: str
    facts: list[ServerFacts]
    targets: list[ProbeTarget]

    def __init__(self, session: aiohttp.ClientSession, settings: ProbeSettings, urls: list[str]) -> None:
        self.urls = urls
        self.settings = settings
        self._session = session
        self.clients = [VllmClient(session, url, api_key=settings.api_key) for url in urls]

    async def ask(self) -> None:
        """Find out who they are. Raises ConfigError for one that cannot be measured, or is not idle."""
        settings = self.settings
        self.facts = [await _facts(client) for client in self.clients]
        models = sorted({facts.model for facts in self.facts})
        if len(models) > 1:
            raise ConfigError(
                f"KV moves only between instances of one model; these serve {', '.join(models)}"
            )
        busy = [] if settings.busy else await busy_servers(self.clients)
        if busy:
            raise ConfigError(f"not idle: {', '.join(busy)}; wait, or measure busy instances with --busy")
        self.endpoint = await probe_endpoint(
            self._session,
            BenchSettings(self.urls[0], api_key=settings.api_key, prompt_form=PromptForm.TOKENS),
        )
        self.engine = await engine_name(self.clients[0])
        for client in self.clients:
            client.model = self.endpoint.model
        self.targets = [
            ProbeTarget(
                url,
                self.endpoint.model,
                self._vocab,
                seed=time.time_ns(),
                api_key=settings.api_key,
                secret=settings.secret,
            )
            for url in self.urls
        ]

    def close(self) -> None:
        """Close all connections."""
        for target in self.targets:
            target.close()

    async def unlike(self, profile: Profile) -> list[str]:
        """Return a note for each other instance whose prefills do not take what the profile says."""
        notes = []
        for target, facts in zip(self.targets[1:], self.facts[1:], strict=True):
            lengths = [n for n in ALIKE_TOKENS if n + 2 <= facts.max_model_len]
            ratios = []
            for tokens in lengths:
                times = [await target.first_token(target.prompt(tokens), 120.0) for _ in range(ALIKE_REPEATS)]
                seen_s = median(first_s - sent_s for sent_s, first_s, _ in times)
                ratios.append(seen_s / (profile.prefill_s(tokens) + profile.front_s))
            ratio = median(ratios)
            if not 1 / ALIKE <= ratio <= ALIKE:
                notes.append(f"{target.url} takes {ratio:.2f} times as long: measure it on its own")
        return notes

    async def links(self, advance: Advance) -> tuple[list[MeasuredLink], list[str]]:
        """Time KV moving over every ordered pair; notes for those where none moves."""
        if len(self.urls) < 2:
            return [], ["no second instance: the transfer's cost is assumed"]
        links, notes = [], []
        pairs = [(a, b) for a in range(len(self.urls)) for b in range(len(self.urls)) if a != b]
        for number, (a, b) in enumerate(pairs):
            source, target = self.urls[a], self.urls[b]
            advance(number / len(pairs), f"KV from {source} to {target}")
            try:
                samples = await self._samples(a, b)
                if samples:
                    links.append(fit_link(source, target, samples))
                else:
                    notes.append(f"{source} hands no KV to {target}: the transfer's cost is assumed")
            except (EngineError, ConfigError) as error:
                notes.append(f"KV from {source} to {target} could not be timed: {error.message}")
        return links, notes

    async def _samples(self, a: int, b: int) -> list[LinkSample]:
        if not self.engine.startswith("vllm"):
            return await told_link(self.targets[a], self.targets[b], self.facts[b])
        source, target = (LinkEnd(self.clients[n], self.facts[n], self._vocab) for n in (a, b))
        return await time_link(source, target, self.settings.kv_bytes_per_token)

    @property
    def _vocab(self) -> tuple[int, int]:
        prompts = self.endpoint.prompts
        assert isinstance(prompts, TokenPrompts), "the endpoint was asked to take token ids"
        return prompts.low, prompts.vocab


async def _facts(client: VllmClient) -> ServerFacts:
    try:
        return await client.facts()
    except EngineError as error:
        raise ConfigError(f"{client.url} is not ready: {error.message}") from None


async def _interference(client: VllmClient, before: int | None, sent_tokens: int) -> list[str]:
    """Return a note when the server answered more prompt tokens than it was sent from here."""
    after = await prompt_tokens_served(client)
    if before is None or after is None:
        return []
    others = after - before - sent_tokens
    if others <= OTHERS * sent_tokens:
        return []
    return [
        f"{client.url} answered {others:,} prompt tokens of others meanwhile: measure again when it is idle"
    ]


def _saved(
    servers: _Servers, prober: Prober, fitted: Fitted, links: Sequence[MeasuredLink], notes: Sequence[str]
) -> SavedProfile:
    timed, facts = prober.timed, servers.facts[0]
    samples = [sample for link in links for sample in link.samples]
    profile = fitted.profile
    if samples:
        pooled = fit_link("any", "any", samples)
        profile = replace(profile, transfer=TransferCost(pooled.latency_s, pooled.bytes_per_s))
    rows: dict[str, Sequence[Any]] = {"prefill": fitted.prefill, "step": timed.step, "mixed": timed.mixed}
    return SavedProfile(
        profile=profile,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tidegate=__version__,
        url=servers.urls[0],
        model=servers.endpoint.model,
        engine=servers.engine,
        hardware=servers.settings.hardware or hardware_name(servers.urls[0]),
        max_model_len=facts.max_model_len,
        block_tokens=facts.block_tokens,
        kv_capacity_tokens=facts.kv_capacity_tokens,
        kv_bytes_per_token=_bytes_per_token(samples, facts.block_tokens),
        max_batch_tokens=prober.max_batch_tokens,
        held_out=fitted.held_out,
        notes=tuple(notes),
        samples={form: [asdict(sample) for sample in samples] for form, samples in rows.items()},
        links=tuple(links),
    )


def _bytes_per_token(samples: Sequence[LinkSample], block_tokens: int) -> int:
    """Return the KV of one token, of which blocks move as a whole; 0 while none moved."""
    per_token = [s.n_bytes / (-(-s.tokens // block_tokens) * block_tokens) for s in samples]
    return round(median(per_token)) if per_token else 0

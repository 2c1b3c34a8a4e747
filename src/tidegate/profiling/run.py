"""One measurement from start to end: what the instances are, whether they are idle, what the fits say.

A server need not tell anything beyond ``/v1/models``: what it does not tell is left out.
"""

from __future__ import annotations

import asyncio
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from ipaddress import ip_address
from itertools import permutations
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import uvloop

from tidegate import __version__
from tidegate.bench.endpoint import probe_endpoint
from tidegate.bench.settings import BenchSettings, PromptForm
from tidegate.core.errors import ConfigError, EngineError
from tidegate.costs.forms import TransferCost
from tidegate.costs.profile import Profile
from tidegate.costs.saved_profile import MeasuredLink, SavedProfile
from tidegate.engines.vllm.client import ASK_S, ServerFacts, VllmClient
from tidegate.engines.vllm.metrics import VllmMetrics
from tidegate.fleet.static import checked_url
from tidegate.profiling.fit import Fitted, fit_timed
from tidegate.profiling.links import LinkEnd, fit_link, time_link, time_reported_link
from tidegate.profiling.prober import Prober
from tidegate.profiling.target import ProbeTarget
from tidegate.profiling.unfinished import keep_unfinished, read_unfinished
from tidegate.workloads.prompts import TokenPrompts

MOST_SERVERS = 16
BUSY_CHECKS, BUSY_PAUSE_S = 5, 0.3
LONGEST_NAME = 40
OTHERS = 0.02
"""Share of the prompt tokens that a server may have answered to others, above which there is a note."""
ALIKE = 1.3
"""Servers whose prefills differ by more than this factor should have profiles of their own (ours)."""
ALIKE_TOKENS, ALIKE_REPEATS = (64, 512, 2048), 3

PROBING_SHARE = 0.7
"""Of the work, where links are timed after it."""

Advance = Callable[[float, str, float], None]


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """What to measure. ``urls`` has the instance, and others between which KV is moved. ``busy`` allows other
    requests. ``hardware`` is found out where it is empty and the instances run here;
    ``kv_bytes_per_token`` is for engines that do not count what they move."""

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


@dataclass(frozen=True, slots=True)
class _Instance:
    """One instance: asked through ``client``, timed through ``target``."""

    client: VllmClient
    facts: ServerFacts
    target: ProbeTarget


def measure_profile(settings: ProbeSettings, advance: Advance, keep: Path | None = None) -> SavedProfile:
    """Measure and fit. Raises ConfigError when an instance cannot be measured, EngineError when it breaks.

    What is timed when it ends early, by Ctrl-C too, goes to ``keep``, from which another call goes on.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(settings, advance, keep))


async def measure(settings: ProbeSettings, advance: Advance, keep: Path | None = None) -> SavedProfile:
    """Do the work of ``measure_profile`` inside a running loop."""
    async with aiohttp.ClientSession() as session:
        instances = await _connect(session, settings)
        first = instances[0]
        engine = await _engine_name(first.client)
        served = (await _metrics(first.client)).prompt_tokens
        alone = PROBING_SHARE if len(instances) > 1 else 1.0
        prober = Prober(
            first.target,
            first.facts,
            settings.max_batch_tokens,
            settings.budget_s,
            lambda share, what, fresh: advance(alone * share, what, alone * fresh),
        )
        of = (first.client.url, first.client.model, engine, str(settings.max_batch_tokens))
        before = None if keep is None else read_unfinished(keep, of)
        if before is not None:
            prober.go_on(before)
        try:
            await prober.run()
            notes = prober.notes + await _interference(first.client, served, first.target.sent_tokens)
            fitted = fit_timed(
                settings.name or f"{engine.split(' ')[0]}/{first.client.model}",
                prober.timed,
                source=f"measured over HTTP on {engine}, host time included",
            )
            notes += await _unlike(instances[1:], fitted.profile)
            on_vllm = engine.startswith("vllm")
            links, missing = await _links(
                instances, settings.kv_bytes_per_token if on_vllm else None, advance
            )
        except BaseException:
            if keep is not None:
                keep_unfinished(keep, prober.unfinished(of))
            raise
        finally:
            for each in instances:
                each.target.close()
        busy = await _busy_servers([each.client for each in instances])
        notes += [f"{url} serves other requests: the times are those of a busy instance" for url in busy]
    return _saved(settings, first, engine, prober, fitted, links, notes + missing)


async def _connect(session: aiohttp.ClientSession, settings: ProbeSettings) -> list[_Instance]:
    """Learn what the instances are. Raises ConfigError for one that cannot be measured, or is not idle."""
    urls = [checked_url(url) for url in settings.urls]
    if len(set(urls)) < len(urls):
        raise ConfigError("a URL is given more than once")
    clients = [VllmClient(session, url, api_key=settings.api_key) for url in urls]
    facts = []
    for client in clients:
        try:
            facts.append(await client.facts())
        except EngineError as error:
            raise ConfigError(f"{client.url} is not ready: {error.message}") from None
    models = sorted({each.model for each in facts})
    if len(models) > 1:
        raise ConfigError(f"KV moves only between instances of one model; these serve {', '.join(models)}")
    busy = [] if settings.busy else await _busy_servers(clients)
    if busy:
        raise ConfigError(f"not idle: {', '.join(busy)}; wait, or measure busy instances with --busy")
    endpoint = await probe_endpoint(
        session, BenchSettings(urls[0], api_key=settings.api_key, prompt_form=PromptForm.TOKENS)
    )
    prompts = endpoint.prompts
    assert isinstance(prompts, TokenPrompts), "the endpoint was asked to take token ids"
    for client in clients:
        client.model = endpoint.model
    targets = [
        ProbeTarget(
            url,
            endpoint.model,
            (prompts.low, prompts.vocab),
            seed=time.time_ns(),
            api_key=settings.api_key,
            secret=settings.secret,
        )
        for url in urls
    ]
    return [_Instance(*each) for each in zip(clients, facts, targets, strict=True)]


async def _unlike(others: Sequence[_Instance], profile: Profile) -> list[str]:
    """Return a note for each instance whose prefills do not take what the profile says."""
    notes = []
    for each in others:
        target, ratios = each.target, []
        for tokens in (n for n in ALIKE_TOKENS if n + 2 <= each.facts.max_model_len):
            times = [await target.first_token(target.prompt(tokens), 120.0) for _ in range(ALIKE_REPEATS)]
            seen_s = median(first_s - sent_s for sent_s, first_s in times)
            ratios.append(seen_s / (profile.prefill_s(tokens) + profile.front_s))
        ratio = median(ratios)
        if not 1 / ALIKE <= ratio <= ALIKE:
            notes.append(f"{target.url} takes {ratio:.2f} times as long: measure it on its own")
    return notes


async def _links(
    instances: Sequence[_Instance], kv_bytes_per_token: int | None, advance: Advance
) -> tuple[list[MeasuredLink], list[str]]:
    """Time KV moving over every ordered pair, with notes for pairs where none moves. ``kv_bytes_per_token``
    is None for engines that are not vLLM."""
    if len(instances) < 2:
        return [], ["no second instance: the transfer's cost is assumed"]
    links, notes = [], []
    pairs = list(permutations(instances, 2))
    for number, (source, target) in enumerate(pairs):
        a, b = source.client.url, target.client.url
        share = PROBING_SHARE + (1.0 - PROBING_SHARE) * number / len(pairs)
        advance(share, f"KV from {a} to {b}", share)
        try:
            if kv_bytes_per_token is None:
                samples = await time_reported_link(source.target, target.target, target.facts)
            else:
                near, far = (LinkEnd(x.client, x.facts, x.target.prompt) for x in (source, target))
                samples = await time_link(near, far, kv_bytes_per_token)
            if samples:
                links.append(fit_link(a, b, samples))
            else:
                notes.append(f"{a} hands no KV to {b}: the transfer's cost is assumed")
        except (EngineError, ConfigError) as error:
            notes.append(f"KV from {a} to {b} could not be timed: {error.message}")
    return links, notes


def _saved(
    settings: ProbeSettings,
    first: _Instance,
    engine: str,
    prober: Prober,
    fitted: Fitted,
    links: Sequence[MeasuredLink],
    notes: Sequence[str],
) -> SavedProfile:
    timed, facts, url = prober.timed, first.facts, first.client.url
    moved = [sample for link in links for sample in link.samples]
    profile = fitted.profile
    kv_bytes = 0
    if moved:
        pooled = fit_link("any", "any", moved)
        profile = replace(profile, transfer=TransferCost(pooled.latency_s, pooled.bytes_per_s))
        block = facts.block_tokens
        kv_bytes = round(median(s.n_bytes / (-(-s.tokens // block) * block) for s in moved))
    rows: dict[str, Sequence[Any]] = {"prefill": fitted.prefill, "step": timed.step, "mixed": timed.mixed}
    return SavedProfile(
        profile=profile,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tidegate=__version__,
        url=url,
        model=first.client.model,
        engine=engine,
        hardware=settings.hardware or hardware_name(url),
        max_model_len=facts.max_model_len,
        block_tokens=facts.block_tokens,
        kv_capacity_tokens=facts.kv_capacity_tokens,
        kv_bytes_per_token=kv_bytes,
        max_batch_tokens=prober.max_batch_tokens,
        held_out=fitted.held_out,
        notes=tuple(notes),
        samples={form: [asdict(sample) for sample in samples] for form, samples in rows.items()},
        links=tuple(links),
    )


async def _metrics(client: VllmClient) -> VllmMetrics:
    """Return what the server shows; nothing when that fails."""
    try:
        return await client.metrics()
    except EngineError:
        return VllmMetrics()


async def _busy_servers(clients: Sequence[VllmClient]) -> list[str]:
    """Return the URLs of servers that stay busy; what was aborted a moment ago takes a while to end."""
    busy = list(clients)
    for check in range(BUSY_CHECKS):
        if check and busy:
            await asyncio.sleep(BUSY_PAUSE_S)
        metrics = [await _metrics(client) for client in busy]
        busy = [client for client, seen in zip(busy, metrics, strict=True) if seen.running or seen.waiting]
    return [client.url for client in busy]


async def _interference(client: VllmClient, before: int | None, sent_tokens: int) -> list[str]:
    """Return a note when the server answered more prompt tokens than it was sent from here."""
    after = (await _metrics(client)).prompt_tokens
    if before is None or after is None:
        return []
    others = after - before - sent_tokens
    note = (
        f"{client.url} answered {others:,} prompt tokens of others meanwhile: measure again when it is idle"
    )
    return [note] if others > OTHERS * sent_tokens else []


async def _engine_name(client: VllmClient) -> str:
    """Return name and version as far as the server shows them: vLLM answers ``/version``."""
    try:
        version = await client.version()
        if version:
            return f"vllm {version[:LONGEST_NAME]}"
        owner = (await client.ask("/v1/models")).body["data"][0]["owned_by"]
    except (EngineError, LookupError, TypeError):
        return "engine"
    return str(owner)[:LONGEST_NAME] or "engine"


def hardware_name(url: str) -> str:
    """Return this machine's GPU, or its CPU where there is none, for a server on it; "" for any other."""
    host = urlsplit(url).hostname or ""
    try:
        local = ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    return (_gpu() or _cpu()) if local else ""


def _gpu() -> str:
    """Return the name of this machine's GPUs, where they are all alike."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    query = [command, "--query-gpu=name", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=ASK_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    names = {line.strip() for line in output.splitlines() if line.strip()}
    return names.pop() if len(names) == 1 else ""


def _cpu() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        info = ""
    found = re.search(r"^model name\s*: (.+)$", info, re.MULTILINE)
    return found[1].strip() if found else platform.processor()

"""One measurement from start to end: who the instances are, whether they are idle, what the fits say."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Any

import aiohttp
import uvloop

from tidegate.bench.endpoint import Endpoint, probe_endpoint
from tidegate.bench.probe import Limits, Prober, probe_transfers
from tidegate.bench.probe_fit import Fitted, fit_timed
from tidegate.bench.probe_target import ProbeTarget
from tidegate.bench.saved_profile import SavedProfile
from tidegate.bench.settings import BenchSettings, PromptForm
from tidegate.core.errors import ConfigError
from tidegate.fleet.vllm_facts import NotReady, ServerFacts, ask_server
from tidegate.workloads.prompts import TokenPrompts

TRANSFER_TOKENS = (64, 256, 1024, 4096)
ASK_S = 5.0
BUSY_CHECKS, BUSY_PAUSE_S = 5, 0.3
_BUSY = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})?\s+([0-9.eE+]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """What to measure. ``urls`` has the instance and, to time KV transfers, a second one."""

    urls: Sequence[str]
    budget_s: float = 60.0
    name: str = ""
    api_key: str = field(default="", repr=False)
    secret: str = field(default="", repr=False)
    max_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.urls) <= 2:
            raise ConfigError("give one URL, or two between which KV is to be moved")
        if not 0 < self.budget_s < float("inf"):
            raise ConfigError(f"the budget is a positive number of seconds, not {self.budget_s}")


def measure_profile(settings: ProbeSettings, advance: Callable[[float, str], None]) -> SavedProfile:
    """Measure and fit. Raises ConfigError when an instance cannot be measured, EngineError when it breaks."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(settings, advance))


async def measure(settings: ProbeSettings, advance: Callable[[float, str], None]) -> SavedProfile:
    """Do the work of ``measure_profile`` inside a running loop."""
    async with aiohttp.ClientSession() as session:
        url = settings.urls[0].rstrip("/").removesuffix("/v1")
        endpoint = await _endpoint(session, url, settings)
        facts = await _facts(session, url, settings)
        notes = await _busy_notes(session, settings.urls)
        targets = [_target(u, endpoint, settings) for u in settings.urls]
        limits = Limits(
            facts.max_model_len, facts.kv_capacity_tokens, facts.block_tokens, settings.max_batch_tokens
        )
        prober = Prober(targets[0], limits, settings.budget_s, advance)
        try:
            await prober.run()
            notes += await _transfers(targets, prober, facts)
        finally:
            for target in targets:
                target.close()
        engine = await _engine(session, url)
        notes += [n for n in await _busy_notes(session, settings.urls) if n not in notes]
    fitted = fit_timed(
        settings.name or f"{engine.split(' ')[0]}/{endpoint.model}",
        prober.timed,
        source=f"measured over HTTP on {engine}, host time included",
    )
    return _saved(settings, endpoint, facts, engine, prober, fitted, [*prober.notes, *notes])


async def _endpoint(session: aiohttp.ClientSession, url: str, settings: ProbeSettings) -> Endpoint:
    return await probe_endpoint(
        session, BenchSettings(url, api_key=settings.api_key, prompt_form=PromptForm.TOKENS)
    )


async def _facts(session: aiohttp.ClientSession, url: str, settings: ProbeSettings) -> ServerFacts:
    try:
        return await ask_server(session, url, settings.api_key, ASK_S)
    except NotReady as error:
        raise ConfigError(f"{url} is not ready: {error}") from None


def _target(url: str, endpoint: Endpoint, settings: ProbeSettings) -> ProbeTarget:
    prompts = endpoint.prompts
    assert isinstance(prompts, TokenPrompts), "the endpoint was asked to take token ids"
    base = url.rstrip("/").removesuffix("/v1")
    return ProbeTarget(
        base,
        endpoint.model,
        (prompts.low, prompts.vocab),
        seed=time.time_ns(),
        api_key=settings.api_key,
        secret=settings.secret,
    )


async def _transfers(targets: Sequence[ProbeTarget], prober: Prober, facts: ServerFacts) -> list[str]:
    """Time both directions where there are two instances; the profile has one link for both."""
    if len(targets) < 2:
        return ["no second instance: the transfer's cost is assumed"]
    lengths = [n for n in TRANSFER_TOKENS if n + 2 <= facts.max_model_len]
    for source, target in (targets, targets[::-1]):
        if not await probe_transfers(source, target, prober, lengths):
            return [f"{source.url} hands no KV to {target.url}: the transfer's cost is assumed"]
    return []


async def _busy_notes(session: aiohttp.ClientSession, urls: Sequence[str]) -> list[str]:
    """Return a note for each instance that stays busy: streams just aborted take a moment to end."""
    notes = []
    for url in urls:
        for _ in range(BUSY_CHECKS):
            found = _BUSY.findall(await _text(session, f"{url.rstrip('/').removesuffix('/v1')}/metrics"))
            if sum(map(float, found)) == 0:
                break
            await asyncio.sleep(BUSY_PAUSE_S)
        else:
            notes.append(f"{url} serves other requests: the times are those of a busy instance")
    return notes


async def _engine(session: aiohttp.ClientSession, url: str) -> str:
    """Return name and version as far as the server tells them: vLLM answers ``/version``."""
    text = await _text(session, f"{url}/version")
    found = re.search(r'"version"\s*:\s*"([^"]{1,40})"', text)
    if found:
        return f"vllm {found[1]}"
    models = await _text(session, f"{url}/v1/models")
    owner = re.search(r'"owned_by"\s*:\s*"([^"]{1,40})"', models)
    return owner[1] if owner else "engine"


async def _text(session: aiohttp.ClientSession, url: str) -> str:
    """Return what a GET answers; empty when it fails: these are facts one can do without."""
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=ASK_S)) as response:
            return await response.text() if response.status == 200 else ""
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return ""


def _saved(
    settings: ProbeSettings,
    endpoint: Endpoint,
    facts: ServerFacts,
    engine: str,
    prober: Prober,
    fitted: Fitted,
    notes: Sequence[str],
) -> SavedProfile:
    timed = prober.timed
    rows: dict[str, Sequence[Any]] = {
        "prefill": fitted.prefill,
        "step": timed.step,
        "mixed": timed.mixed,
        "transfer": timed.transfer,
    }
    per_token = [s.n_bytes / s.tokens for s in timed.transfer]
    return SavedProfile(
        profile=fitted.profile,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        url=settings.urls[0],
        model=endpoint.model,
        engine=engine,
        max_model_len=facts.max_model_len,
        block_tokens=facts.block_tokens,
        kv_capacity_tokens=facts.kv_capacity_tokens,
        kv_bytes_per_token=round(median(per_token)) if per_token else 0,
        max_batch_tokens=prober.max_batch_tokens,
        front_s=fitted.front_s,
        held_out=fitted.held_out,
        notes=tuple(notes),
        samples={form: [asdict(sample) for sample in samples] for form, samples in rows.items()},
    )

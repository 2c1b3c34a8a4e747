"""Find out what an endpoint serves and how it counts prompt tokens, before any load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import aiohttp

from tidegate.bench.settings import BenchSettings, PromptForm
from tidegate.core.errors import ConfigError, EngineError, EngineTimeout
from tidegate.engines.vllm.client import Reply, VllmClient
from tidegate.workloads.prompts import TokenPrompts, WordPrompts, words

PROBE_TIMEOUT_S = 60.0
# Tried from the largest: servers refuse an id beyond their vocabulary, and few have more than 32000.
VOCABULARIES = (32000, 8000, 2000, 512, 256)
PROBE_WORDS = (16, 144)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A probed endpoint: the model to name and the prompts to send; ``notes`` are for the user."""

    model: str
    prompts: TokenPrompts | WordPrompts
    notes: tuple[str, ...] = ()

    @property
    def prompt_form(self) -> PromptForm:
        return PromptForm.TOKENS if isinstance(self.prompts, TokenPrompts) else PromptForm.TEXT


async def probe_endpoint(session: aiohttp.ClientSession, settings: BenchSettings) -> Endpoint:
    """Ask for the model, then send a few one-token requests to learn the prompt form.

    Raises ConfigError when the endpoint cannot be reached, refuses the key, serves several models
    and none was named, or does not accept the prompt form that was asked for.
    """
    client = VllmClient(session, settings.base, deadline_s=PROBE_TIMEOUT_S, headers=settings.headers())
    model, path = settings.model or await _only_model(client), settings.completion_path
    if not settings.chat and settings.prompt_form != PromptForm.TEXT:
        refusal = ""
        for vocab in VOCABULARIES:
            prompts = TokenPrompts(vocab, low=min(1000, vocab // 8), seed=settings.seed)
            ids = [prompts.low, *range(vocab - 7, vocab)]
            reply = await _ask(client, path, settings.body(model, ids, 1, stream=False))
            if reply.status == 200 and _prompt_tokens(reply) == len(ids):
                if not settings.sessions or _answer_ids(reply):
                    return Endpoint(model, prompts)
                refusal = "it returns no ids of its answers, which the next turn of a session repeats"
                break
            refusal = refusal or reply.error
            if reply.status != 400:
                break
        if settings.prompt_form == PromptForm.TOKENS:
            raise ConfigError(f"{settings.completion_url} does not take token-id prompts: {refusal}")
    return await _calibrated_text(client, settings, model)


async def _calibrated_text(client: VllmClient, settings: BenchSettings, model: str) -> Endpoint:
    path, counted = settings.completion_path, []
    for count in PROBE_WORDS:
        reply = await _ask(client, path, settings.body(model, words(count), 1, stream=False))
        if reply.status != 200:
            raise ConfigError(f"{settings.completion_url} refused a probe: {reply.error}")
        counted.append(_prompt_tokens(reply))
    few, many = counted
    if few is None or many is None or many <= few:
        note = "the endpoint reports no usage; prompts assume one token per word"
        return Endpoint(model, WordPrompts(seed=settings.seed), (note,))
    per_word = (many - few) / (PROBE_WORDS[1] - PROBE_WORDS[0])
    overhead = few - PROBE_WORDS[0] * per_word
    return Endpoint(model, WordPrompts(per_word, overhead, settings.seed))


async def _only_model(client: VllmClient) -> str:
    url = f"{client.url}/v1/models"
    reply = await _ask(client, "/v1/models")
    if reply.status == 401:
        raise ConfigError(f"{url} answered 401; give --api-key or set TIDEGATE_API_KEY")
    listed = reply.body.get("data") if reply.status == 200 else None
    names = [m["id"] for m in listed if isinstance(m, dict) and "id" in m] if isinstance(listed, list) else []
    if reply.status == 200 and not names:
        raise ConfigError(f"{url} lists no model yet; is the server still starting?")
    if not names:
        raise ConfigError(f"{url} answered {reply.error}; give --model")
    if len(names) > 1:
        raise ConfigError(
            f"{url} lists several models; choose one with --model: {', '.join(map(str, names))}"
        )
    return str(names[0])


async def _ask(client: VllmClient, path: str, body: dict[str, Any] | None = None) -> Reply:
    try:
        return await client.ask(path, body)
    except EngineTimeout:
        raise ConfigError(f"{client.url}{path} did not answer within {PROBE_TIMEOUT_S:g} s") from None
    except EngineError as error:
        raise ConfigError(f"cannot reach {client.url}{path}: {error.message}") from None


def _answer_ids(reply: Reply) -> list[int]:
    choices = reply.body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    ids = first.get("token_ids") if isinstance(first, dict) else None
    return ids if isinstance(ids, list) else []


def _prompt_tokens(reply: Reply) -> int | None:
    usage = reply.body.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None

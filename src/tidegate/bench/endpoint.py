"""Find out what an endpoint serves and how it counts prompt tokens, before any load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from tidegate.bench.settings import BenchSettings, PromptForm
from tidegate.core.errors import ConfigError
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
    model = settings.model or await _only_model(session, settings)
    if not settings.chat and settings.prompt_form != PromptForm.TEXT:
        refusal = ""
        for vocab in VOCABULARIES:
            prompts = TokenPrompts(vocab, low=min(1000, vocab // 8), seed=settings.seed)
            ids = [prompts.low, *range(vocab - 7, vocab)]
            status, answer = await _ask(session, settings, model, list(ids))
            if status == 200 and _prompt_tokens(answer) == len(ids):
                return Endpoint(model, prompts)
            refusal = refusal or f"HTTP {status}, {_message(answer)}"
            if status != 400:
                break
        if settings.prompt_form == PromptForm.TOKENS:
            raise ConfigError(f"{settings.completion_url} does not take token-id prompts: {refusal}")
    return await _calibrated_text(session, settings, model)


async def _calibrated_text(session: aiohttp.ClientSession, settings: BenchSettings, model: str) -> Endpoint:
    counted = []
    for count in PROBE_WORDS:
        status, answer = await _ask(session, settings, model, words(count))
        if status != 200:
            raise ConfigError(f"{settings.completion_url} refused a probe: HTTP {status}, {_message(answer)}")
        counted.append(_prompt_tokens(answer))
    few, many = counted
    if few is None or many is None or many <= few:
        note = "the endpoint reports no usage; prompts assume one token per word"
        return Endpoint(model, WordPrompts(seed=settings.seed), (note,))
    per_word = (many - few) / (PROBE_WORDS[1] - PROBE_WORDS[0])
    overhead = few - PROBE_WORDS[0] * per_word
    return Endpoint(model, WordPrompts(per_word, overhead, settings.seed))


async def _only_model(session: aiohttp.ClientSession, settings: BenchSettings) -> str:
    url = f"{settings.base}/v1/models"
    status, answer = await _call(session, "GET", url, settings)
    if status == 401:
        raise ConfigError(f"{url} answered 401; give --api-key or set TIDEGATE_API_KEY")
    listed = answer.get("data") if status == 200 else None
    names = [m["id"] for m in listed if isinstance(m, dict) and "id" in m] if isinstance(listed, list) else []
    if status == 200 and not names:
        raise ConfigError(f"{url} lists no model yet; is the server still starting?")
    if not names:
        raise ConfigError(f"{url} answered HTTP {status}, {_message(answer)}; give --model")
    if len(names) > 1:
        raise ConfigError(
            f"{url} lists several models; choose one with --model: {', '.join(map(str, names))}"
        )
    return str(names[0])


async def _ask(
    session: aiohttp.ClientSession, settings: BenchSettings, model: str, prompt: str | list[int]
) -> tuple[int, dict[str, Any]]:
    body = orjson.dumps(settings.body(model, prompt, 1, stream=False))
    return await _call(session, "POST", settings.completion_url, settings, body)


async def _call(
    session: aiohttp.ClientSession, method: str, url: str, settings: BenchSettings, body: bytes | None = None
) -> tuple[int, dict[str, Any]]:
    timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
    try:
        async with session.request(
            method, url, data=body, headers=settings.headers(), timeout=timeout
        ) as response:
            raw = await response.read()
            status = response.status
    except TimeoutError:
        raise ConfigError(f"{url} did not answer within {timeout.total:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise ConfigError(f"cannot reach {url}: {error or type(error).__name__}") from None
    try:
        answer = orjson.loads(raw)
    except orjson.JSONDecodeError:
        answer = {"error": raw[:200].decode(errors="replace")}
    return status, answer if isinstance(answer, dict) else {"error": "the answer is not a JSON object"}


def _prompt_tokens(answer: dict[str, Any]) -> int | None:
    usage = answer.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def _message(answer: dict[str, Any]) -> str:
    error = answer.get("error", answer.get("message", "no message"))
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]

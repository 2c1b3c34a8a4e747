"""A client's request, understood once: what it asks for, and what all its legs carry."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from tidegate.core.errors import BadRequest, ConfigError
from tidegate.core.slo import Slo
from tidegate.protocol.bodies import (
    DEFAULT_COMPLETION_TOKENS,
    MOST_CHOICES,
    ChatBody,
    CompletionBody,
    parse_body,
)
from tidegate.protocol.parameters import PARAMETERS, Fate, passed_on

Json = dict[str, Any]

REWRITTEN = ("max_tokens", "max_completion_tokens", "top_logprobs")
"""Body fields that are written anew for each leg."""

OWN_XARGS = frozenset({"kv_transfer_params", "ec_transfer_params"})
"""Keys of ``vllm_xargs`` that vLLM takes for the fields of the same name."""

SERVICE_TIERS = {"priority": -1, "flex": 1}
"""Priorities of OpenAI's service tiers; the others are 0."""
SEED_BITS = 62
CHARS_PER_TOKEN = 4.0
"""First guess for text prompts, until engines have reported lengths (a common rule of thumb)."""


class Call(msgspec.Struct, frozen=True):
    """One choice of an answer. ``sampling`` holds the body fields that every leg carries unchanged.

    ``id`` names this request, ``answer_id`` the answer in which it is the choice number ``index``.
    Exactly one of ``prompt`` (text or token ids) and ``messages`` is set. ``max_tokens`` is None when
    the client sent none. A request that samples without a seed is given one here, so
    that whatever leg continues it continues the same random sequence; ``seeded`` says that it is the
    client's own.
    """

    id: str
    answer_id: str
    created: int
    chat: bool
    model: str | None
    prompt: list[int] | str | None
    messages: list[Json] | None
    max_tokens: int | None
    sampling: Json
    stream: bool
    include_usage: bool
    return_token_ids: bool
    slo: Slo
    tenant: str
    session: str
    salt: str
    priority: int = 0
    seeded: bool = False
    stops: tuple[str, ...] = ()
    index: int = 0
    first_of_prompt: bool = True
    """Whether no earlier choice has the same prompt."""
    usage_so_far: bool = False

    @property
    def state(self) -> str:
        """Name the field because of which the next token depends on more than the ones before it; "" if none.

        Such state lives in the engine that began the answer: another one cannot take it up in the middle.
        """
        sampling = self.sampling
        if self.seeded and sampling.get("temperature") != 0:
            return "seed"
        table = PARAMETERS[self.chat]
        for name, given in sampling.items():
            if name == "seed" or (name == "tools" and sampling.get("tool_choice") == "none"):
                continue
            if table[name].fate is Fate.STATE and not table[name].asks_nothing(given):
                return name
        return ""

    def tokens_within(self, room: int) -> int:
        """Return how many tokens to generate when the context has ``room`` for that many more."""
        if self.max_tokens is not None:
            return self.max_tokens
        return room if self.chat else min(DEFAULT_COMPLETION_TOKENS, room)

    @property
    def prompt_chars(self) -> int:
        """Length of a text prompt in characters; an estimate's input only."""
        if self.messages is not None:
            return sum(len(str(m.get("content") or "")) + 16 for m in self.messages)
        return len(self.prompt) if isinstance(self.prompt, str) else 0


def read_calls(
    value: Json, headers: Mapping[str, str], *, chat: bool, slo: Slo, allowed: Collection[str] = ()
) -> list[Call]:
    """Check a decoded body and its headers; return one call for each choice of its answer, by ``index``.

    The choices of a prompt sample differently: a client's seed counts up from one to the next, as in vLLM.
    Raises BadRequest naming the field at fault.
    """
    body = parse_body(value, ChatBody) if chat else parse_body(value, CompletionBody)
    sampling = passed_on(value, chat=chat, allowed=allowed)
    call, each = _first_call(body, value, sampling, headers, slo), body.n or 1
    prompts = [None] if isinstance(body, ChatBody) else body.prompts
    if isinstance(body, CompletionBody) and body.best_of not in (None, each):
        raise BadRequest("best_of: not supported, but as many as n", param="best_of")
    if len(prompts) * each > MOST_CHOICES:
        raise BadRequest(f"n: at most {MOST_CHOICES} choices in all", param="n")
    if len(prompts) * each == 1:
        return [call]
    return [
        msgspec.structs.replace(
            call,
            id=f"{call.answer_id}-{index}",
            prompt=prompts[index // each],
            index=index,
            first_of_prompt=index % each == 0,
            sampling=_sampling_apart(call, index % each),
        )
        for index in range(len(prompts) * each)
    ]


def _sampling_apart(call: Call, number: int) -> Json:
    """Return the sampling of a prompt's choice of that number."""
    seed = call.sampling.get("seed")
    if seed is None:
        return call.sampling
    if not call.seeded:
        return call.sampling | {"seed": secrets.randbits(SEED_BITS)}
    counted = int(seed) + number
    return call.sampling | {"seed": counted if counted < 2**63 else counted - 2**64}


def _first_call(
    body: ChatBody | CompletionBody, value: Json, sampling: Json, headers: Mapping[str, str], slo: Slo
) -> Call:
    """Return the call for the first choice."""
    chat = isinstance(body, ChatBody)
    sampling = {name: given for name, given in sampling.items() if name not in REWRITTEN}
    if body.stream and "prompt_logprobs" in sampling:
        raise BadRequest("prompt_logprobs: not available with stream", param="prompt_logprobs")
    xargs = {k: v for k, v in (sampling.pop("vllm_xargs", None) or {}).items() if k not in OWN_XARGS}
    if xargs:
        sampling["vllm_xargs"] = xargs
    max_tokens, logprobs = body.token_limit, body.wanted_logprobs
    if chat and logprobs is not None:
        sampling["top_logprobs"] = logprobs
    elif chat:
        sampling.pop("logprobs", None)
    if body.min_tokens and max_tokens is not None and body.min_tokens > max_tokens:
        raise BadRequest(
            f"min_tokens: {body.min_tokens} is more than max_tokens {max_tokens}", param="min_tokens"
        )
    if body.seed is None and body.temperature != 0.0:
        sampling["seed"] = secrets.randbits(SEED_BITS)
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options: only allowed with stream true", param="stream_options")
    tenant = headers.get("x-tenant-id", "")
    salt = _salt(tenant, body.cache_salt or "") if tenant or body.cache_salt else ""
    answer_id, options = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12), body.stream_options
    return Call(
        id=answer_id,
        answer_id=answer_id,
        created=int(time.time()),
        chat=chat,
        model=body.model,
        prompt=None if isinstance(body, ChatBody) else body.prompts[0],
        messages=value["messages"] if chat else None,
        max_tokens=max_tokens,
        sampling=sampling,
        stream=body.stream,
        include_usage=bool(options and options.include_usage),
        usage_so_far=bool(options and options.include_usage and options.continuous_usage_stats),
        return_token_ids=body.return_token_ids,
        slo=_slo(headers, slo),
        tenant=tenant,
        session=headers.get("x-session-id", ""),
        salt=salt,
        priority=_priority(body, tenant),
        seeded=body.seed is not None,
        stops=body.stops,
    )


def _priority(body: ChatBody | CompletionBody, tenant: str) -> int:
    """Return the class of a request, lower ones going first: vLLM's ``priority``, else what OpenAI's
    ``service_tier`` stands for. A tenant may go behind the others, not before them."""
    priority = body.priority
    if priority is None:
        priority = SERVICE_TIERS.get(body.service_tier or "", 0) if isinstance(body, ChatBody) else 0
    return max(0, priority) if tenant else priority


def _salt(tenant: str, cache_salt: str) -> str:
    """Return what an engine takes as a salt: vLLM refuses some characters, and more than 128 of any."""
    return hashlib.sha256("\x1f".join((tenant, cache_salt)).encode()).hexdigest()


def _slo(headers: Mapping[str, str], default: Slo) -> Slo:
    """Return the request's targets: its headers', the gateway's where a header is absent."""
    slo = default
    for header, name in (("x-slo-ttft-ms", "ttft_s"), ("x-slo-tpot-ms", "tpot_s")):
        text = headers.get(header)
        if text is None:
            continue
        try:
            slo = replace(slo, **{name: float(text) / 1000.0})
        except (ValueError, ConfigError):
            raise BadRequest(f"header {header}: {text!r} is not a positive number", param=header) from None
    return slo


class TokenEstimate:
    """Guesses a text prompt's token count from the prompts seen so far."""

    def __init__(self) -> None:
        self._chars_per_token = CHARS_PER_TOKEN

    def tokens(self, chars: int) -> int:
        """Return the expected length, at least 1."""
        return max(1, round(chars / self._chars_per_token))

    def observe(self, chars: int, tokens: int) -> None:
        """Learn from a prompt whose length became known."""
        if chars and tokens:
            self._chars_per_token += 0.2 * (chars / tokens - self._chars_per_token)

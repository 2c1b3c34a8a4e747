"""Request bodies of ``/v1/completions`` and ``/v1/chat/completions``.

Fields that are not here are kept (``model_extra``): ``parameters`` says which there are, and engines check
those that only they interpret. These are checked strictly: a wrong type is the client's error, never a silent
conversion.
"""

from __future__ import annotations

import codecs
import json
from typing import Annotated, Any, Literal, TypeVar, cast

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    ValidationError,
    model_validator,
)

from tidegate.core.errors import BadRequest

DEFAULT_COMPLETION_TOKENS = 16
"""``max_tokens`` of ``/v1/completions`` when absent (OpenAI)."""

MOST_LEVELS = 128
"""Depth of a body (ours). The JSON library reads deeper ones than it can write, and the gateway writes on."""
MOST_WRITTEN_LEVELS = 254
"""What the JSON library writes."""
MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MOST_CHOICES = 1024
"""Prompts times ``n`` of one body (ours): each is a request of its own for whoever schedules it."""
MOST_TOKENS = 2**21
MOST_MESSAGES = 2**14
"""Longer lists are refused before their items are looked at: no served context holds them."""
TokenIds = Annotated[
    list[Annotated[StrictInt, Field(ge=0)]], Field(fail_fast=True), Field(max_length=MOST_TOKENS)
]


def _whole(value: Any) -> Any:
    """Return the integer that a client wrote with a point, as vLLM takes it."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


Int = Annotated[StrictInt, BeforeValidator(_whole)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


def _form_of_prompt(value: Any) -> str:
    if not isinstance(value, list):
        return "one-text"
    first = value[0] if value else None
    return "many-texts" if isinstance(first, str) else "many-ids" if isinstance(first, list) else "one-ids"


Prompt = Annotated[TokenIds, Field(min_length=1)]
_Prompts = Annotated[
    Annotated[StrictStr, Tag("one-text")]
    | Annotated[Prompt, Tag("one-ids")]
    | Annotated[list[StrictStr], Field(max_length=MOST_CHOICES), Tag("many-texts")]
    | Annotated[list[Prompt], Field(max_length=MOST_CHOICES), Field(fail_fast=True), Tag("many-ids")],
    Discriminator(_form_of_prompt),
]


class RequestBody(BaseModel):
    """A JSON object in which null means "not sent", as OpenAI's clients write it."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class StreamOptions(RequestBody):
    """OpenAI ``stream_options``. Obfuscation pads events, and is not needed behind a gateway of one's own."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False
    continuous_usage_stats: StrictBool = False


class TicketParams(RequestBody):
    """When a request arrived and its first token is due, in seconds from the moment of sending, and the
    predicted seconds of its prefill; the prompt tokens to compute, and the mean prompt that is expected; and
    how many tokens of prompts a step may compute beside decodes meanwhile; the TPOT target, and of an answer
    that has begun when its first token went out; and its class, tenant and charge."""

    arrival_s: Annotated[Number, Field(le=0.0)]
    deadline_s: Number
    work_s: Annotated[Number, Field(ge=0.0)]
    tokens: Annotated[StrictInt, Field(ge=0)] = 0
    long_tokens: Annotated[Number, Field(ge=0.0)] = 0.0
    chunk_tokens: Annotated[StrictInt, Field(gt=0)] | None = None
    tpot_s: Annotated[Number, Field(gt=0.0)] | None = None
    first_token_s: Annotated[Number, Field(le=0.0)] | None = None
    priority: StrictInt = 0
    tenant: StrictStr = ""
    charge: Annotated[Number, Field(ge=0.0)] = 0.0


class FollowsParams(RequestBody):
    """A decode that runs on another engine, and where that engine's KV channel listens."""

    engine_id: StrictStr
    request_id: StrictStr
    host: StrictStr
    port: Annotated[StrictInt, Field(gt=0, lt=65536)]


class KvTransferParams(RequestBody):
    """vLLM's ``kv_transfer_params``: a KV handle, or the wish for one.

    ``do_remote_decode`` asks the engine to pin the KV and return a handle, whose ``remote_*`` fields say
    where KV can be pulled from. Ours: ``prompt_token_ids`` of a chat that continues from known ids,
    ``tidegate_generated``, how many of the prompt's last tokens are output of earlier legs;
    ``tidegate_ticket``, what the engine's order goes by; ``tidegate_movable`` where another engine may take
    the decode over, which then knows it by its ``request_id``; and in such a leg ``tidegate_follows``.
    """

    do_remote_decode: StrictBool = False
    do_remote_prefill: StrictBool = False
    remote_engine_id: StrictStr | None = None
    remote_request_id: StrictStr | None = None
    remote_host: StrictStr | None = None
    remote_port: Annotated[StrictInt, Field(gt=0, lt=65536)] | None = None
    remote_block_ids: list[list[StrictInt]] | None = None
    remote_num_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    prompt_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    tidegate_generated: Annotated[StrictInt, Field(ge=0)] = 0
    tidegate_ticket: TicketParams | None = None
    tidegate_movable: StrictBool = False
    tidegate_follows: FollowsParams | None = None


class _SamplingBody(RequestBody):
    """Fields that both endpoints share."""

    model: StrictStr | None = None
    max_tokens: Annotated[Int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[Number, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[Int, Field(ge=-1)] | None = None
    seed: Annotated[Int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=16)] | None = None
    stop_token_ids: TokenIds | None = None
    min_tokens: Annotated[Int, Field(ge=0)] | None = None
    ignore_eos: StrictBool = False
    n: Annotated[Int, Field(ge=1, le=MOST_CHOICES)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2.0, le=2.0)] | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None
    return_token_ids: StrictBool = False
    kv_transfer_params: KvTransferParams | None = None
    cache_salt: StrictStr | None = None
    priority: Int | None = None
    request_id: StrictStr | None = None
    vllm_xargs: dict[str, Any] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple; empty strings are dropped."""
        given = [self.stop] if isinstance(self.stop, str) else (self.stop or [])
        return tuple(s for s in given if s)


class CompletionBody(_SamplingBody):
    """Body of ``/v1/completions``: one prompt or several, each as text or token ids."""

    prompt: _Prompts
    logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[Int, Field(ge=1)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, of which a list holds several unless it is one of token ids."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return cast("list[str | list[int]]", self.prompt if several else [self.prompt])

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class ChatMessage(BaseModel):
    """One message. ``content`` may be text or OpenAI content parts of type ``text``."""

    model_config = ConfigDict(extra="allow")
    role: StrictStr
    content: StrictStr | list[dict[str, Any]] | None = None


class ChatBody(_SamplingBody):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES), Field(fail_fast=True)
    ]
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    service_tier: StrictStr | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None

    @property
    def token_limit(self) -> int | None:
        """``max_completion_tokens``, or its older name ``max_tokens``."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives to report beside each token; None for no logprobs. Raises BadRequest for
        ``top_logprobs`` without ``logprobs``."""
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise BadRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
        return None


Body = TypeVar("Body", bound=BaseModel)

# What a union accepts, in words; pydantic would speak of one branch only.
_UNIONS = {
    "prompt": "a string or a non-empty list of non-negative token ids, or a list of either",
    "stop": "a string or a list of at most 16 strings",
}
_NOT_TAKEN = ("none_required", "literal_error")
"""pydantic's errors of fields that are there to be refused."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """Decode a JSON object; a byte order mark says in which Unicode it is, else it is UTF-8.

    Raises BadRequest for text that is not valid, malformed JSON, another JSON type or one that is too deep.
    """
    try:
        value = orjson.loads(raw.decode(json.detect_encoding(raw)) if raw.startswith(MARKS) else raw)
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be a JSON object, not {type(value).__name__}")
    if raw.count(b"{") + raw.count(b"[") > MOST_LEVELS and _is_too_deep(value):
        raise BadRequest(f"the body is nested more than {MOST_LEVELS} levels deep")
    return value


def _is_too_deep(value: Any) -> bool:
    """Tell whether the JSON library cannot write it as far inside as leaves room for ``MOST_LEVELS``: that
    takes a tenth of the time of a walk."""
    for _ in range(MOST_WRITTEN_LEVELS - MOST_LEVELS):
        value = [value]
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        return True
    return False


def parse_body(value: dict[str, Any], kind: type[Body]) -> Body:
    """Check a decoded body. Raises BadRequest naming the first wrong field in ``param``."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        # For a union pydantic reports every branch; the field is the same, the first message will do.
        errors = error.errors(include_url=False, include_input=False)
        first = next((e for e in errors if e["type"] in _NOT_TAKEN), errors[0])
        field = _field_path(first["loc"])
        union = _UNIONS.get(str(first["loc"][0])) if first["type"] != "missing" else None
        message = "not supported" if first["type"] in _NOT_TAKEN else first["msg"]
        if union:
            field, message = str(first["loc"][0]), f"expected {union}"
        raise BadRequest(f"{field}: {message}", param=field) from None


def _field_path(loc: tuple[int | str, ...]) -> str:
    """Join a pydantic location, leaving out the names of union branches."""
    parts = [p for p in loc if isinstance(p, int) or p.isidentifier()]
    return ".".join(str(p) for p in parts if p not in ("str", "int", "bool", "float", "list")) or "body"

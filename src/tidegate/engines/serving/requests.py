"""From a checked body to a GenerateRequest: limits, unsupported fields and KV handles."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from math import inf

from tidegate.core.errors import BadRequest, PromptTooLong, UnknownModel
from tidegate.engines.seam import RunningLeg
from tidegate.engines.serving.types import GenerateRequest, KvSource, SamplingParams, ServingFacts
from tidegate.policies.order import Ticket
from tidegate.protocol.bodies import (
    DEFAULT_COMPLETION_TOKENS,
    ChatBody,
    ChatMessage,
    CompletionBody,
    KvTransferParams,
    TicketParams,
)
from tidegate.protocol.chunks import AnswerHead, Json
from tidegate.protocol.parameters import GUARDABLE, PARAMETERS, passed_on

MOST_ID_CHARS = 256
MOST_STOP_CHARS = 1024

_SERVED = (
    *("max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p", "top_k", "seed", "stop"),
    *("stop_token_ids", "ignore_eos", "logprobs", "top_logprobs"),
)
_HANDLE_FIELDS = [name for name in KvTransferParams.model_fields if name.startswith("remote_")]


@dataclass(frozen=True, slots=True)
class ServedCall:
    """One request to answer: what the engine gets, and how the client wants the answer. ``head.id`` is the id
    in answers; the engine's id adds a random part, so that clients may repeat theirs."""

    head: AnswerHead
    generate: GenerateRequest
    stream: bool
    client_id: str


def check_model(asked: str | None, facts: ServingFacts) -> None:
    """Raise UnknownModel unless ``asked`` is this instance's model or not given."""
    if asked is not None and asked != facts.model:
        raise UnknownModel(
            f"model: {asked!r} does not exist; this instance serves {facts.model!r}", param="model"
        )


def refuse_unsupported(body: CompletionBody | ChatBody) -> None:
    """Raise BadRequest naming the first field that is not known, or asks for what this engine cannot do."""
    if isinstance(body, CompletionBody) and len(body.prompts) > 1:
        raise BadRequest("prompt: this engine takes one; the gateway takes several", param="prompt")
    for name in ("n", "best_of"):
        if getattr(body, name, None) not in (None, 1):
            raise BadRequest(f"{name}: this engine takes 1; the gateway takes more", param=name)
    chat = isinstance(body, ChatBody)
    given = {name: getattr(body, name) for name in body.model_fields_set}
    for name, value in passed_on(given, chat=chat, allowed=GUARDABLE).items():
        if name not in _SERVED and not PARAMETERS[chat][name].asks_nothing(value):
            raise BadRequest(f"{name}: not supported by this engine", param=name)


def flat_messages(messages: list[ChatMessage]) -> list[Json]:
    """Return the messages with text parts joined, as templates for text models expect. Raises BadRequest for
    other parts."""
    flat = [message.model_dump(exclude_none=True) for message in messages]
    for message in flat:
        parts = message.get("content")
        if isinstance(parts, list):
            if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
                raise BadRequest("messages: only content parts of type text are supported", param="messages")
            message["content"] = "\n".join(part["text"] for part in parts)
    return flat


def build_call(
    body: CompletionBody | ChatBody, prompt: list[int], facts: ServingFacts, source: KvSource | None
) -> ServedCall:
    """Return the call for ``body`` whose prompt has these ids. Raises BadRequest or PromptTooLong."""
    chat = isinstance(body, ChatBody)
    field = "messages" if chat else "prompt"
    if not prompt:
        raise BadRequest(f"{field}: it has no tokens", param=field)
    if max(prompt) >= facts.vocab_size:
        raise BadRequest(
            f"{field}: token id {max(prompt)} is not in the vocabulary (0 to {facts.vocab_size - 1})",
            param=field,
        )
    kv = body.kv_transfer_params or KvTransferParams()
    if kv.tidegate_generated > len(prompt):
        raise _bad_kv("tidegate_generated", "larger than the prompt")
    client_id = body.request_id or uuid.uuid4().hex
    if len(client_id) > MOST_ID_CHARS or not client_id.isprintable():
        raise BadRequest(f"request_id: at most {MOST_ID_CHARS} characters, all printable", param="request_id")
    public_id = f"{'chatcmpl' if chat else 'cmpl'}-{client_id}"
    # A member names what it asks of later: a pin whose answer it never got, a decode that is to move.
    named = (kv.do_remote_decode or kv.tidegate_movable) and body.request_id is not None
    follows = kv.tidegate_follows
    if follows is not None and (source is not None or kv.do_remote_decode):
        raise _bad_kv("tidegate_follows", "a leg that follows a decode neither pins nor pulls")
    generate = GenerateRequest(
        id=client_id if named else f"{public_id}-{uuid.uuid4().hex[:8]}",
        prompt_token_ids=tuple(prompt),
        sampling=_sampling(body, len(prompt), kv.tidegate_generated, facts),
        generated=kv.tidegate_generated,
        salt=body.cache_salt or "",
        pin_kv=kv.do_remote_decode,
        source=source,
        ticket=_ticket(kv.tidegate_ticket),
        follows=None if follows is None else RunningLeg(**follows.model_dump()),
    )
    usage = body.stream_options is not None and body.stream_options.include_usage
    so_far = usage and body.stream_options is not None and body.stream_options.continuous_usage_stats
    head = AnswerHead(public_id, int(time.time()), facts.model, chat, body.return_token_ids, usage, so_far)
    return ServedCall(head, generate, body.stream, client_id)


def kv_source(params: KvTransferParams | None, facts: ServingFacts) -> KvSource | None:
    """Return where ``params`` say KV can be pulled from. Raises BadRequest for an incomplete handle."""
    if params is None or not (params.do_remote_decode or params.do_remote_prefill):
        return None
    given = [name for name in _HANDLE_FIELDS if getattr(params, name) is not None]
    if not given and not params.do_remote_prefill:
        return None
    for name in _HANDLE_FIELDS:
        if name not in given:
            raise _bad_kv(name, "missing; a KV handle has all remote_* fields or none")
    assert params.remote_port is not None and params.remote_num_tokens is not None
    if (params.model_extra or {}).get("tp_size") not in (None, 1):
        raise _bad_kv("tp_size", "this engine takes KV from instances with tp_size 1")
    groups = params.remote_block_ids or []
    blocks = groups[0] if len(groups) == 1 else []
    if len(groups) > 1 or min(blocks, default=0) < 0:
        raise _bad_kv("remote_block_ids", "expected one group of block ids")
    if len(blocks) != -(-params.remote_num_tokens // facts.block_tokens):
        raise _bad_kv(
            "remote_block_ids",
            f"{len(blocks)} blocks of {facts.block_tokens} tokens do not hold "
            f"exactly {params.remote_num_tokens} tokens",
        )
    return KvSource(
        engine_id=str(params.remote_engine_id),
        request_id=str(params.remote_request_id),
        host=str(params.remote_host),
        port=params.remote_port,
        block_ids=tuple(blocks),
        num_tokens=params.remote_num_tokens,
    )


def _ticket(params: TicketParams | None) -> Ticket | None:
    if params is None:
        return None
    if params.deadline_s < params.arrival_s:
        raise _bad_kv("tidegate_ticket.deadline_s", "before the arrival")
    own = params.arrival_s, params.deadline_s, params.work_s, params.tokens, params.long_tokens
    tpot_s = inf if params.tpot_s is None else params.tpot_s
    whose = params.priority, params.tenant, params.charge
    return Ticket(*own, params.chunk_tokens, tpot_s, params.first_token_s, *whose)


def _sampling(
    body: CompletionBody | ChatBody, prompt_tokens: int, generated: int, facts: ServingFacts
) -> SamplingParams:
    max_tokens = _max_tokens(body, prompt_tokens, facts)
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens + generated:
        raise BadRequest(f"min_tokens: {min_tokens} is more than max_tokens {max_tokens}", param="min_tokens")
    if any(len(stop) > MOST_STOP_CHARS for stop in body.stops):
        raise BadRequest(f"stop: a string is longer than {MOST_STOP_CHARS} characters", param="stop")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        seed=body.seed,
        stop=body.stops,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        min_tokens=min_tokens,
        logprobs=body.wanted_logprobs,
    )


def _max_tokens(body: CompletionBody | ChatBody, prompt_tokens: int, facts: ServingFacts) -> int:
    room = facts.max_model_len - prompt_tokens
    chat = isinstance(body, ChatBody)
    if room < 1:
        field = "messages" if chat else "prompt"
        raise PromptTooLong(
            f"{field}: {prompt_tokens} tokens leave no room in the model's context of "
            f"{facts.max_model_len} tokens",
            param=field,
        )
    asked = body.token_limit
    if asked is None:
        return room if chat else min(DEFAULT_COMPLETION_TOKENS, room)
    if asked > room:
        raise PromptTooLong(
            f"max_tokens: {asked} with a prompt of {prompt_tokens} tokens exceeds the model's "
            f"context of {facts.max_model_len} tokens",
            param="max_tokens",
        )
    return asked


def _bad_kv(name: str, why: str) -> BadRequest:
    field = f"kv_transfer_params.{name}"
    return BadRequest(f"{field}: {why}", param=field)

"""Engine outputs as OpenAI JSON: bodies, stream chunks, usage and KV handles."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import orjson

from tidegate.engines.serving.requests import Call
from tidegate.engines.serving.served import ServingFacts
from tidegate.engines.serving.types import Output, PinnedKv, RequestTimes, TokenLogprob
from tidegate.protocol.sse import event

Json = dict[str, Any]


@dataclass(slots=True)
class Collected:
    """Everything a finished request said."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None

    def add(self, output: Output) -> None:
        self.text += output.text
        self.token_ids.extend(output.token_ids)
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + output.logprobs


class Answer:
    """Writes the answer to one call, whole or as stream chunks."""

    def __init__(self, call: Call, facts: ServingFacts) -> None:
        self._call = call
        self._facts = facts
        self._head: Json = {
            "id": call.public_id,
            "object": _object_name(call),
            "created": int(time.time()),
            "model": facts.model,
        }
        self._generated = 0
        self._text_chars = 0
        self._opened = False

    def chunk(self, output: Output) -> bytes:
        """Return the event for ``output``; a chat's first one is preceded by its role event."""
        self._generated += len(output.token_ids)
        opening = self._opening() if not self._opened else b""
        choice = self._chat_choice(output) if self._call.chat else self._text_choice(output)
        choice["finish_reason"] = output.finish_reason
        choice["stop_reason"] = output.stop_reason
        if self._call.return_token_ids:
            choice["token_ids"] = output.token_ids
            if not self._opened and not self._call.chat:
                choice["prompt_token_ids"] = self._call.generate.prompt_token_ids
        self._opened = True
        payload = {**self._head, "choices": [choice]}
        if output.finish_reason is not None:
            self._add_final(payload, output)
        return opening + event(orjson.dumps(payload))

    def usage_chunk(self, times: RequestTimes | None) -> bytes:
        """Return the usage event that ``stream_options.include_usage`` asks for, or nothing."""
        if not self._call.include_usage:
            return b""
        return event(orjson.dumps({**self._head, "choices": [], "usage": self._usage(times)}))

    def body(self, said: Collected, last: Output) -> bytes:
        """Return the whole answer; ``last`` is the output that finished the request."""
        call = self._call
        self._generated = len(said.token_ids)
        choice: Json = {"index": 0}
        if call.chat:
            choice["message"] = {"role": "assistant", "content": said.text}
            choice["logprobs"] = None if said.logprobs is None else chat_logprobs(said.logprobs)
        else:
            choice["text"] = said.text
            choice["logprobs"] = None if said.logprobs is None else text_logprobs(said.logprobs, 0)
        choice["finish_reason"] = last.finish_reason
        choice["stop_reason"] = last.stop_reason
        payload = {**self._head, "choices": [choice], "usage": self._usage(last.times)}
        if call.return_token_ids:
            choice["token_ids"] = said.token_ids
            (payload if call.chat else choice)["prompt_token_ids"] = call.generate.prompt_token_ids
        self._add_final(payload, last)
        return orjson.dumps(payload)

    def _opening(self) -> bytes:
        """Return the event that names the role and carries the prompt's ids; completions have none."""
        if not self._call.chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        payload: Json = {
            **self._head,
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}],
        }
        if self._call.return_token_ids:
            payload["prompt_token_ids"] = self._call.generate.prompt_token_ids
        return event(orjson.dumps(payload))

    def _text_choice(self, output: Output) -> Json:
        logprobs = None
        if output.logprobs is not None:
            logprobs = text_logprobs(output.logprobs, self._text_chars)
            self._text_chars += sum(len(entry.text) for entry in output.logprobs)
        return {"index": 0, "text": output.text, "logprobs": logprobs}

    def _chat_choice(self, output: Output) -> Json:
        logprobs = None if output.logprobs is None else chat_logprobs(output.logprobs)
        return {"index": 0, "delta": {"content": output.text}, "logprobs": logprobs}

    def _add_final(self, payload: Json, last: Output) -> None:
        payload["kv_transfer_params"] = None if last.pinned is None else handle(last.pinned, self._facts)
        payload["metrics"] = None if last.times is None else times_object(last.times, self._facts)

    def _usage(self, times: RequestTimes | None) -> Json:
        prompt_tokens = len(self._call.generate.prompt_token_ids)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._generated,
            "total_tokens": prompt_tokens + self._generated,
            "prompt_tokens_details": {
                "cached_tokens": 0 if times is None else times.cached_tokens + times.kv_loaded_tokens
            },
        }


def handle(pinned: PinnedKv, facts: ServingFacts) -> Json:
    """Return the ``kv_transfer_params`` with which a peer pulls ``pinned``."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": facts.engine_id,
        "remote_request_id": pinned.request_id,
        "remote_host": facts.kv_host,
        "remote_port": facts.kv_port,
        "remote_block_ids": [list(pinned.block_ids)],
        "remote_num_tokens": pinned.num_tokens,
        "tp_size": 1,
        "transfer_mode": "pull",
    }


def times_object(times: RequestTimes, facts: ServingFacts) -> Json:
    """Return the ``metrics`` object: where the request's time went, in milliseconds."""
    return {
        "queue_time_ms": times.queue_s * 1e3,
        "kv_load_time_ms": times.kv_load_s * 1e3,
        "prefill_time_ms": times.prefill_s * 1e3,
        "decode_time_ms": times.decode_s * 1e3,
        "kv_loaded_tokens": times.kv_loaded_tokens,
        "kv_loaded_bytes": times.kv_loaded_tokens * facts.kv_bytes_per_token,
        "cached_tokens": times.cached_tokens,
        "preemptions": times.preemptions,
    }


def text_logprobs(entries: list[TokenLogprob], offset: int) -> Json:
    """Return the completions form; ``offset`` is the number of characters before the first entry."""
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.text)
    return {
        "text_offset": offsets,
        "token_logprobs": [entry.logprob for entry in entries],
        "tokens": [entry.text for entry in entries],
        "top_logprobs": [
            {entry.text: entry.logprob, **{text: logprob for _, text, logprob in entry.top}}
            for entry in entries
        ],
    }


def chat_logprobs(entries: list[TokenLogprob]) -> Json:
    """Return the chat form."""
    return {
        "content": [
            {
                **_token_logprob(entry.text, entry.logprob),
                "top_logprobs": [_token_logprob(text, logprob) for _, text, logprob in entry.top],
            }
            for entry in entries
        ]
    }


def _token_logprob(text: str, logprob: float) -> Json:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _object_name(call: Call) -> str:
    if not call.chat:
        return "text_completion"
    return "chat.completion.chunk" if call.stream else "chat.completion"

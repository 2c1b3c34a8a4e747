"""Engine outputs as pieces of OpenAI answers, with vLLM's KV handles and times beside them."""

from __future__ import annotations

import time

from tidegate.engines.serving.requests import ServedCall
from tidegate.engines.serving.served import ServingFacts
from tidegate.engines.serving.types import Output, PinnedKv, RequestTimes, TokenLogprob
from tidegate.protocol.chunks import AnswerHead, Json, Tokens, usage_object


class EngineAnswer:
    """Puts the outputs for one call into the form of its endpoint."""

    def __init__(self, call: ServedCall, facts: ServingFacts) -> None:
        self.head = AnswerHead(
            call.public_id,
            int(time.time()),
            facts.model,
            call.chat,
            call.return_token_ids,
            call.include_usage,
        )
        self.prompt_ids = list(call.generate.prompt_token_ids)
        self._facts = facts

    def tokens(self, output: Output) -> Tokens:
        """Return an output's tokens."""
        logprobs = None
        if output.logprobs is not None:
            logprobs = (chat_logprobs if self.head.chat else text_logprobs)(output.logprobs)
        return Tokens(
            output.text,
            output.token_ids,
            logprobs,
            output.finish_reason,
            output.stop_reason,
            self.prompt_ids,
        )

    def ending(self, last: Output) -> Json:
        """Return what stands beside the choices of the last chunk, or of the whole answer."""
        return {
            "kv_transfer_params": None if last.pinned is None else handle(last.pinned, self._facts),
            "metrics": None if last.times is None else times_object(last.times, self._facts),
        }

    def usage(self, generated: int, last: Output) -> Json:
        """Return the usage of an answer of ``generated`` tokens; pulled tokens count as cached ones."""
        times = last.times
        cached = 0 if times is None else times.cached_tokens + times.kv_loaded_tokens
        return usage_object(len(self.prompt_ids), generated, cached)


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


def text_logprobs(entries: list[TokenLogprob]) -> Json:
    """Return the completions form, without offsets."""
    return {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
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

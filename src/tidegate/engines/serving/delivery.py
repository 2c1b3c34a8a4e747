"""Engine outputs on their way from the compute thread to the clients that wait on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from msgspec.structs import asdict

from tidegate.core.errors import ClientGone, InternalError
from tidegate.engines.serving.metrics import ServerMetrics
from tidegate.engines.serving.requests import ServedCall
from tidegate.engines.serving.types import Output, ServingFacts, TokenLogprob
from tidegate.protocol.chunks import ChunkWriter, Json, Tokens, WholeAnswer, usage_object
from tidegate.protocol.client_stream import ClientStream

log = logging.getLogger(__name__)


class OutputRouter:
    """Hands each output to its request's receiver. One loop callback per engine step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._receivers: dict[str, Callable[[Output], None]] = {}

    def __len__(self) -> int:
        return len(self._receivers)

    def sink(self, outputs: list[Output]) -> None:
        """The engine's OutputSink; called on the compute thread."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
            self._loop.call_soon_threadsafe(self.deliver, outputs)

    def deliver(self, outputs: list[Output]) -> None:
        """Hand on the outputs. On the event loop: the sink of an engine that runs there."""
        receivers = self._receivers
        for output in outputs:
            receiver = receivers.get(output.request_id)
            if receiver is None:
                continue
            try:
                receiver(output)
            except Exception:
                log.exception("delivering an output of %s failed", output.request_id)

    @contextlib.contextmanager
    def receiving(self, request_id: str, receiver: Callable[[Output], None]) -> Iterator[None]:
        """Deliver the request's outputs to ``receiver`` inside the block; later ones are dropped."""
        self._receivers[request_id] = receiver
        try:
            yield
        finally:
            del self._receivers[request_id]


class Delivery:
    """Takes the outputs of one call: sends them to ``client`` as they arrive, or collects a whole answer.
    ``finished`` resolves with the last output to the bytes that are still to be sent (the last events, or the
    whole body), or fails with the engine's error or with ClientGone."""

    def __init__(
        self,
        call: ServedCall,
        facts: ServingFacts,
        metrics: ServerMetrics,
        arrived_s: float,
        client: ClientStream | None = None,
    ) -> None:
        self.finished: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        # A cancelled handler never asks for the exception.
        self.finished.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._chat = call.head.chat
        self._client = client
        self._writer = ChunkWriter(call.head)
        self._whole = WholeAnswer(call.head)
        self._generated = 0
        self._prompt_ids = list(call.generate.prompt_token_ids)
        self._facts = facts
        self._metrics = metrics
        self._arrived_s = arrived_s
        self._last_token_s: float | None = None

    def receive(self, output: Output) -> None:
        """Take the next output."""
        self._measure(output, time.monotonic())
        if self.finished.done():
            return
        if output.finish_reason == "error":
            self.finished.set_exception(InternalError(output.error or "the engine failed the request"))
            return
        try:
            left = self._collect(output) if self._client is None else self._stream(output, self._client)
        except ClientGone as error:
            self.finished.set_exception(error)
            return
        if output.finish_reason is not None:
            self.finished.set_result(left)

    def _collect(self, output: Output) -> bytes:
        """Keep an output; return the whole body after the last one."""
        whole = self._whole
        whole.tokens(self._tokens(output))
        if output.finish_reason is None:
            return b""
        usage = self._usage(len(whole.token_ids), output)
        return whole.body(usage, self._prompt_ids, self._beside_choices(output))

    def _stream(self, output: Output, client: ClientStream) -> bytes:
        """Send an output; return the last events instead of sending them."""
        writer = self._writer
        begun = self._generated > 0
        self._generated += len(output.token_ids)
        if output.finish_reason is not None:
            chunk = writer.piece(self._tokens(output), self._beside_choices(output))
            return chunk + writer.end(self._usage(self._generated, output))
        beside = _private(output)
        if begun and output.logprobs is None and beside is None:
            client.send(writer.plain(output.text, output.token_ids))
        else:
            client.send(writer.piece(self._tokens(output), beside))
        return b""

    def _measure(self, output: Output, now_s: float) -> None:
        metrics = self._metrics
        if output.token_ids:
            if self._last_token_s is None:
                metrics.first_token.observe(now_s - self._arrived_s)
            else:
                metrics.next_token.observe(now_s - self._last_token_s)
            self._last_token_s = now_s
        if output.finish_reason is not None:
            metrics.request.observe(now_s - self._arrived_s)
            metrics.finished(output.finish_reason, output.times)

    def _tokens(self, output: Output) -> Tokens:
        logprobs = None
        if output.logprobs is not None:
            logprobs = (_chat_logprobs if self._chat else _text_logprobs)(output.logprobs)
        return Tokens(
            output.text,
            output.token_ids,
            logprobs,
            output.finish_reason,
            output.stop_reason,
            self._prompt_ids,
        )

    def _usage(self, generated: int, last: Output) -> Json:
        """Return the usage of an answer of ``generated`` tokens; pulled tokens count as cached ones."""
        times = last.times
        cached = 0 if times is None else times.cached_tokens + times.kv_loaded_tokens
        return usage_object(len(self._prompt_ids), generated, cached)

    def _beside_choices(self, last: Output) -> Json:
        """Return what the end of an answer has beside its choices: the KV handle and where the time went."""
        facts, pinned, times = self._facts, last.pinned, last.times
        return {
            **(_private(last) or {}),
            "kv_transfer_params": pinned
            and {
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
            },
            "metrics": times
            and {
                "queue_time_ms": times.queue_s * 1e3,
                "kv_load_time_ms": times.kv_load_s * 1e3,
                "prefill_time_ms": times.prefill_s * 1e3,
                "decode_time_ms": times.decode_s * 1e3,
                "kv_loaded_tokens": times.kv_loaded_tokens,
                "kv_loaded_bytes": times.kv_loaded_tokens * facts.kv_bytes_per_token,
                "cached_tokens": times.cached_tokens,
                "preemptions": times.preemptions,
            },
        }


def _private(output: Output) -> Json | None:
    """Return what an event has beside its choices for members of the launch: a predicted length, and in the
    first piece of a leg that took a decode over how it came."""
    said: Json = {}
    if output.remaining_tokens is not None:
        said.update(remaining_tokens=output.remaining_tokens, at_token=output.at_token)
    if output.moved is not None:
        said["tidegate_moved"] = asdict(output.moved)
    return said or None


def _text_logprobs(entries: list[TokenLogprob]) -> Json:
    """Return the completions form, without offsets."""
    return {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [
            {entry.text: entry.logprob, **{other.text: other.logprob for other in entry.top}}
            for entry in entries
        ],
    }


def _chat_logprobs(entries: list[TokenLogprob]) -> Json:
    return {
        "content": [
            _token_logprob(entry) | {"top_logprobs": [_token_logprob(other) for other in entry.top]}
            for entry in entries
        ]
    }


def _token_logprob(entry: TokenLogprob) -> Json:
    return {"token": entry.text, "logprob": entry.logprob, "bytes": list(entry.spelt)}

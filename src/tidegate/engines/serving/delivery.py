"""Engine outputs on their way from the compute thread to the requests that wait on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from tidegate.core.errors import ClientGone, InternalError
from tidegate.engines.serving.answers import EngineAnswer
from tidegate.engines.serving.metrics import RequestMeter
from tidegate.engines.serving.types import Output
from tidegate.protocol.chunks import ChunkWriter, WholeAnswer
from tidegate.protocol.client_stream import ClientStream

log = logging.getLogger(__name__)

Receiver = Callable[[Output], None]


class OutputRouter:
    """Hands each output to its request's receiver. One loop callback per engine step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._receivers: dict[str, Receiver] = {}

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
    def receiving(self, request_id: str, receiver: Receiver) -> Iterator[None]:
        """Deliver the request's outputs to ``receiver`` inside the block; later ones are dropped."""
        self._receivers[request_id] = receiver
        try:
            yield
        finally:
            del self._receivers[request_id]


class Delivery:
    """Takes the outputs for one call. ``finished`` resolves to what is left to be sent when the last one has
    come, or fails with the engine's error or with ClientGone."""

    def __init__(self, answer: EngineAnswer, meter: RequestMeter) -> None:
        self.finished: asyncio.Future[bytes] = _future()
        self._answer = answer
        self._meter = meter

    def receive(self, output: Output) -> None:
        """Take the next output."""
        self._meter.observe(output, time.monotonic())
        if self.finished.done():
            return
        if output.finish_reason == "error":
            self.finished.set_exception(InternalError(output.error or "the engine failed the request"))
            return
        try:
            left = self._take(output)
        except ClientGone as error:
            self.finished.set_exception(error)
            return
        if output.finish_reason is not None:
            self.finished.set_result(left)

    def _take(self, output: Output) -> bytes:
        """Handle an output; return what is left to be sent, should it be the last one."""
        raise NotImplementedError


class WholeDelivery(Delivery):
    """Collects the outputs; what is left to be sent is the whole body."""

    def __init__(self, answer: EngineAnswer, meter: RequestMeter) -> None:
        super().__init__(answer, meter)
        self._whole = WholeAnswer(answer.head)

    def _take(self, output: Output) -> bytes:
        answer, whole = self._answer, self._whole
        whole.tokens(answer.tokens(output))
        if output.finish_reason is None:
            return b""
        usage = answer.usage(len(whole.token_ids), output)
        return whole.body(usage, answer.prompt_ids, answer.ending(output))


class StreamDelivery(Delivery):
    """Sends the outputs to the client as they arrive, without waking a task per chunk; the last events are
    left to be sent."""

    def __init__(self, answer: EngineAnswer, meter: RequestMeter, client: ClientStream) -> None:
        super().__init__(answer, meter)
        self._writer = ChunkWriter(answer.head)
        self._client = client
        self._generated = 0

    def _take(self, output: Output) -> bytes:
        answer, writer = self._answer, self._writer
        begun = self._generated > 0
        self._generated += len(output.token_ids)
        if output.finish_reason is not None:
            chunk = writer.piece(answer.tokens(output), answer.ending(output))
            return chunk + writer.end(answer.usage(self._generated, output))
        if begun and output.logprobs is None:
            self._client.send(writer.plain(output.text, output.token_ids))
        else:
            self._client.send(writer.piece(answer.tokens(output)))
        return b""


def _future() -> asyncio.Future[Any]:
    """Return a future whose exception may go unseen: a cancelled handler has nobody to tell."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future

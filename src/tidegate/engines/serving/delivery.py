"""Engine outputs on their way from the compute thread to the requests that wait on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import orjson

from tidegate.core.errors import InternalError
from tidegate.engines.serving.answers import Answer, Collected
from tidegate.engines.serving.metrics import RequestMeter
from tidegate.engines.serving.types import Output
from tidegate.protocol.errors import error_object
from tidegate.protocol.sse import DONE, event

log = logging.getLogger(__name__)

MOST_UNREAD_BYTES = 4 << 20

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


class WholeAnswer:
    """Collects a request's outputs. ``finished`` resolves to its last one."""

    def __init__(self, meter: RequestMeter) -> None:
        self.said = Collected()
        self.finished: asyncio.Future[Output] = _future()
        self._meter = meter

    def receive(self, output: Output) -> None:
        self._meter.observe(output, time.monotonic())
        self.said.add(output)
        if output.finish_reason is None or self.finished.done():
            return
        if output.finish_reason == "error":
            self.finished.set_exception(InternalError(output.error or "the engine failed the request"))
        else:
            self.finished.set_result(output)


class StreamedAnswer:
    """Writes a request's outputs to its connection as they arrive, without waking a task per chunk.

    ``started`` resolves with the first output, before anything is sent, so that an early failure
    can still be a plain error answer. From ``attach`` on every output goes straight to the
    transport. ``finished`` resolves once the last event is written, or fails with
    ConnectionResetError when the client is gone or does not read.
    """

    def __init__(self, answer: Answer, meter: RequestMeter) -> None:
        self.started: asyncio.Future[None] = _future()
        self.finished: asyncio.Future[None] = _future()
        self._answer = answer
        self._meter = meter
        self._early: list[Output] = []
        self._transport: asyncio.WriteTransport | None = None
        self._chunked = True

    def receive(self, output: Output) -> None:
        self._meter.observe(output, time.monotonic())
        if self._transport is not None:
            self._send(output)
            return
        if output.finish_reason == "error" and not self._early:
            if not self.started.done():
                self.started.set_exception(InternalError(output.error or "the engine failed the request"))
            return
        self._early.append(output)
        if not self.started.done():
            self.started.set_result(None)

    def attach(self, transport: asyncio.WriteTransport, *, chunked: bool) -> None:
        """Send what has arrived and everything after it to ``transport``; the headers are sent."""
        self._transport = transport
        self._chunked = chunked
        early, self._early = self._early, []
        for output in early:
            self._send(output)

    def _send(self, output: Output) -> None:
        if self.finished.done() or self._transport is None:
            return
        if self._transport.is_closing():
            self.finished.set_exception(ConnectionResetError("the client is gone"))
            return
        data = self._encode(output)
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._transport.write(data)
        if output.finish_reason is not None:
            self.finished.set_result(None)
        elif self._transport.get_write_buffer_size() > MOST_UNREAD_BYTES:
            self.finished.set_exception(ConnectionResetError("the client does not read its stream"))

    def _encode(self, output: Output) -> bytes:
        if output.finish_reason is None:
            return self._answer.chunk(output)
        if output.finish_reason == "error":
            error = InternalError(output.error or "the engine failed the request")
            return _error_event(error) + DONE
        return self._answer.chunk(output) + self._answer.usage_chunk(output.times) + DONE


def _error_event(error: InternalError) -> bytes:
    return event(orjson.dumps(error_object(error)))


def _future() -> asyncio.Future[Any]:
    """Return a future whose exception may go unseen: a cancelled handler has nobody to tell."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future

"""A fake engine over real HTTP: vLLM's dialect, no model, tokens that depend on prompt and position only.

``python -m tidegate_testing.fake_engine --port 9001 --step-ms 10`` serves one; the first line on
stdout is ``{"event": "ready", "port": ...}``. It is written for speed, so that a benchmark in front
of it measures what stands in between.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import httptools
import orjson
import typer
import uvloop

from tidegate.core.errors import TidegateError
from tidegate.protocol.bodies import parse_object
from tidegate.protocol.chunks import (
    AnswerHead,
    ChunkWriter,
    Json,
    Tokens,
    WholeAnswer,
    http_chunk,
    usage_object,
)

VOCAB = 500
MODEL = "fake"
END_OF_BODY = b"0\r\n\r\n"


def token_at(prompt: list[int], position: int) -> int:
    """Return output token ``position`` of ``prompt``: what every leg and replay must agree on."""
    return (sum(prompt) * 31 + len(prompt) * 17 + position * position * 7 + position) % VOCAB


def text_of(token: int) -> str:
    """Return a token's text."""
    return f" t{token}"


@dataclass(slots=True)
class _FakeStream:
    transport: asyncio.Transport
    writer: ChunkWriter
    prompt: list[int]
    prompt_ids: list[int]
    position: int
    left: int
    chat: bool
    logprobs: bool
    begun: bool = False


class FakeEngine:
    """One instance. ``step_s`` is the time between two tokens of every stream, 0 for as fast as it can.

    For tests: ``bodies`` records requests when ``keep_bodies``; ``fail_with`` answers every one with
    (status, message); while ``hold_prefill`` is set, prefills are never answered; ``metrics`` makes
    what ``/metrics`` answers; ``remaining``, asked with every streamed token how many an answer has, predicts
    how many are left, or nothing (None).
    """

    def __init__(self, engine_id: str = "fake", step_s: float = 0.0) -> None:
        self.engine_id = engine_id
        self.step_s = step_s
        self.port = 0
        self.streams: dict[asyncio.Transport, _FakeStream] = {}
        self.connections: set[asyncio.Transport] = set()
        self.pinned: set[str] = set()
        self.released: list[str] = []
        self.fail_with: tuple[int, str] | None = None
        self.hold_prefill = False
        self.held: list[asyncio.Transport] = []
        self.metrics: Callable[[], str] = str
        self.remaining: Callable[[int], float | None] = lambda generated: None
        self.bodies: list[Json] = []
        self.keep_bodies = False
        self._server: asyncio.Server | None = None
        self._stepping: asyncio.TimerHandle | asyncio.Handle | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen and return the base URL."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Serving(self), host, port, backlog=4096)
        self.port = self._server.sockets[0].getsockname()[1]
        return f"http://{host}:{self.port}"

    async def stop(self) -> None:
        """Close the port and break every connection, as a killed process would."""
        if self._server is not None:
            self._server.close()
        for transport in list(self.connections):
            transport.abort()
        if self._stepping is not None:
            self._stepping.cancel()
            self._stepping = None

    def step_soon(self) -> None:
        """Schedule the next token of all streams."""
        if self._stepping is None:
            loop = asyncio.get_running_loop()
            self._stepping = (
                loop.call_later(self.step_s, self._step) if self.step_s else loop.call_soon(self._step)
            )

    def step_now(self) -> None:
        """Give every stream its next token, whatever ``step_s`` is."""
        if self._stepping is not None:
            self._stepping.cancel()
        self._step()

    def _step(self) -> None:
        self._stepping = None
        for stream in list(self.streams.values()):
            token = token_at(stream.prompt, stream.position)
            stream.position += 1
            stream.left -= 1
            left = self.remaining(stream.position)
            if stream.begun and not stream.logprobs and stream.left > 0 and left is None:
                stream.transport.write(http_chunk(stream.writer.plain(text_of(token), [token])))
                continue
            stream.begun = True
            piece = _piece(token, chat=stream.chat, logprobs=stream.logprobs, last=stream.left <= 0)
            piece.prompt_token_ids = stream.prompt_ids
            told = None if left is None else {"remaining_tokens": left, "at_token": stream.position}
            data = stream.writer.piece(piece, told)
            if stream.left <= 0:
                self.streams.pop(stream.transport, None)
                data += stream.writer.end(usage_object(len(stream.prompt), stream.position, 0))
            stream.transport.write(http_chunk(data) + (b"" if stream.left > 0 else END_OF_BODY))
        if self.streams:
            self.step_soon()

    def answer(self, transport: asyncio.Transport, path: str, raw: bytes) -> None:
        """Answer one request."""
        if path == "/v1/models":
            model = {"id": MODEL, "object": "model", "max_model_len": 1 << 20}
            _send(transport, {"object": "list", "data": [model]})
        elif path == "/tidegate/release":
            request_id = str(orjson.loads(raw)["request_id"])
            self.pinned.discard(request_id)
            self.released.append(request_id)
            _send(transport, {"released": True})
        elif path in ("/v1/completions", "/v1/chat/completions"):
            try:
                self._complete(transport, parse_object(raw), chat="chat" in path)
            except TidegateError as error:
                _send(transport, {"error": {"message": error.message, "param": error.param}}, status=400)
        elif path == "/tokenize":
            prompt = orjson.loads(raw).get("prompt")
            answer = {"tokens": list(prompt.encode())} if prompt else {"error": {"message": "no prompt"}}
            _send(transport, answer, 200 if prompt else 400)
        elif path == "/metrics":
            _send(transport, self.metrics().encode())
        else:
            _send(transport, {"status": "ok"})

    def _complete(self, transport: asyncio.Transport, body: Json, *, chat: bool) -> None:
        if self.keep_bodies:
            self.bodies.append(body)
        if self.fail_with is not None:
            status, message = self.fail_with
            _send(transport, {"error": {"message": message, "param": None}}, status=status)
            return
        kv = body.get("kv_transfer_params") or {}
        prompt: list[int] | str = body.get("prompt", "")
        if chat:
            prompt = kv.get("prompt_token_ids", "".join(m["content"] for m in body["messages"]))
        ids = prompt if isinstance(prompt, list) else list(prompt.encode())
        logprobs = body.get("logprobs") not in (None, False)
        generated = kv.get("tidegate_generated", 0)
        origin = ids[: len(ids) - generated]
        request_id = str(body.get("request_id", "r"))
        usage = bool((body.get("stream_options") or {}).get("include_usage"))
        head = AnswerHead(request_id, 0, MODEL, chat, return_token_ids=True, include_usage=usage)
        if body.get("stream"):
            transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            left = int(body.get("max_tokens", 16))
            self.streams[transport] = _FakeStream(
                transport, ChunkWriter(head), origin, ids, generated, left, chat, logprobs
            )
            self.step_soon()
            return
        if self.hold_prefill:
            self.held.append(transport)
            return
        handle: Json = {}
        if kv.get("do_remote_decode"):
            self.pinned.add(request_id)
            handle["kv_transfer_params"] = {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_engine_id": self.engine_id,
                "remote_request_id": request_id,
                "remote_block_ids": [[0]],
                "remote_num_tokens": len(ids),
            }
        whole = WholeAnswer(head)
        whole.tokens(_piece(token_at(origin, generated), chat=chat, logprobs=logprobs, last=True))
        _send(transport, whole.body(usage_object(len(ids), 1, 0), ids, handle))


def _piece(token: int, *, chat: bool, logprobs: bool, last: bool) -> Tokens:
    """Return a token as a piece."""
    text = text_of(token)
    said: Json | None = None
    if logprobs and chat:
        row = {"token": text, "logprob": -1.0, "bytes": list(text.encode()), "top_logprobs": []}
        said = {"content": [row]}
    elif logprobs:
        said = {"tokens": [text], "token_logprobs": [-1.0], "top_logprobs": [{}]}
    return Tokens(text, [token], said, "length" if last else None)


class _Serving(asyncio.Protocol):
    """One connection."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._path = ""
        self._parts: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._engine.connections.add(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._engine.connections.discard(self._transport)
            self._engine.streams.pop(self._transport, None)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._path = url.decode()

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        raw = b"".join(self._parts)
        self._parts = []
        assert self._transport is not None
        self._engine.answer(self._transport, self._path, raw)


def _send(transport: asyncio.Transport, answer: Json | bytes, status: int = 200) -> None:
    body = answer if isinstance(answer, bytes) else orjson.dumps(answer)
    transport.write(b"HTTP/1.1 %d OK\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))


async def _serve(port: int, engine_id: str, step_s: float) -> None:
    engine = FakeEngine(engine_id, step_s)
    await engine.start(port=port)
    sys.stdout.write(f'{{"event":"ready","port":{engine.port}}}\n')
    sys.stdout.flush()
    await asyncio.Event().wait()


def main(port: int = 0, engine_id: str = "fake", step_ms: float = 0.0) -> None:
    """Run one fake engine until killed."""
    uvloop.run(_serve(port, engine_id, step_ms / 1000.0))


if __name__ == "__main__":
    typer.run(main)

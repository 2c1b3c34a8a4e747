"""A fake engine over real HTTP: vLLM's dialect, no model, tokens that depend on prompt and position only.

``python -m tidegate.testing.fake_engine --port 9001 --step-ms 10`` serves one; the first line on
stdout is ``{"event": "ready", "port": ...}``. It is written for speed, so that a benchmark in front
of it measures what stands in between.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import httptools
import orjson

from tidegate.core.errors import TidegateError
from tidegate.protocol.bodies import parse_object

Json = dict[str, Any]
VOCAB = 500
MODEL = "fake"


def token_at(prompt: list[int], position: int) -> int:
    """Return output token ``position`` of ``prompt``: what every leg and replay must agree on."""
    return (sum(prompt) * 31 + len(prompt) * 17 + position * position * 7 + position) % VOCAB


def text_of(token: int) -> str:
    """Return a token's text."""
    return f" t{token}"


@dataclass(slots=True)
class _Stream:
    transport: asyncio.Transport
    prompt: list[int]
    position: int
    left: int
    request_id: str
    chat: bool
    logprobs: bool
    untold: list[int] | None


class FakeEngine:
    """One instance. ``step_s`` is the time between two tokens of every stream, 0 for as fast as it can.

    For tests: ``bodies`` records requests when ``keep_bodies``; ``fail_with`` answers every one with
    (status, message); while ``hold_prefill`` is set, prefills are never answered; ``metrics`` makes
    what ``/metrics`` answers.
    """

    def __init__(self, engine_id: str = "fake", step_s: float = 0.0) -> None:
        self.engine_id = engine_id
        self.step_s = step_s
        self.port = 0
        self.streams: dict[asyncio.Transport, _Stream] = {}
        self.connections: set[asyncio.Transport] = set()
        self.pinned: set[str] = set()
        self.released: list[str] = []
        self.fail_with: tuple[int, str] | None = None
        self.hold_prefill = False
        self.held: list[asyncio.Transport] = []
        self.metrics: Callable[[], str] = str
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

    def step_soon(self) -> None:
        """Schedule the next token of all streams."""
        if self._stepping is None:
            loop = asyncio.get_running_loop()
            self._stepping = (
                loop.call_later(self.step_s, self._step) if self.step_s else loop.call_soon(self._step)
            )

    def _step(self) -> None:
        self._stepping = None
        for stream in list(self.streams.values()):
            token = token_at(stream.prompt, stream.position)
            stream.position += 1
            stream.left -= 1
            last = stream.left <= 0
            choice = _choice(
                token, "delta" if stream.chat else None, "length" if last else None, stream.logprobs
            )
            if stream.untold is not None:
                choice["prompt_token_ids"], stream.untold = stream.untold, None
            _send_event(
                stream.transport, {"id": stream.request_id, "object": "text_completion", "choices": [choice]}
            )
            if last:
                self.streams.pop(stream.transport, None)
                usage = {"prompt_tokens": len(stream.prompt), "completion_tokens": stream.position}
                _send_event(stream.transport, {"id": stream.request_id, "choices": [], "usage": usage})
                stream.transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        if self.streams:
            self.step_soon()

    def answer(self, transport: asyncio.Transport, path: str, raw: bytes) -> None:
        """Answer one request."""
        if path == "/v1/models":
            model = {"id": MODEL, "object": "model", "max_model_len": 1 << 20}
            _send_json(transport, {"object": "list", "data": [model]})
        elif path == "/tidegate/release":
            request_id = str(orjson.loads(raw)["request_id"])
            self.pinned.discard(request_id)
            self.released.append(request_id)
            _send_json(transport, {"released": True})
        elif path in ("/v1/completions", "/v1/chat/completions"):
            try:
                self._complete(transport, parse_object(raw), chat="chat" in path)
            except TidegateError as error:
                _send_json(transport, {"error": {"message": error.message, "param": error.param}}, status=400)
        elif path == "/metrics":
            page = self.metrics().encode()
            transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(page), page))
        else:
            _send_json(transport, {"status": "ok"})

    def _complete(self, transport: asyncio.Transport, body: Json, *, chat: bool) -> None:
        if self.keep_bodies:
            self.bodies.append(body)
        if self.fail_with is not None:
            status, message = self.fail_with
            _send_json(transport, {"error": {"message": message, "param": None}}, status=status)
            return
        kv = body.get("kv_transfer_params") or {}
        if chat:
            text = "".join(m["content"] for m in body["messages"])
            prompt = kv.get("prompt_token_ids", text)
        else:
            prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else list(prompt.encode())
        logprobs = body.get("logprobs") not in (None, False)
        generated = kv.get("tidegate_generated", 0)
        origin = ids[: len(ids) - generated]
        request_id = str(body.get("request_id", "r"))
        if body.get("stream"):
            transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            left = int(body.get("max_tokens", 16))
            self.streams[transport] = _Stream(
                transport, origin, generated, left, request_id, chat, logprobs, ids
            )
            self.step_soon()
            return
        if self.hold_prefill:
            self.held.append(transport)
            return
        token = token_at(origin, generated)
        choice = _choice(token, "message" if chat else None, "length", logprobs)
        answer: Json = {
            "id": request_id,
            "object": "text_completion",
            "choices": [choice],
            "prompt_token_ids": ids,
            "usage": {"prompt_tokens": len(ids), "completion_tokens": 1},
        }
        if kv.get("do_remote_decode"):
            self.pinned.add(request_id)
            answer["kv_transfer_params"] = {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_engine_id": self.engine_id,
                "remote_request_id": request_id,
                "remote_block_ids": [[0]],
                "remote_num_tokens": len(ids),
            }
        _send_json(transport, answer)


def _choice(token: int, chat_part: str | None, finish_reason: str | None, logprobs: bool) -> Json:
    """Return a choice of one token, in chat form when ``chat_part`` names the part that holds the text."""
    text = text_of(token)
    said: Json | None = None
    if logprobs and chat_part is not None:
        said = {
            "content": [{"token": text, "logprob": -1.0, "bytes": list(text.encode()), "top_logprobs": []}]
        }
    elif logprobs:
        said = {"tokens": [text], "token_logprobs": [-1.0], "top_logprobs": [{}], "text_offset": [0]}
    return {
        "index": 0,
        **({"text": text} if chat_part is None else {chat_part: {"role": "assistant", "content": text}}),
        "logprobs": said,
        "finish_reason": finish_reason,
        "stop_reason": None,
        "token_ids": [token],
    }


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


def _send_json(transport: asyncio.Transport, value: Json, status: int = 200) -> None:
    body = orjson.dumps(value)
    transport.write(
        b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (status, len(body), body)
    )


def _send_event(transport: asyncio.Transport, value: Json) -> None:
    data = b"data: " + orjson.dumps(value) + b"\n\n"
    transport.write(b"%x\r\n%b\r\n" % (len(data), data))


async def _serve(port: int, engine_id: str, step_s: float) -> None:
    engine = FakeEngine(engine_id, step_s)
    await engine.start(port=port)
    sys.stdout.write(f'{{"event":"ready","port":{engine.port}}}\n')
    sys.stdout.flush()
    await asyncio.Event().wait()


def main() -> None:
    """Run one fake engine until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--engine-id", default="fake")
    parser.add_argument("--step-ms", type=float, default=0.0)
    args = parser.parse_args()
    import uvloop

    uvloop.run(_serve(args.port, args.engine_id, args.step_ms / 1000.0))


if __name__ == "__main__":
    main()
